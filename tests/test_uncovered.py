"""The page of coverage: its figures, and that it is that of its results."""

from __future__ import annotations

import pytest

pytest.importorskip("pybind11", reason="the kernels are built with counters")

from uncovered import OUT, PAGE, page, ranges, share

from benchmarks import results


def test_lines_that_follow_each_other_are_one_range() -> None:
    assert ranges([]) == "" and ranges([3]) == "3" and ranges([3, 7, 8, 9, 11]) == "3, 7 to 9, 11"


def test_a_share_is_never_rounded_up() -> None:
    assert share([(10_000, [1]), (5, [])]) == "99.9 %"
    assert share([(7, []), (0, [])]) == "100.0 %" and share([(3, [1, 2, 3])]) == "0.0 %"


def test_the_page_is_that_of_the_results() -> None:
    assert PAGE.read_text() == page(results.load(OUT))
