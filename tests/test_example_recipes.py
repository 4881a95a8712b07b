"""The recipes ``examples/*.py``: each runs, does what it says, and agrees with what it is a recipe of."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest
import torch
from conftest import relative
from torch import Tensor

import otloss
from examples import assignment, dense_cost, matching, ragged, transfer

F64 = torch.float64
RECIPES = sorted(path.stem for path in (Path(__file__).parent.parent / "examples").glob("[a-z]*.py"))


def test_there_are_recipes() -> None:
    assert {"assignment", "dense_cost", "matching", "ragged", "transfer", "with_lightly"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "with_lightly":
        pytest.importorskip("lightly", reason="the example needs otloss[examples]")
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"examples.{name}").main(["--help"])
    assert ended.value.code == 0 and "--seed" in capsys.readouterr().out


# --- matching --------------------------------------------------------------------------------------------------------


def superglue(scores: Tensor, alpha: Tensor, iterations: int) -> Tensor:
    """SuperGlue's optimal transport in the log-domain: log of the assignment, in which a point has mass 1."""
    b, m, n = scores.shape
    couplings = torch.cat(
        [torch.cat([scores, alpha.expand(b, m, 1)], -1), torch.cat([alpha.expand(b, 1, n), alpha.expand(b, 1, 1)], -1)],
        1,
    )
    norm = -torch.tensor(float(m + n), dtype=scores.dtype).log()
    log_mu = torch.cat([norm.expand(m), torch.tensor([float(n)], dtype=scores.dtype).log() + norm])
    log_nu = torch.cat([norm.expand(n), torch.tensor([float(m)], dtype=scores.dtype).log() + norm])
    u, v = torch.zeros(b, m + 1, dtype=scores.dtype), torch.zeros(b, n + 1, dtype=scores.dtype)
    for _ in range(iterations):
        u = log_mu - torch.logsumexp(couplings + v.unsqueeze(1), dim=2)
        v = log_nu - torch.logsumexp(couplings + u.unsqueeze(2), dim=1)
    return couplings + u.unsqueeze(2) + v.unsqueeze(1) - norm


def test_the_dustbin_is_superglues(backend: str) -> None:
    """The assignment at convergence, and the gradient of the loss through SuperGlue's 300 iterations."""
    scores = (2 * torch.randn(3, 7, 5, dtype=F64)).requires_grad_()
    alpha = torch.tensor(0.7, dtype=F64, requires_grad=True)
    known = torch.zeros(8, 6, dtype=torch.bool)
    known[[0, 1, 2, 3, 4, 5, 6, 7], [2, 0, 1, 5, 5, 4, 5, 3]] = True
    out = matching.match(scores, alpha, tol=1e-13, backend=backend)
    got, want = out.log_plan + math.log(7 + 5), superglue(scores, alpha, 300)
    assert (got - want).abs().max() < 1e-10
    mine, theirs = (torch.autograd.grad(-log_p[:, known].sum(), (scores, alpha)) for log_p in (got, want))
    assert all(relative(one, other) < 1e-9 for one, other in zip(mine, theirs, strict=True))
    mass = got.exp()
    assert torch.allclose(mass[:, :-1].sum(-1), torch.ones(3, 7, dtype=F64)) and torch.allclose(
        mass[:, -1].sum(-1), torch.full((3,), 5.0, dtype=F64)
    )


def test_pictures_know_their_matches() -> None:
    left, right, known = matching.pictures(4, 9)
    assert (known[:, :-1].sum(-1) == 1).all() and (known[:, :, :-1].sum(-2) == 1).all() and not known[:, -1, -1].any()
    distance = torch.cdist(left[..., : matching.SIGNAL], right[..., : matching.SIGNAL])
    pairs = known[:, :-1, :-1]
    assert pairs.any() and distance[pairs].max() < distance[~pairs].min()


def test_matching_is_learned(capsys: pytest.CaptureFixture[str]) -> None:
    results = matching.main(["--steps", "80", "--points", "12", "--batch", "8"])
    assert min(results["after"]) > 0.8 > 0.4 > min(results["before"])
    assert "after  training: precision" in capsys.readouterr().out


# --- transfer --------------------------------------------------------------------------------------------------------


def test_colours_are_transferred(tmp_path: Path) -> None:
    """The result has the mean of the target's colours, for every pixel of either side has the same mass."""
    path = tmp_path / "transfer.png"
    result = transfer.main(["--size", "16", "--sample", "256", "--eps", "0.01", "--out", str(path)])
    assert result.shape == (16, 16, 3) and path.stat().st_size > 500
    torch.manual_seed(0)
    source, target = transfer.made_up(16)
    mean = target.flatten(0, 1).mean(0)  # the sample holds all 256 pixels
    # tol 1e-5 is the error of the marginals; colours lie in [0, 1].
    assert (result.flatten(0, 1).mean(0) - mean).abs().max() < 1e-4
    assert (source.flatten(0, 1).mean(0) - mean).abs().max() > 0.1


