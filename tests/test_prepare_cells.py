"""What cells of a user's label columns mean: yes and no, lists in any writing, blanks, and what has to be asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydicom", reason="the example needs otloss[examples]")
pytest.importorskip("tyro", reason="the example needs otloss[examples]")

import pandas as pd
from xray_layouts import findings, reasons, run, write_png, write_text

from examples.optiml.data.prepare.cells import read_labels
from examples.optiml.data.prepare.settings import PrepareConfig


def labels(cells: list[str], **options: Any) -> list[list[str]]:
    """Findings of each row of a table with one label column ``x``."""
    config = PrepareConfig("csv", Path("out"), Path(), table=Path("T.csv"), label_columns=("x",), **options)
    rows = pd.DataFrame({"image": [f"{n}.png" for n in range(len(cells))], "x": cells}, dtype=object)
    read = read_labels(config, rows, {"x": "X"})
    assert set(read.classes) >= {name for found in read.found for name in found}
    return [["left out"] if read.left_out[row] else found for row, found in enumerate(read.found)]


YES, NO = ["X"], list[str]()


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        # Yes and no, in every usual writing.
        (["1", "0", "1.0", "0.0"], [YES, NO, YES, NO]),
        (["Y", "N", "y"], [YES, NO, YES]),
        (["yes", "No", "TRUE", "false"], [YES, NO, YES, NO]),
        (["positive", "Negative"], [YES, NO]),
        (["present", "absent"], [YES, NO]),
        # Lists as Python, JSON and people write them.
        (["['mass', 'nodule']", "[]", "['nodule']"], [["mass", "nodule"], [], ["nodule"]]),
        (['["Mass"]', "[Mass, Nodule]"], [["Mass"], ["Mass", "Nodule"]]),
        (["Mass|Nodule", "Mass; Nodule", "Nodule"], [["Mass", "Nodule"], ["Mass", "Nodule"], ["Nodule"]]),
        (["Mass, Nodule", "Nodule", "Mass"], [["Mass", "Nodule"], ["Nodule"], ["Mass"]]),
        (["Mass, Nodule", "Nodule, Edema", "Edema, Mass"],
         [["Mass", "Nodule"], ["Nodule", "Edema"], ["Edema", "Mass"]]),
        (["Mass, No finding", "Mass"], [["Mass"], ["Mass"]]),
        # Words for nothing, and cells of programs that mean a blank.
        (["NORMAL", "Edema", "No Finding", "healthy"], [[], ["Edema"], [], []]),
        (["N/A", "nan", "", "Edema", "None"], [[], [], [], ["Edema"], []]),
        # One finding in several spellings is one finding: that written most often.
        (["Mass", "mass", "Mass", "MASS|Edema", "Left  lung|left lung"],
         [["Mass"], ["Mass"], ["Mass"], ["Mass", "Edema"], ["left lung"]]),
        (["Mass|Mass"], [["Mass"]]),
    ],
)  # fmt: skip
def test_cells(cells: list[str], expected: list[list[str]]) -> None:
    assert labels(cells) == expected


def test_options_for_what_is_not_usual() -> None:
    assert labels(["Mass, left", "Edema"], separator=",") == [["Mass", "left"], ["Edema"]]
    assert labels(["Mass, left", "Edema"], separator="|") == [["Mass, left"], ["Edema"]]
    assert labels(["Mass/Edema;x"], separator="/") == [["Mass", "Edema;x"]]
    assert labels(["normal", "viral", "None seen"], nothing=("None seen",)) == [["normal"], ["viral"], []]
    with pytest.raises(ValueError, match="separator must be what stands between findings"):
        labels(["a"], separator="")


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["Mass, left lung", "Edema"],
         r"^T\.csv: column 'x' holds 'Mass, left lung', which may be one finding or several: say"
         r" --separator ',' or --separator '\|'; it has 'Edema', 'Mass, left lung'$"),
        (["Y", "N", "maybe"], r"^T\.csv: column 'x' holds 'maybe' among yes and no: 'N', 'Y', 'maybe'$"),
        (["0", "1", "2"], r"column 'x' holds '2' among 0 and 1: '0', '1', '2'$"),
        (["0", "1", "Mass"], r"column 'x' holds 'Mass' among 0 and 1"),
        (["37", "54", "61"], r"column 'x' holds '37', but a label column holds 0 and 1 or names of findings; it has"),
        (["Mass", "3"], r"column 'x' holds '3', but a label column"),
        (["1", ""], r"^T\.csv: column 'x' is '' for '1\.png'; say what that means with --blank$"),
        (["Y", "N/A"], r"column 'x' is 'N/A' for '1\.png'; say what that means with --blank"),
        (["1", "-1"], r"column 'x' is '-1' for '1\.png'; say what that means with --uncertain"),
    ],
)  # fmt: skip
def test_what_is_not_plain_is_asked(cells: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        labels(cells)
    assert "\n" not in str(caught.value)


def test_of_many_values_some_are_listed() -> None:
    many = [f"Mass, part {number}" for number in range(50)]
    with pytest.raises(ValueError, match=r"'Mass, part 19' and 38 more$"):
        labels(many)


CELLS = ["1", "0", "", "-1"]


@pytest.mark.parametrize(
    ("options", "blank", "uncertain"),
    [
        ({"uncertain": "u-ones"}, NO, YES),
        ({"uncertain": "u-zeros"}, NO, NO),
        ({"uncertain": "u-ignore"}, NO, ["left out"]),
        ({"uncertain": "u-ones", "blank": "skip"}, ["left out"], YES),
        ({"uncertain": "positive", "blank": "negative"}, NO, YES),
        ({"uncertain": "skip", "blank": "positive"}, YES, ["left out"]),
        ({"uncertain": "negative", "blank": "skip"}, ["left out"], NO),
    ],
)
def test_a_blank_and_minus_one_are_two_things(options: dict[str, Any], blank: list[str], uncertain: list[str]) -> None:
    assert labels(CELLS, **options) == [YES, NO, blank, uncertain]


@pytest.mark.parametrize(("options", "asked"), [({"uncertain": "positive"}, "blank"), ({"blank": "skip"}, "uncertain")])
def test_an_answer_for_one_is_none_for_the_other(options: dict[str, Any], asked: str) -> None:
    with pytest.raises(ValueError, match=f"say what that means with --{asked}$"):
        labels(CELLS, **options)


def test_a_blank_in_a_column_of_words(tmp_path: Path) -> None:
    assert labels(["Mass", ""]) == [["Mass"], []]
    assert labels(["Mass", ""], blank="skip") == [["Mass"], ["left out"]]
    with pytest.raises(ValueError, match="--blank"):
        labels(["Mass", ""], blank="refuse")
    with pytest.raises(ValueError, match="--blank, but positive it cannot be in a column of words"):
        labels(["Mass", ""], blank="positive")
    for name in ("a", "b"):
        write_png(tmp_path / "films" / f"{name}.png", ord(name))
    table = write_text(tmp_path / "T.csv", ["image,who,x", "a.png,p1,Mass", "b.png,nan,"])
    options: dict[str, Any] = {"table": table, "label_columns": ("x",), "patient_column": "who"}
    index = run("csv", tmp_path / "films", tmp_path / "out", **options).index
    assert findings(index) == {"a": {"Mass"}} and reasons(tmp_path / "out") == {"b.png": "no patient"}
