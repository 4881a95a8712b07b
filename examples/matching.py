"""Feature matching with a dustbin, as SuperGlue does it: a network learns which keypoints of two pictures are the same.

A picture shows points that the other does not. So the scores get one more row and one more column, the dustbin, to
which a point goes that has no partner. The dustbins' masses are large enough for all points of the other side. The loss
is the negative logarithm of the plan at the known matches; its gradient reaches scores and dustbin through the solver.

    python -m examples.matching --help

Source: Sarlin et al. 2020, SuperGlue (arXiv 1911.11763), section 3.2.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import otloss

SIGNAL, NUISANCE = 16, 16  # of a descriptor: features that both pictures share, and features of one picture only


def with_dustbin(scores: Tensor, bin_score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cost ``(B, n + 1, m + 1)`` and masses ``(n + 1,)``, ``(m + 1,)`` of scores ``(B, n, m)``; eps is 1.

    A point has mass 1. The dustbin of a side has mass for every point of the other side.
    """
    *batch, n, m = scores.shape
    column, row = bin_score.expand(*batch, n, 1), bin_score.expand(*batch, 1, m + 1)
    a, b = scores.new_ones(n + 1), scores.new_ones(m + 1)
    a[-1], b[-1] = m, n
    return -torch.cat((torch.cat((scores, column), -1), row), -2), a, b


def match(scores: Tensor, bin_score: Tensor, **options: object) -> otloss.SinkhornOutput:
    """The plan between two sets of points, dustbins included. Its total is 1: times n + m each point has mass 1."""
    cost, a, b = with_dustbin(scores, bin_score)
    return otloss.sinkhorn(cost, a, b, **{"eps": 1.0, **options})  # type: ignore[arg-type]


class Matcher(nn.Module):
    """Projects descriptors, scores pairs by a cosine with a learned scale, and holds the score of the dustbin."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(SIGNAL + NUISANCE, SIGNAL)
        self.log_scale, self.bin_score = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(1.0))

    def forward(self, left: Tensor, right: Tensor) -> otloss.SinkhornOutput:
        """The plan ``(B, n + 1, m + 1)`` of descriptors ``(B, n, d)`` and ``(B, m, d)``."""
        cosine = 1 - otloss.cosine_cost(self.project(left), self.project(right))
        return match(self.log_scale.exp() * cosine, self.bin_score)


def pictures(batch: int, points: int) -> tuple[Tensor, Tensor, Tensor]:
    """Descriptors of two pictures ``(B, n, d)``, and which pairs ``(B, n + 1, n + 1)`` match, dustbins included.

    Each picture shows its own three quarters of the points of a scene, in an order of its own.
    """
    total = -(-4 * points // 3)
    scene = torch.randn(batch, total, SIGNAL)
    seen = torch.rand(2, batch, total).argsort(-1)[..., :points]
    views = []
    for index in seen:
        shared = scene.gather(1, index.unsqueeze(-1).expand(-1, -1, SIGNAL)) + 0.2 * torch.randn(batch, points, SIGNAL)
        views.append(torch.cat((shared, 3 * torch.randn(batch, points, NUISANCE)), -1))
    same = seen[0].unsqueeze(-1) == seen[1].unsqueeze(-2)
    known = torch.zeros(batch, points + 1, points + 1, dtype=torch.bool)
    known[:, :-1, :-1] = same
    known[:, :-1, -1], known[:, -1, :-1] = ~same.any(-1), ~same.any(-2)
    return views[0], views[1], known


@torch.no_grad()
def score(model: Matcher, batch: int, points: int) -> tuple[float, float]:
    """Precision and recall of the mutual best matches on new pictures. A match with the dustbin is none."""
    left, right, known = pictures(batch, points)
    found = otloss.assign(model(left, right), mutual=True)[:, :-1]
    made = (found >= 0) & (found < points)
    right_ones = made & known[:, :-1].gather(-1, found.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    there = known[:, :-1, :-1].sum()
    return float(right_ones.sum() / made.sum().clamp(min=1)), float(right_ones.sum() / there.clamp(min=1))


def main(argv: Sequence[str] | None = None) -> dict[str, tuple[float, float]]:
    """Train, and return precision and recall before and after."""
    parser = argparse.ArgumentParser(description="Learn to match keypoints with a dustbin, on made-up descriptors.")
    parser.add_argument("--steps", type=int, default=150, help="steps of training (%(default)s)")
    parser.add_argument("--points", type=int, default=30, help="points in a picture (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="pairs of pictures in a step (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and weights (%(default)s)")
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    model = Matcher()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    results = {"before": score(model, 32, options.points)}
    for step in range(options.steps):
        left, right, known = pictures(options.batch, options.points)
        loss = -model(left, right).log_plan[known].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:4d}  loss {float(loss.detach()):.3f}")
    results["after"] = score(model, 32, options.points)
    for when, (precision, recall) in results.items():
        print(f"{when:6} training: precision {100 * precision:.1f} %, recall {100 * recall:.1f} %")
    return results


if __name__ == "__main__":
    main()
