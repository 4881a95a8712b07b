"""What the site shows of runs, made at every build: the recipes with what they print, the pictures, and what the code
of some pages prints."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from docutils import nodes
from docutils.parsers.rst import Directive
from drawings import draw

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 300  # seconds of one recipe
#: Arguments that make a recipe short, or tell it where to write its picture.
ARGUMENTS = {"transfer": ["--out", "{picture}"]}
#: Pages whose Python blocks run, in their order and in one namespace. What a block prints is shown below it.
CELLS = ("docs/quickstart", "docs/gradients", "docs/marginals")


class Diagram(Directive):
    """A mermaid diagram, as its text: the site is built and read without a network."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        return [nodes.literal_block("\n".join(self.content), "\n".join(self.content))]


def _title(recipe: Path) -> str:
    return recipe.stem.replace("_", " ").capitalize()


def _recipe(recipe: Path, folder: Path) -> None:
    """Run one recipe and write its page."""
    picture = folder / f"{recipe.stem}.png"
    arguments = [word.format(picture=picture) for word in ARGUMENTS.get(recipe.stem, [])]
    with tempfile.TemporaryDirectory() as here:
        run = subprocess.run(
            [sys.executable, "-m", f"examples.{recipe.stem}", *arguments],
            cwd=here,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=LONGEST,
            check=False,
        )
    if run.returncode:
        raise RuntimeError(f"examples/{recipe.name} failed:\n{run.stderr}")
    shown = "\n".join(line for line in run.stdout.splitlines() if str(folder) not in line)
    parts = [f"# {_title(recipe)}", f"What `python -m examples.{recipe.stem}` prints:", f"```text\n{shown}\n```"]
    if picture.exists():
        parts.append(f"![What the recipe draws]({picture.name})")
    parts.append(f"```{{literalinclude}} ../../examples/{recipe.name}\n:language: python\n```")
    (folder / f"{recipe.stem}.md").write_text("\n\n".join(parts) + "\n")


def make(folder: Path) -> None:
    """Run the recipes and write their pages into a folder, and the pictures of the other pages beside them."""
    folder.mkdir(exist_ok=True)
    draw(folder / "pictures")
    recipes = sorted(path for path in (ROOT / "examples").glob("*.py") if path.stem != "__init__")
    for recipe in recipes:
        _recipe(recipe, folder)
    listed = "\n".join(recipe.stem for recipe in recipes)
    text = "# Recipes\n\nShort scripts in `examples/`. They are run when this site is built; their output is shown.\n\n"
    (folder / "index.md").write_text(f"{text}```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n")


def as_built(name: str, text: str) -> str:
    """A page as the site shows it: with the pictures of this build, and with what its code prints."""
    if name.startswith("docs/"):
        text = text.replace("](pictures/", "](generated/pictures/")
    return with_output(text) if name in CELLS else text


def with_output(text: str) -> str:
    """A page with what each of its Python blocks prints below it.

    Raises:
        Exception: what a block raises.
    """
    namespace: dict[str, object] = {}
    torch.manual_seed(0)

    def run(block: re.Match[str]) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(block[1], namespace)
        return block[0] + (f"\n```text\n{printed.getvalue().rstrip()}\n```\n" if printed.getvalue() else "")

    return re.sub(r"^```python\n(.*?)^```\n", run, text, flags=re.MULTILINE | re.DOTALL)
