"""A cost from any function: ``otloss.sinkhorn`` takes every matrix that PyTorch makes, and differentiates through it.

Three costs between two sets of points that have a position and a descriptor: the distance of the positions, a distance
in a learned metric, and a cosine of the descriptors plus a distance. The metric is trained so that the plan finds the
known pairs, which only two features of ten tell.

    python -m examples.dense_cost --help
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import otloss

INFORMATIVE, NOISE = 2, 8  # features of a descriptor


def euclidean(x: Tensor, y: Tensor) -> Tensor:
    """Distances, not squared."""
    return torch.cdist(x, y)


class LearnedMetric(nn.Module):
    """||W (x_i - y_j)||^2, the squared Mahalanobis distance with the matrix W'W."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(dim) / dim**0.5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return otloss.sqeuclidean_cost(x @ self.weight.T, y @ self.weight.T)


def cosine_and_place(x: Tensor, y: Tensor, place_x: Tensor, place_y: Tensor, weight: float = 10.0) -> Tensor:
    """Unlike descriptors cost, and so do far places."""
    return otloss.cosine_cost(x, y) + weight * torch.cdist(place_x, place_y)


def pairs(batch: int, points: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Descriptors and places of two sets in which point i of one is point i of the other, seen again."""
    known, place = torch.randn(batch, points, INFORMATIVE), torch.rand(batch, points, 2)
    x, y = (
        torch.cat((known + 0.05 * torch.randn_like(known), torch.randn(batch, points, NOISE)), -1) for _ in range(2)
    )
    return x, y, place, place + 0.02 * torch.randn_like(place)


def found(cost: Tensor, eps: float) -> float:
    """The share of points that the plan sends to their pair."""
    index = otloss.assign(otloss.sinkhorn(cost, eps=eps))
    return float((index == torch.arange(cost.shape[-1])).float().mean())


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train the metric, and return the share of pairs that each cost finds."""
    parser = argparse.ArgumentParser(description="Transport under costs of one's own, one of them learned.")
    parser.add_argument("--steps", type=int, default=100, help="steps of training (%(default)s)")
    parser.add_argument("--points", type=int, default=20, help="points of a set (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="problems in a step (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data (%(default)s)")
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    metric = LearnedMetric(INFORMATIVE + NOISE)
    x, y, place_x, place_y = pairs(options.batch, options.points)
    shares = {
        "distance of places": found(euclidean(place_x, place_y), 0.05),
        "cosine and distance": found(cosine_and_place(x, y, place_x, place_y), 0.5),
        "metric, not yet learned": found(metric(x, y), 3.0),
    }
    optimizer = torch.optim.Adam(metric.parameters(), lr=3e-2)
    for _ in range(options.steps):
        left, right, *_ = pairs(options.batch, options.points)
        out = otloss.sinkhorn(metric(left, right), eps=3.0)
        loss = -out.log_plan.diagonal(dim1=-2, dim2=-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    shares["metric, learned"] = found(metric(x, y), 3.0)
    for name, share in shares.items():
        print(f"{name:24} finds {100 * share:5.1f} % of the pairs")
    return shares


if __name__ == "__main__":
    main()
