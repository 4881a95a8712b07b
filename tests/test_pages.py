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

import otloss

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


def test_files_of_weights_are_read_without_their_code() -> None:
    """Every ``torch.load``, in the code and on the pages, says so; where it takes more, a comment says why."""
    calls = 0
    for name in sorted(name for name in FILES if name.endswith((".py", ".md"))):
        text = (ROOT / name).read_text()
        for found in re.finditer(r"torch[.]load[(]", text):
            depth, end = 1, found.end()
            while depth and end < len(text):
                depth += {"(": 1, ")": -1}.get(text[end], 0)
                end += 1
            calls, call = calls + 1, text[found.start() : end]
            assert re.search(r"weights_only=(True|False)", call), f"{name}: {call}"
        before = ""
        for line in text.splitlines():
            assert not re.search(r"weights_only=Fals[e]", line) or "#" in line + before, f"{name}: {line}"
            before = line
    assert calls >= 10


def lines(page: str) -> int:
    return len((ROOT / page).read_text().splitlines())


def test_the_readme_is_short() -> None:
    assert lines("README.md") <= 160


def test_the_page_of_the_example_is_short() -> None:
    assert lines("examples/optiml/README.md") <= 150
    assert lines("examples/optiml/COMPARISON.md") <= 60


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


WITH_CODE = [page for page in PAGES if page.startswith("docs/") and code_blocks(page)]


@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_of_a_page_runs(page: str) -> None:
    """All blocks in their order and in one namespace, as a reader types them and as the site runs them."""
    found: dict[str, object] = {}
    for block in code_blocks(page):
        for peer in re.findall(r"^import (ot|ot\.batch|geomloss\.ot)$", block, re.MULTILINE):
            pytest.importorskip(peer, reason=f"{peer} is not installed")
        exec(block, found)


def test_code_is_marked_as_what_it_is() -> None:
    """A block under another name would not be run."""
    known = {"", "python", "bash", "text", "mermaid"}
    for page in ("README.md", *(page for page in PAGES if page.startswith("docs/"))):
        marks = {fence[0].splitlines()[0].strip(" `~") for fence in FENCE.finditer((ROOT / page).read_text())}
        assert {mark for mark in marks if not mark.startswith("{")} <= known, page
    assert {"docs/quickstart.md", "docs/gradients.md", "docs/marginals.md", "docs/problems.md"} <= set(WITH_CODE)


def test_every_public_name_is_on_the_page_of_names() -> None:
    page = (ROOT / "docs/api.md").read_text()
    shown = set(re.findall(r"^\.\. auto(?:function|class|exception):: otloss\.(\S+)$", page, re.MULTILINE))
    assert set(otloss.__all__) - {"plot"} <= shown
    assert {f"plot.{name}" for name in otloss.plot.__all__} <= shown


def test_what_is_promised_is_tested() -> None:
    """Every test that the page of promises names is there: a file, a function in it, or ``::`` one in the same file."""
    names = re.findall(r"`((?:tests/\w+\.py)?(?:::\w+)?)`", (ROOT / "docs/numerics.md").read_text())
    file = ""
    for name in names:
        path, _, function = name.partition("::")
        file = path or file
        assert file in FILES, name
        assert not function or f"def {function}(" in (ROOT / file).read_text(), name
    assert len(names) > 30


def test_pictures_are_those_that_are_drawn() -> None:
    """Each is kept, and shown by a page."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    spec = importlib.util.spec_from_file_location("drawings", ROOT / "docs/drawings.py")
    assert spec is not None and spec.loader is not None
    drawings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawings)
    kept = {Path(name).name for name in FILES if name.startswith("docs/pictures/")}
    assert set(drawings.DRAWINGS) == kept
    shown = {target for page in PAGES if page.startswith("docs/") for target in targets((ROOT / page).read_text())}
    assert {f"pictures/{name}" for name in drawings.DRAWINGS} <= shown


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
