"""Ragged point clouds: each flows onto a target of another size, and leaves out a point that does not belong there.

Clouds of a batch have sizes of their own. They are padded, and a mask says which points there are. The loss is the
Sinkhorn divergence, zero for equal sets. Every target has an outlier far away. With masses as constraints one point in
m has to follow it. With a penalty ``rho`` in their place, mass that would cost more than about rho to send stays.

    python -m examples.ragged --help

Source: Séjourné et al. 2019, Sinkhorn Divergences for Unbalanced Optimal Transport (arXiv 1910.12958).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import otloss

FAR = 4.0  # how far the outliers are; the clouds have a radius of 0.5


def pad(clouds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Clouds ``(n_i, d)`` as one tensor ``(B, n, d)``, and which of its points there are ``(B, n)``."""
    sizes = torch.tensor([len(cloud) for cloud in clouds])
    points = pad_sequence(list(clouds), batch_first=True)
    return points, torch.arange(points.shape[1]) < sizes.unsqueeze(-1)


def rings(count: int, least: int, most: int) -> list[tuple[Tensor, Tensor]]:
    """Blobs, and rings beside them of which each has an outlier as its last point."""
    pairs = []
    for n, m in torch.randint(least, most + 1, (count, 2)).tolist():
        angle = 2 * torch.pi * torch.rand(m)
        ring = 0.5 * torch.stack((angle.cos(), angle.sin()), -1) + torch.tensor([0.5, 0.0])
        pairs.append((0.2 * torch.randn(n, 2), torch.cat((ring, torch.tensor([[FAR, 0.0]])))))
    return pairs


def flow(x: Tensor, mask_x: Tensor, y: Tensor, mask_y: Tensor, rho: float | None, steps: int) -> Tensor:
    """Where the points of x are after descending the divergence; a step moves a point by its gradient per mass."""
    loss = otloss.FeatureSinkhornLoss(
        "sqeuclidean", eps=0.02, objective="divergence", reduction="sum", rho_a=rho, rho_b=rho, tol=1e-3
    )
    points = mask_x.sum(-1)[:, None, None]
    for _ in range(steps):
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss(x, y, mask_x=mask_x, mask_y=mask_y), x)  # 0 where there is no point
        x = x - 0.25 * points * grad
    return x.detach()


def main(argv: Sequence[str] | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Flow with constraints and with penalties; return the points of each, and which of them there are."""
    parser = argparse.ArgumentParser(description="Flows of ragged point clouds, with an outlier in every target.")
    parser.add_argument("--clouds", type=int, default=4, help="clouds in the batch (%(default)s)")
    parser.add_argument("--points", type=int, nargs=2, default=(15, 40), help="least and most points (%(default)s)")
    parser.add_argument("--steps", type=int, default=15, help="steps of a flow (%(default)s)")
    parser.add_argument("--rho", type=float, default=1.0, help="penalty, a squared distance (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the clouds (%(default)s)")
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    (x, mask_x), (y, mask_y) = map(pad, zip(*rings(options.clouds, *options.points), strict=True))
    results = {}
    for name, rho in (("constraints", None), ("penalties", options.rho)):
        moved = flow(x, mask_x, y, mask_y, rho, options.steps)
        results[name] = moved, mask_x
        reach = [float(points[mask].norm(dim=-1).max()) for points, mask in zip(moved, mask_x, strict=True)]
        print(f"{name:11}: the farthest point of each cloud is at", *(f"{distance:.2f}" for distance in reach))
    return results


if __name__ == "__main__":
    main()
