"""The pictures of the pages. The site draws them anew at every build.

``python docs/drawings.py`` draws them into ``docs/pictures``. They are kept there, so that the pages show them without
a build too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

import otloss

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.collections import LineCollection

KEPT = Path(__file__).parent / "pictures"
RED, BLUE, GREY = "tab:red", "tab:blue", "0.6"


# --- what pictures share ---------------------------------------------------------------------------------------------


def _clouds() -> tuple[Tensor, Tensor]:
    """Two clouds of 40 points in the plane, sorted along the first coordinate."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(40, 2, generator=generator), torch.rand(40, 2, generator=generator)
    return x[x[:, 0].argsort()], (y * 0.8 + torch.tensor([0.3, 0.1]))[y[:, 0].argsort()]


def _panels(count: int) -> tuple[Any, Any]:
    return pyplot.subplots(1, count, figsize=(3.3 * count, 3), dpi=110, layout="constrained")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path)
    pyplot.close(figure)


def _show(axes: Any, x: Tensor, y: Tensor, out: otloss.SinkhornOutput, title: str) -> None:
    """Both sets, each point as large as the mass that it sends or gets, and a line for each pair of the plan."""
    plan = out.plan.detach()
    share = plan / plan.max()
    pairs = (share > 0.02).nonzero().tolist()
    ends = [(x[i].tolist(), y[j].tolist()) for i, j in pairs]
    axes.add_collection(LineCollection(ends, colors=[(0.3, 0.3, 0.3, 0.7 * float(share[i, j])) for i, j in pairs]))
    for points, mass, colour in ((y, plan.sum(0), BLUE), (x, plan.sum(1), RED)):
        axes.scatter(*points.T, s=4 + 20 * len(points) * mass, color=colour, zorder=2, linewidths=0)
    axes.set(title=title, xticks=[], yticks=[], aspect="equal")
    axes.margins(0.1)


# --- choose.md -------------------------------------------------------------------------------------------------------


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
        below.scatter(*y.T, s=8, color=BLUE)
        below.scatter(*x.T, s=8, color=RED)
        below.quiver(*x.T, *move.T, angles="xy", scale_units="xy", scale=1, width=0.006, color=RED, alpha=0.6)
        below.set(xticks=[], yticks=[], aspect="equal")
    _save(figure, path)


def _eps(path: Path) -> None:
    """Sweeps to a tolerance, and how far the transport cost lies above that of the exact plan."""
    x, y = _clouds()
    cost = otloss.sqeuclidean_cost(x, y).double()
    epsilons = [10 ** (-k / 4) for k in range(12)]
    outs = [otloss.sinkhorn(cost, eps=eps, tol=1e-9, max_iter=100000) for eps in epsilons]
    plain = [otloss.sinkhorn(cost, eps=eps, tol=1e-9, max_iter=100000, solver="plain") for eps in epsilons]
    least = float(otloss.sinkhorn(cost, eps=2e-5, tol=1e-9, max_iter=100000).transport_cost)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3), dpi=110, layout="constrained")
    left.loglog(epsilons, [float(out.transport_cost) / least - 1 for out in outs], "o-", color=RED, markersize=3)
    left.set(xlabel="eps", title="⟨T, C⟩ above that of the unregularised plan")
    left.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    for runs, style, name in ((outs, "o-", 'solver="auto"'), (plain, "o--", 'solver="plain"')):
        right.loglog(epsilons, [int(out.n_iter) for out in runs], style, color=RED, markersize=3, label=name)
    right.set(xlabel="eps", title="sweeps to tol 1e-9")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.invert_xaxis()
    _save(figure, path)


# --- marginals.md ----------------------------------------------------------------------------------------------------


def _learn(x: Tensor, y: Tensor, both: bool) -> otloss.SinkhornOutput:
    """The plan after the masses of x, or those of both sets, have followed the gradient of the transport cost."""
    logits = [torch.zeros(len(points), requires_grad=True) for points in (x, y)]
    optimizer = torch.optim.Adam(logits if both else logits[:1], lr=0.2)
    for _ in range(60):
        log_a, log_b = (t.log_softmax(-1) for t in logits)
        out = otloss.feature_sinkhorn(x, y, log_a=log_a, log_b=log_b, cost="sqeuclidean", eps=0.05)
        optimizer.zero_grad()
        out.transport_cost.backward()
        optimizer.step()
    return out


