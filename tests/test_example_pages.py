"""What the example's pages tell people to type is there to be typed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("pydicom", reason="the example needs otloss[examples]")
pytest.importorskip("tyro", reason="the example needs otloss[examples]")

import examples.optiml.__main__ as program

FOLDER = Path(program.__file__).parent


def commands() -> dict[str, set[str]]:
    """The flags that the pages and the script give to each command."""
    found: dict[str, set[str]] = {}
    for path in (*sorted(FOLDER.glob("*.md")), *sorted(FOLDER.glob("*.sh"))):
        text = path.read_text().replace("\\\n", " ")
        for command, rest in re.findall(r"(?:-m examples\.optiml|^optiml) ([a-z]+)\b([^#`\n]*)", text, re.MULTILINE):
            found.setdefault(command, set()).update(re.findall(r"(?<!\S)--[a-z][\w.-]*", rest))
    return found


def test_every_command_and_flag_exists(capsys: pytest.CaptureFixture[str]) -> None:
    written = commands()
    assert set(program.COMMANDS) == set(written)  # and every command is on a page
    assert len(written["prepare"]) > 12 and {"--data", "--run", "--out"} <= written["xray"]
    for command, flags in written.items():
        with pytest.raises(SystemExit):
            program.cli([command, "--help"])
        assert flags <= set(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out)), command