def test_pictures_of_ones_own(tmp_path: Path) -> None:
    from PIL import Image

    red, blue = tmp_path / "red.png", tmp_path / "blue.png"
    Image.new("RGB", (20, 10), (200, 0, 0)).save(red)
    Image.new("RGB", (8, 12), (0, 0, 255)).save(blue)
    out = tmp_path / "out.png"
    result = transfer.main(["--source", str(red), "--target", str(blue), "--size", "10", "--out", str(out)])
    assert result.shape == (5, 10, 3) and torch.allclose(result, torch.tensor([0.0, 0.0, 1.0]), atol=1e-6)
    with Image.open(out) as image:
        assert image.size == (10 + 7 + 10, 10) and image.getpixel((26, 0)) == (0, 0, 255)


# --- assignment ------------------------------------------------------------------------------------------------------


def swav(scores: Tensor, eps: float, iterations: int) -> Tensor:
    """SwAV's published iteration, in one process."""
    q = torch.exp(scores / eps).T
    q = q / q.sum()
    k, b = q.shape
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / k
        q = q / q.sum(0, keepdim=True) / b
    return (q * b).T


@pytest.mark.parametrize("iterations", [1, 3])
def test_assignments_are_swavs(iterations: int) -> None:
    scores = 2 * torch.rand(40, 6, dtype=F64) - 1
    got = assignment.assign(scores.requires_grad_(), 0.05, iterations)
    assert not got.requires_grad and torch.allclose(got, swav(scores, 0.05, iterations), atol=1e-12)
    assert torch.allclose(got.sum(1), torch.ones(40, dtype=F64))


def test_two_processes_assign_as_one() -> None:
    """An odd batch, so that the processes hold unequal shares. Scores of size 1 over eps 0.05, rounded by 2^-24."""
    alone, shared = assignment.main(["--samples", "101", "--prototypes", "7", "--processes", "2"])
    assert alone.shape == shared.shape == (101, 7)
    assert (alone - shared).abs().max() < 16 * 2**-24 / 0.05


# --- a dense cost ----------------------------------------------------------------------------------------------------


def test_dense_costs(capsys: pytest.CaptureFixture[str]) -> None:
    shares = dense_cost.main(["--steps", "60", "--points", "10", "--batch", "8"])
    assert shares["metric, learned"] > 0.8 > 0.5 > shares["metric, not yet learned"]
    assert min(shares["distance of places"], shares["cosine and distance"]) > 0.8
    assert capsys.readouterr().out.count("of the pairs") == 4


def test_a_learned_metric_has_the_gradient_of_finite_differences() -> None:
    metric = dense_cost.LearnedMetric(3).double()
    x, y = torch.randn(4, 3, dtype=F64), torch.randn(5, 3, dtype=F64)

    def loss(weight: Tensor) -> Tensor:
        cost = torch.func.functional_call(metric, {"weight": weight}, (x, y))
        return otloss.sinkhorn(cost, eps=0.5, tol=1e-13, max_iter=5000).transport_cost

    assert torch.autograd.gradcheck(loss, torch.randn(3, 3, dtype=F64, requires_grad=True))


# --- ragged point clouds ---------------------------------------------------------------------------------------------


def test_an_outlier_is_followed_under_constraints_alone() -> None:
    """Rings reach to 1 from the origin, outliers lie at ``FAR``; mass there costs 16 where leaving it costs about 2."""
    results = ragged.main(["--clouds", "2", "--points", "12", "20"])
    reach = {}
    for name, (points, mask) in results.items():
        assert points.isfinite().all() and not points[~mask].any() and not mask.all()
        reach[name] = points.norm(dim=-1).amax(-1)  # padding stays at the origin
    assert (reach["penalties"] < 1.2).all() and (reach["constraints"] > 2.5).all()


def test_a_cloud_flows_as_it_does_alone() -> None:
    pairs = ragged.rings(3, 5, 12)
    (x, mask_x), (y, mask_y) = map(ragged.pad, zip(*pairs, strict=True))
    together = ragged.flow(x, mask_x, y, mask_y, 1.0, 3)
    for moved, mask, (one, target) in zip(together, mask_x, pairs, strict=True):
        alone = ragged.flow(*(t for cloud in (one, target) for t in ragged.pad([cloud])), 1.0, 3)
        # Both stop at an error of 1e-3 of the masses; a step moves points by a quarter of distances below 5.
        assert (moved[mask] - alone[0]).abs().max() < 3 * 1e-3 * 5


# --- a model of lightly ----------------------------------------------------------------------------------------------


def test_the_transport_term_is_learned_beside_vicreg() -> None:
    pytest.importorskip("lightly", reason="the example needs otloss[examples]")
    from examples import with_lightly

    def costs(weight: str) -> list[float]:
        history = with_lightly.main(["--steps", "6", "--batch", "8", "--weight", weight])
        assert all(math.isfinite(number) for row in history for number in row)
        return [cost for _, cost in history]

    with_term, without = costs("30"), costs("0")
    assert with_term[0] == pytest.approx(without[0]) and with_term[-1] < without[-1]
