"""The documentation site: ``make docs`` builds it into build/docs, with warnings as errors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import gallery  # noqa: E402

import otloss  # noqa: E402

project, author = "otloss", "The otloss authors"
version = release = otloss.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
# The source is the repository, so that links between its pages work here as they do there.
root_doc = "docs/index"
include_patterns = [
    "*.md",
    "docs/**.md",
    "benchmarks/README.md",
    "benchmarks/results/*.md",
    "examples/optiml/*.md",
    "examples/optiml/results/**.md",
]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
myst_fence_as_directive = ["mermaid"]
html_theme, html_title = "furo", f"otloss {version}"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 80
copybutton_exclude = ".linenos, .gp, .go"
# An operator's output is a named tuple, whose fields' numbers say nothing.
autodoc_default_options = {"exclude-members": "count, index, __new__, training"}


def read(app: Any, name: str, source: list[str]) -> None:
    """Put what this build has drawn and printed into a page."""
    source[0] = gallery.as_built(name, source[0])


def setup(app: Any) -> None:
    """Draw the pictures and run the recipes before the pages are read."""
    app.connect("builder-inited", lambda app: gallery.make(HERE / "generated"))
    app.connect("source-read", read)
    app.add_directive("mermaid", gallery.Diagram)
