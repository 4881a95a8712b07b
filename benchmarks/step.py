"""Share of an OPTiML pretraining step that the OT loss takes: ResNet18, two views of 64 images at 224 px, expander.

A step is forward, loss, backward and the optimizer's update. The OT part is `CosineSinkhornLoss` forward and backward
on the same feature maps and marginals, timed alone; CV-SIM and the variance and covariance terms belong to the rest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import otloss

DIM, EXPANDED = 512, 2048


def _network() -> tuple[nn.Module, nn.Module]:
    """ResNet18 up to its feature maps, and VICReg's expander."""
    from torchvision.models import resnet18

    trunk = nn.Sequential(*list(resnet18(weights=None).children())[:-2])
    layers: list[nn.Module] = []
    for width in (DIM, EXPANDED):
        layers += [nn.Linear(width, EXPANDED), nn.BatchNorm1d(EXPANDED), nn.ReLU(inplace=True)]
    return trunk, nn.Sequential(*layers, nn.Linear(EXPANDED, EXPANDED, bias=False))


def _time(run: Callable[[], Any], rounds: int) -> float:
    run()
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def measure(batch: int = 64, pixels: int = 224, steps: int = 2) -> dict[str, Any]:
    """Seconds of a step and of its OT part, once matching channels and once positions."""
    torch.manual_seed(0)
    views = torch.randn(2, batch, 3, pixels, pixels)
    found: dict[str, Any] = {"batch": batch, "pixels": pixels}
    trunk, expander = _network()
    for match in ("channel", "position"):
        criterion = otloss.OPTiMLLoss(DIM, match=match)
        parameters = [*trunk.parameters(), *expander.parameters(), *criterion.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
        kept: list[Tensor] = []

        def step(criterion: nn.Module = criterion, optimizer: Any = optimizer, kept: list[Tensor] = kept) -> None:
            maps = [trunk(view) for view in views]
            kept[:] = [z.detach() for z in maps]
            embeddings = [expander(z.mean((2, 3))) for z in maps]
            optimizer.zero_grad()
            criterion(*maps, *embeddings).loss.backward()
            optimizer.step()

        whole = _time(step, steps)
        ot = _time(_ot_part(criterion, kept), 9)
        found[match] = {"step_s": whole, "ot_s": ot, "share": ot / whole}
    return found


def _ot_part(criterion: otloss.OPTiMLLoss, maps: list[Tensor]) -> Callable[[], Any]:
    with torch.no_grad():
        flat = [z.flatten(2) for z in maps]
        log_mass = criterion._log_marginals(*flat)
    points = flat if criterion.match == "channel" else [z.mT for z in flat]
    leaves = [t.detach().requires_grad_() for t in (*points, *log_mass) if t is not None]

    def run() -> None:
        x, y, log_a, log_b = leaves
        torch.autograd.grad(criterion.transport(x, y, log_a=log_a, log_b=log_b).mean(), leaves)

    return run