def _marginals(path: Path) -> None:
    """Masses that are equal, that one side has learnt, and that both have learnt."""
    generator = torch.Generator().manual_seed(0)
    x, y = (0.5 * torch.randn(count, 2, generator=generator) for count in (24, 20))
    x[18:] += torch.tensor([2.5, 0.5])  # these belong to nothing
    figure, panels = _panels(3)
    _show(panels[0], x, y, otloss.feature_sinkhorn(x, y, cost="sqeuclidean", eps=0.05), "equal masses")
    _show(panels[1], x, y, _learn(x, y, both=False), "red masses learnt")
    _show(panels[2], x, y, _learn(x, y, both=True), "both learnt: collapse")
    _save(figure, path)


# --- problems.md -----------------------------------------------------------------------------------------------------


def _masks(path: Path) -> None:
    """A set that is padded with zeros, without and with a mask."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(12, 2, generator=generator) + 0.5
    y = torch.cat((torch.rand(6, 2, generator=generator) + torch.tensor([1.2, 0.6]), torch.zeros(6, 2)))
    mask = torch.arange(12) < 6
    figure, panels = _panels(2)
    for axes, given, title in ((panels[0], None, "without a mask"), (panels[1], mask, "with mask_y")):
        _show(axes, x, y, otloss.feature_sinkhorn(x, y, cost="sqeuclidean", eps=0.02, mask_y=given), title)
        axes.annotate("padding", (0, 0), (0.12, -0.03), color=GREY)
    _save(figure, path)


def _unbalanced(path: Path) -> None:
    """Outliers under constraints, under penalties, and where only a share is sent."""
    generator = torch.Generator().manual_seed(2)
    x, y = torch.rand(20, 2, generator=generator), torch.rand(20, 2, generator=generator)
    x[:2] += torch.tensor([-1.0, 1.0])
    y[:3] += torch.tensor([1.2, 0.9])
    figure, panels = _panels(3)
    options = ({}, {"rho_a": 0.3, "rho_b": 0.3}, {"partial": 0.8})
    titles = ("constraints", "rho_a = rho_b = 0.3", "partial = 0.8")
    for axes, given, title in zip(panels, options, titles, strict=True):
        _show(axes, x, y, otloss.feature_sinkhorn(x, y, cost="sqeuclidean", eps=0.02, **given), title)
    _save(figure, path)


def _flow(x: Tensor, y: Tensor, objective: str) -> Tensor:
    """Where the points of x are after descending an objective."""
    loss = otloss.FeatureSinkhornLoss("sqeuclidean", eps=0.2, objective=objective)
    for _ in range(60):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x, y), x)
        x = x - 0.25 * len(x) * gradient
    return x.detach()


def _divergence(path: Path) -> None:
    """A blob that flows onto a ring by the value, and by the divergence."""
    generator = torch.Generator().manual_seed(3)
    angle = 2 * torch.pi * torch.rand(120, generator=generator)
    radius = 0.8 + 0.2 * torch.rand(120, generator=generator)
    y = radius.unsqueeze(-1) * torch.stack((angle.cos(), angle.sin()), -1)
    x = 0.2 * torch.randn(80, 2, generator=generator) + torch.tensor([1.5, 0.0])
    figure, panels = _panels(3)
    views = {
        "before": x,
        "after descending the value": _flow(x, y, "value"),
        "after descending the divergence": _flow(x, y, "divergence"),
    }
    for axes, (title, points) in zip(panels, views.items(), strict=True):
        axes.scatter(*y.T, s=8, color=BLUE)
        axes.scatter(*points.T, s=8, color=RED)
        axes.set(title=title, xticks=[], yticks=[], aspect="equal", xlim=(-1.2, 2.1), ylim=(-1.2, 1.2))
    _save(figure, path)


DRAWINGS: dict[str, Callable[[Path], None]] = {
    "plans.png": _plans,
    "eps.png": _eps,
    "marginals.png": _marginals,
    "masks.png": _masks,
    "unbalanced.png": _unbalanced,
    "divergence.png": _divergence,
}


def draw(folder: Path) -> None:
    """Draw every picture into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, one in DRAWINGS.items():
        one(folder / name)


if __name__ == "__main__":
    draw(KEPT)
