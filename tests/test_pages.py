"""The pages: every link and picture resolves, commands exist, code runs, and the first pages stay short."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^ {0,3}(```+|~~~+).*?^ {0,3}\1[`~]*[ \t]*$", re.MULTILINE | re.DOTALL)


def tracked() -> list[str]:
    """Every file of the repository; without git, every file that does not lie in a hidden or a generated folder."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        return listed.stdout.rstrip("\0").split("\0")
    made = {"build", "dist", "runs", "data", "__pycache__"}
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return [path.as_posix() for path in found if path.parts[0] not in made and not path.parts[0].startswith(".")]


FILES = frozenset(tracked())
FOLDERS = frozenset(parent.as_posix() for name in FILES for parent in Path(name).parents)
PAGES = sorted(name for name in FILES if name.endswith(".md"))


def without_code(text: str) -> str:
    """A page without fenced blocks, code spans and comments, in which nothing is a link."""
    text = re.sub(r"<!--.*?-->", "", FENCE.sub("", text), flags=re.DOTALL)
    return re.sub(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", "", text)


def targets(text: str) -> Iterator[str]:
    """Where the links and pictures of a page lead: inline, by reference, and in HTML."""
    text = without_code(text)
    yield from re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+[\"'(][^)]*)?\)", text)
    yield from re.findall(r"^ {0,3}\[[^\]]+\]:\s*<?([^\s>]+)", text, re.MULTILINE)
    yield from re.findall(r"<(?:img|a|source)\b[^>]*?(?:src|srcset|href)=[\"']([^\"' ]+)", text)


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to the headings of a page, and those that HTML sets."""
    found: set[str] = set()
    used: dict[str, int] = {}
    for heading in re.findall(r"^ {0,3}#{1,6}[ \t]+(.*?)[ \t]*#*$", FENCE.sub("", text), re.MULTILINE):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # of a link its text
        slug = re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")
        number = used.get(slug, 0)
        used[slug] = number + 1
        found.add(f"{slug}-{number}" if number else slug)
    return found | set(re.findall(r"<a\b[^>]*?(?:name|id)=[\"']([^\"']+)", text))


def broken(page: str, text: str) -> list[str]:
    """The relative links of a page that lead nowhere. Addresses on the web are not looked at."""
    wrong = []
    for target in targets(text):
        if re.match(r"[a-z][a-z0-9+.-]*:|//", target, re.IGNORECASE):
            continue
        path, _, anchor = target.partition("#")
        path = path.replace("%20", " ")
        resolved = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
        if resolved not in FILES and resolved not in FOLDERS:
            wrong.append(f"{page}: {target} is no file of the repository")
        elif anchor and resolved.endswith(".md"):
            there = text if resolved == page else (ROOT / resolved).read_text()
            if anchor not in anchors(there):
                wrong.append(f"{page}: {target}: there is no heading of that name")
    return wrong


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_picture_resolves(page: str) -> None:
    assert not broken(page, (ROOT / page).read_text())


def test_there_are_pages_and_links() -> None:
    assert {"README.md", "CONTRIBUTING.md", "benchmarks/README.md", "examples/optiml/README.md"} <= set(PAGES)
    assert "docs/gpu.md" in set(targets((ROOT / "README.md").read_text()))


def test_what_is_broken_is_found() -> None:
    good = "## A `b`, c\n## A b c\n[x](#a-b-c) [y](#a-b-c-1) ![z](docs/gpu.md 'title') [w](benchmarks/) [v]: https://a.b/#c\n"
    assert broken("README.md", good) == []
    bad = (
        "[a](missing.md) ![b](no.png) [c](#nowhere) [d](docs/gpu.md#nowhere) [e](../outside.md)\n"
        '[f]: gone.md\n<img src="gone.png"> [![g](lost.png)](docs/lost.md) [h](DOCS/gpu.md)\n'
    )
    assert len(broken("README.md", bad)) == 10
    code = "`[a](missing.md)` and ``[`b`](missing.md)``\n```\n[c](missing.md)\n```\n<!-- [d](missing.md) -->\n"
    assert broken("README.md", code) == []
    assert broken("docs/gpu.md", "[a](../README.md) [b](gradients.md#convergence) [c](../docs)") == []


def test_headings_are_named_as_on_github() -> None:
    text = "# Whose gradients are *right*?\n```\n# no heading\n```\n### [Sup.1](x.md) & `a_b` – ⟨T, C⟩ #\n"
    assert anchors(text) == {"whose-gradients-are-right", "sup1--a_b--t-c"}


def lines(page: str) -> int:
    return len((ROOT / page).read_text().splitlines())


def test_the_readme_is_short() -> None:
    assert lines("README.md") <= 160


def test_the_page_of_the_example_is_short() -> None:
    assert lines("examples/optiml/README.md") <= 150


WITH_COMMANDS = (
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    *sorted(p for p in PAGES if p.startswith("docs/")),
)


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_what_a_page_tells_people_to_type_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    makefile = (ROOT / "Makefile").read_text()
    goals = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, re.MULTILINE)) <= goals
    for module in re.findall(r"python -m ([a-z_]+(?:\.[a-z_]+)*)", text):
        path = ROOT / Path(*module.split("."))
        here = path.with_suffix(".py").exists() or (path / "__main__.py").exists()
        assert here or importlib.util.find_spec(module.partition(".")[0]), module


def paths_of_the_map() -> list[str]:
    """The folders and files that CONTRIBUTING's map names at the head of a line, joined to the folder they lie in."""
    block = FENCE.search((ROOT / "CONTRIBUTING.md").read_text())
    assert block is not None
    found, folder = [], ""
    for line in block[0].splitlines()[1:-1]:
        names = re.match(r"( *)((?:\S+ )*\S+)(?:  |$)", line)
        assert names is not None, line
        if not names[1]:
            folder = ""
        found += [folder + name for name in names[2].split()]
        if not names[1]:
            folder = names[2]
    return found


def test_the_map_shows_what_is_there() -> None:
    missing = [path for path in paths_of_the_map() if path.rstrip("/") not in FILES | FOLDERS]
    assert not missing


def code_blocks(page: str) -> list[str]:
    text = re.sub(r"<!--.*?-->", "", (ROOT / page).read_text(), flags=re.DOTALL)
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_code_of_the_readme_runs() -> None:
    pytest.importorskip("torchvision", reason="the second block takes its backbone from torchvision")
    short, model = code_blocks("README.md")
    assert len(short.splitlines()) <= 10
    found: dict[str, object] = {}
    exec(short, found)
    for name in ("x", "logits"):
        leaf = found[name]
        assert isinstance(leaf, torch.Tensor) and leaf.grad is not None and leaf.grad.abs().sum() > 0
    given: dict[str, object] = {"loader": [(torch.rand(4, 3, 64, 64), torch.rand(4, 3, 64, 64))]}
    exec(model, given)
    assert torch.isfinite(given["out"].loss)  # type: ignore[attr-defined]


@pytest.mark.parametrize("block", code_blocks("docs/problems.md"), ids=lambda block: block.splitlines()[2][:20])
def test_the_code_of_the_page_of_problems_runs(block: str) -> None:
    """Each block by itself; it says what it promises in assertions."""
    assert "assert" in block
    exec(block, {})


def test_a_module_of_the_benchmarks_page_exists() -> None:
    table = re.findall(r"^\| (`.*?`) \|", (ROOT / "benchmarks/README.md").read_text(), re.MULTILINE)
    named = {name.rstrip("/") for row in table for name in re.findall(r"`([a-z_]+/?)`", row)}
    there = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - {"__init__", "__main__"}
    assert named == there | {path.parent.name for path in (ROOT / "benchmarks").glob("*/__init__.py")}


def test_the_readme_quotes_the_time_to_tolerance() -> None:
    points = json.loads((ROOT / "benchmarks" / "results" / "tolerance.json").read_text())["points"]
    ours, *others = points["tokens eps 0.01 tol 1e-05"]["rows"]
    ratio = min(row["ratio"] for row in others if row["seconds"] and row["library"] != "otloss")
    text = (ROOT / "README.md").read_text()
    assert f"take otloss {1000 * ours['seconds']:.3g} ms" in text and f"takes {ratio:.3g} times as long" in text
