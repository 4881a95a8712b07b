"""What the site shows of runs: the recipes with what they print, run at every build, and the pictures of `choose.md`.

``python docs/gallery.py`` draws the pictures anew. They are kept in the repository, so that the page shows them there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
import torch
from docutils import nodes
from docutils.parsers.rst import Directive

import otloss

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "pictures"
LONGEST = 300  # seconds of one recipe
#: Arguments that make a recipe short, or tell it where to write its picture.
ARGUMENTS = {"transfer": ["--out", "{picture}"]}


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


def _clouds() -> tuple[torch.Tensor, torch.Tensor]:
    """Two clouds of 40 points in the plane, sorted along the first coordinate."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(40, 2, generator=generator), torch.rand(40, 2, generator=generator)
    return x[x[:, 0].argsort()], (y * 0.8 + torch.tensor([0.3, 0.1]))[y[:, 0].argsort()]


def _plans(path: Path) -> None:
    """The plan and the gradient by the points at several eps."""
    x, y = _clouds()
    figure, panels = pyplot.subplots(2, 4, figsize=(10, 5.2), dpi=110, layout="constrained")
    for (above, below), eps in zip(panels.T, (1.0, 0.1, 0.01, 0.001), strict=True):
        points = x.clone().requires_grad_()
        out = otloss.feature_sinkhorn(points, y, cost="sqeuclidean", eps=eps)
        (gradient,) = torch.autograd.grad(out.transport_cost, points)
        above.imshow(out.plan.detach(), cmap="viridis")
        above.set(title=f"eps {eps:g}", xticks=[], yticks=[])
        move = -gradient * len(x) / 2
        below.scatter(*y.T, s=8, color="tab:blue")
        below.scatter(*x.T, s=8, color="tab:red")
        below.quiver(*x.T, *move.T, angles="xy", scale_units="xy", scale=1, width=0.006, color="tab:red", alpha=0.6)
        below.set(xticks=[], yticks=[], aspect="equal")
    figure.savefig(path)
    pyplot.close(figure)


def _cost_of_eps(path: Path) -> None:
    """Sweeps to a tolerance, and how far the transport cost lies above that of the exact plan."""
    x, y = _clouds()
    cost = otloss.sqeuclidean_cost(x, y).double()
    epsilons = [10 ** (-k / 4) for k in range(12)]
    outs = [otloss.sinkhorn(cost, eps=eps, tol=1e-9, max_iter=100000) for eps in epsilons]
    plain = [otloss.sinkhorn(cost, eps=eps, tol=1e-9, max_iter=100000, solver="plain") for eps in epsilons]
    least = float(otloss.sinkhorn(cost, eps=2e-5, tol=1e-9, max_iter=100000).transport_cost)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3), dpi=110, layout="constrained")
    left.loglog(epsilons, [float(out.transport_cost) / least - 1 for out in outs], "o-", color="tab:red", markersize=3)
    left.set(xlabel="eps", title="⟨T, C⟩ above that of the unregularised plan")
    left.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    for runs, style, name in ((outs, "o-", 'solver="auto"'), (plain, "o--", 'solver="plain"')):
        right.loglog(epsilons, [int(out.n_iter) for out in runs], style, color="tab:red", markersize=3, label=name)
    right.set(xlabel="eps", title="sweeps to tol 1e-9")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.invert_xaxis()
    figure.savefig(path)
    pyplot.close(figure)


def make(folder: Path) -> None:
    """Run the recipes and write their pages into a folder."""
    folder.mkdir(exist_ok=True)
    recipes = sorted(path for path in (ROOT / "examples").glob("*.py") if path.stem != "__init__")
    for recipe in recipes:
        _recipe(recipe, folder)
    listed = "\n".join(recipe.stem for recipe in recipes)
    text = "# Recipes\n\nShort scripts in `examples/`. They are run when this site is built; their output is shown.\n\n"
    (folder / "index.md").write_text(f"{text}```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n")


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    _plans(PICTURES / "plans.png")
    _cost_of_eps(PICTURES / "eps.png")
