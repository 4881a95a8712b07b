"""The page ``docs/names.md``: the rows of POT and geomloss name the same numbers."""

from __future__ import annotations

import geomloss
import numpy as np
import ot
import pytest
import torch
from torch import Tensor

from otloss import FeatureSinkhornLoss, SinkhornLoss, barycentric, sinkhorn, sqeuclidean_cost

REG, BLUR = 0.1, 0.3
TIGHT = {"stopThr": 1e-13, "numItermax": 10_000}


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = torch.rand(9, 2, dtype=torch.double), torch.rand(7, 2, dtype=torch.double)
    return x, y, torch.randn(9, dtype=torch.double).softmax(-1), torch.randn(7, dtype=torch.double).softmax(-1)


def test_pot(problem: tuple[Tensor, ...]) -> None:
    x, y, a, b = problem
    cost = sqeuclidean_cost(x, y)
    there = tuple(t.numpy() for t in (a, b, cost))
    out = sinkhorn(cost, a, b, eps=REG, tol=1e-12, max_iter=10_000)
    assert np.allclose(ot.dist(x.numpy(), y.numpy()), cost, atol=1e-14)
    assert np.allclose(ot.sinkhorn(*there, REG, **TIGHT), out.plan, atol=1e-11)
    assert float(ot.sinkhorn2(*there, REG, **TIGHT)) == pytest.approx(float(out.transport_cost), abs=1e-11)
    solved = ot.solve(there[2], there[0], there[1], reg=REG, reg_type="KL", tol=1e-13, max_iter=10_000)
    assert solved.value_linear == pytest.approx(float(out.transport_cost), abs=1e-11)
    assert solved.value == pytest.approx(float(out.value), abs=1e-11)
    domain = ot.da.SinkhornTransport(reg_e=REG, norm=None, tol=1e-13, max_iter=10_000).fit(Xs=x.numpy(), Xt=y.numpy())
    mapped = barycentric(sinkhorn(cost, eps=REG, tol=1e-12, max_iter=10_000), y)
    assert np.allclose(domain.transform(Xs=x.numpy()), mapped, atol=1e-10)


def geomloss_peer(scaling: float, **options: float) -> geomloss.SamplesLoss:
    """Its number of iterations is set by ``scaling``: as that tends to 1, its error falls in proportion to the rest."""
    return geomloss.SamplesLoss("sinkhorn", p=2, blur=BLUR, scaling=scaling, backend="tensorized", **options)


@pytest.mark.parametrize("debias", [False, True])
def test_geomloss(debias: bool, problem: tuple[Tensor, ...]) -> None:
    x, y, a, b = problem
    within = {"cost_xx": sqeuclidean_cost(x, x), "cost_yy": sqeuclidean_cost(y, y)} if debias else {}
    loss = SinkhornLoss(2 * BLUR**2, "divergence" if debias else "value", tol=1e-12, max_iter=10_000)
    here = loss(sqeuclidean_cost(x, y), a, b, **within) / 2
    far, near = (abs(float(geomloss_peer(s, debias=debias)(a, x, b, y) - here)) for s in (0.99, 0.999))
    assert near < far / 3 and near < 1e-4 * float(here)


def test_unbalanced_divergence_of_geomloss(problem: tuple[Tensor, ...]) -> None:
    x, y, a, b = problem
    rho = 2 * 0.8**2
    options = {"objective": "divergence", "rho_a": rho, "rho_b": rho, "tol": 1e-12, "max_iter": 10_000}
    here = FeatureSinkhornLoss("sqeuclidean", 2 * BLUR**2, **options)(x, y, 3 * a, b) / 2
    peers = (geomloss_peer(scaling, debias=True, reach=0.8) for scaling in (0.99, 0.999))
    far, near = (abs(float(peer(3 * a, x, b, y) - here)) for peer in peers)
    assert near < far / 3 and near < 1e-4 * float(here)


def test_potentials_of_geomloss(problem: tuple[Tensor, ...]) -> None:
    x, y, a, b = problem
    out = sinkhorn(sqeuclidean_cost(x, y), a, b, eps=2 * BLUR**2, tol=1e-12, max_iter=10_000)
    errors = []
    for scaling in (0.99, 0.999):
        f, _ = geomloss_peer(scaling, debias=False, potentials=True)(a, x, b, y)
        constant = f.flatten() - out.f / 2
        errors.append(float(constant.max() - constant.min()))
    assert errors[1] < errors[0] / 3 and errors[1] < 1e-2 * float(out.f.max() - out.f.min())
