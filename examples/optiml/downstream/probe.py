"""The linear probe: one logistic regression per class on frozen features, its L2 chosen on validation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as bce

#: From "almost free" to "almost off", per image of the training set.
PENALTIES = tuple(10.0 ** (k / 2) for k in range(2, -9, -1))


@dataclass(frozen=True)
class Probe:
    """A fitted probe: standardise, then one linear score per class."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    penalty: float
    validation_loss: float

    def scores(self, x: Tensor) -> Tensor:
        """Logits (n, classes)."""
        return ((x.double() - self.mean) / self.scale) @ self.weight + self.bias


def fit_probe(x: Tensor, y: Tensor, x_val: Tensor, y_val: Tensor) -> Probe:
    """Fit on training features, choose the penalty by the loss on validation; test is not seen.

    All classes are fitted at once: the loss is a sum, so each class has its own optimum. The penalty is one
    for all, as some classes have a handful of positives in validation. It is chosen by cross-entropy rather
    than by AUC because it is the steadier of the two on so few.
    """
    x, y, x_val, y_val = x.double(), y.double(), x_val.double(), y_val.double()
    mean = x.mean(0)
    deviation = x.std(0)
    # A feature that never varies (dead unit, constant column) carries nothing; dividing by 1 keeps it at 0.
    scale = torch.where(deviation > 1e-8 * (1 + mean.abs()), deviation, torch.ones_like(deviation))
    x, x_val = (x - mean) / scale, (x_val - mean) / scale
    weight = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, requires_grad=True)
    rate = y.mean(0).clamp(1e-4, 1 - 1e-4)
    bias = torch.logit(rate).requires_grad_(True)  # the best constant, so only the weights have to be found
    best: Probe | None = None
    worse = 0
    for penalty in PENALTIES:  # from strong to weak, each starting where the last ended
        optimiser = torch.optim.LBFGS(
            [weight, bias], max_iter=150, history_size=20, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
        )

        def closure(penalty: float = penalty, optimiser: torch.optim.LBFGS = optimiser) -> Tensor:
            optimiser.zero_grad()
            loss = bce(x @ weight + bias, y, reduction="sum") / len(x) + 0.5 * penalty * weight.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimiser.step(closure)  # type: ignore[arg-type]
        with torch.no_grad():
            loss = float(bce(x_val @ weight + bias, y_val))
        if best is None or loss < best.validation_loss:
            best, worse = Probe(mean, scale, weight.detach().clone(), bias.detach().clone(), penalty, loss), 0
        else:
            worse += 1
        if worse == 3:  # the loss is nearly unimodal in the penalty, and weak penalties are the slow fits
            break
    assert best is not None
    return best
