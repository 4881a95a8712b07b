"""The soak test of interrupts: some of its moments, that it finds what it looks for, and its page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("captum", reason="the example needs otloss[examples]")

from interrupt_soak import PAGE, RESULTS, STRIKES, Bench, Trial, _check, page
from interrupted_commands import COMMANDS, half_written
from processors import ROOT

from benchmarks import results
from examples.optiml.data.prepare.command import prepare
from examples.optiml.data.prepare.settings import PrepareConfig

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")


@pytest.mark.slow
def test_some_moments_of_prepare() -> None:
    """One interrupt at least of each kind; a process of its own, since a fork of this one would print elsewhere."""
    command = [sys.executable, str(ROOT / "tests" / "interrupt_soak.py"), "--only", "1", "2", "3", "4", "7", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f": {strike}" in done.stdout for strike in STRIKES)
    assert "0 trials with a fault" in done.stdout


def test_it_finds_what_is_lost_made_again_or_half_written(tmp_path: Path) -> None:
    bench, command = Bench(tmp_path), COMMANDS["prepare"]
    config = PrepareConfig("nih", bench.out, bench.data, size=24, workers=1)
    prepare(config)
    kept, end = command.kept(bench.out), command.end(bench.out)
    assert len(kept) == 120 and not half_written(bench.out)

    def faults() -> list[str]:
        trial = Trial(0, "prepare", [], [])
        _check(trial, command, bench, kept)
        return trial.faults

    assert faults() == []
    name = max(kept)
    film = bench.out / "images" / name
    whole = film.read_bytes()
    film.rename(bench.out / "images" / f".{name}.part")
    assert faults() == [f"1 that were kept are lost or made again: {name}"]
    prepare(config)
    assert command.end(bench.out) == end and faults() == [f"1 that were kept are lost or made again: {name}"]
    film.write_bytes(whole[: len(whole) // 2])
    assert faults()[0].startswith(f"half written: images/{name}: OSError")
    assert command.end(bench.out) != end


def test_the_page_is_that_of_the_results() -> None:
    assert PAGE.read_text() == page(results.load(RESULTS))
