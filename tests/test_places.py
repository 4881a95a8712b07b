"""OPTiML's transport between positions whose places on the film are known, and the plan as weights of an invariance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("pytorch_lightning", reason="the example needs otloss[examples]")
pytest.importorskip("tyro", reason="the example needs otloss[examples]")

from PIL import Image
from small_methods import batch_of, model_of, tiny

import otloss
from examples.optiml.pretraining.methods.optiml import OPTiML
from examples.optiml.pretraining.methods.places import PlacedViews, centres, shared
from examples.optiml.pretraining.settings import AugmentConfig
from examples.optiml.pretraining.views import seeded, two_views

LEFT, RIGHT, ALL = ([0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0])
MIRRORED = [1.0, 0.0, 0.0, 1.0]


def film() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60), dtype=np.uint8))


@pytest.mark.parametrize("scale", [0.08, 0.6])
def test_the_views_are_those_of_the_pair(scale: float) -> None:
    pair = two_views(32, AugmentConfig(scale))
    for seed in range(20):
        with seeded(seed):
            expected = pair(film())
        with seeded(seed):
            first, second, *places = PlacedViews(pair)(film())
        assert torch.equal(first, expected[0]) and torch.equal(second, expected[1])
        assert [place.shape for place in places] == [(4,), (4,)]
        for left, top, right, bottom in torch.stack(places).tolist():
            assert 0 <= top < bottom <= 1 and 0 <= min(left, right) < max(left, right) <= 1


def test_a_place_says_where_the_view_is_from() -> None:
    """Of a film whose grey values are its columns' numbers, the view's ends show the ends of its place."""
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (200, 1)))
    pair, mirrored = two_views(50, AugmentConfig(0.3)), 0
    for view in pair.transforms:  # type: ignore[attr-defined]
        del view.transform.transforms[2:-2]  # all that changes grey values; what is left makes a tensor and normalises
    for seed in range(20):
        with seeded(seed):
            *views, first, second = PlacedViews(pair)(ramp)
        for view, (left, _, right, _) in zip(views, (first.tolist(), second.tolist()), strict=True):
            columns = (view[0].mean(0) * 0.229 + 0.485) * 255
            assert (columns[0] / 200, columns[-1] / 200) == pytest.approx((left, right), abs=0.03)
            mirrored += left > right
    assert 5 < mirrored < 35


def test_centres_and_what_is_shared_by_hand() -> None:
    places = torch.tensor([LEFT, MIRRORED])
    assert centres(places, 2, 2).tolist() == [
        [[0.125, 0.25], [0.375, 0.25], [0.125, 0.75], [0.375, 0.75]],
        [[0.75, 0.25], [0.25, 0.25], [0.75, 0.75], [0.25, 0.75]],
    ]
    other = torch.tensor([[0.25, 0.0, 1.0, 0.5], LEFT])
    whole, quarter = torch.tensor([ALL]), torch.tensor([[0.0, 0.0, 0.5, 0.5]])
    for found, expected in (
        (shared(places, other, 2, 2), [[0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0]]),
        (shared(other, places, 1, 3), [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]),
        (shared(whole, quarter, 1, 3), [[0.5, 0.25, 0.0]]),
    ):
        torch.testing.assert_close(found, torch.tensor(expected))


def test_mass_lies_where_both_views_show_the_film() -> None:
    model = model_of("optiml", marginals="overlap", match="position", eps=0.01, max_iter=2000, stage=3)
    assert isinstance(model, OPTiML)
    z = torch.randn(1, 256, 2, 2)
    of_halves = model.transport(z, z, torch.tensor([ALL]), torch.tensor([LEFT]))  # two of four positions, and all four
    assert float(of_halves["perplexity"]) == pytest.approx((2 + 4) / 2)
    assert float(of_halves["converged"]) == 1
    nothing = model.transport(z, z, torch.tensor([LEFT]), torch.tensor([RIGHT]))  # equal masses
    assert float(nothing["perplexity"]) == pytest.approx(4) and float(nothing["ot"]) == pytest.approx(0, abs=1e-4)


def test_what_is_far_on_the_film_is_not_matched() -> None:
    """The second view is the first one mirrored. Its features say that a position stayed, its places where it went."""
    z, places = torch.randn(1, 256, 2, 2), (torch.tensor([ALL]), torch.tensor([MIRRORED]))
    options = {"marginals": "uniform", "match": "position", "eps": 0.01, "max_iter": 2000, "stage": 3}
    by_features, by_places = (model_of("optiml", near=near, **options, objective="matched") for near in (0.0, 50.0))
    assert float(by_features.transport(z, z, *places)["ot"]) == pytest.approx(0, abs=1e-4)
    mirrored = (z - z.flip(3)).square().mean()
    assert float(by_places.transport(z, z, *places)["ot"]) == pytest.approx(float(mirrored), rel=1e-3)
    assert float(by_places.transport(z, z.flip(3), *places)["ot"]) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("gradient", ["implicit", "none"])
@pytest.mark.parametrize("objective", ["matched", "transport_cost", "value"])
def test_the_objective_and_its_gradient(objective: str, gradient: str) -> None:
    """By the public functions on the whole cost; the gradient goes through the plan only where that is asked for."""
    if (objective, gradient) == ("value", "none"):
        pytest.skip("the value's gradient is that of a constant plan anyway")
    options = {"objective": objective, "match": "position", "gradient": gradient, "eps": 0.05, "max_iter": 2000}
    model = model_of("optiml", **options, marginals="overlap", near=2.0, stage=3, alpha=3.0)
    z_s, z_t = torch.randn(2, 256, 3, 3, requires_grad=True), torch.randn(2, 256, 3, 3)
    places = [torch.tensor([ALL, LEFT]), torch.tensor([[0.3, 0.1, 0.9, 0.8], [0.8, 0.0, 0.1, 0.9]])]
    found = model.transport(z_s, z_t, *places)["ot"]
    (slope,) = torch.autograd.grad(found, z_s)
    x, y = z_s.flatten(2).mT, z_t.flatten(2).mT
    distances = torch.cdist(*(centres(place, 3, 3) for place in places)).square()
    masses = [shared(*pair, 3, 3) for pair in (places, places[::-1])]
    a, b = (mass / mass.sum(1, keepdim=True) for mass in masses)
    cost = otloss.cosine_cost(x, y) + 2 * distances
    out = otloss.sinkhorn(cost, a, b, eps=0.05, max_iter=2000)
    plan = out.plan if gradient == "implicit" else out.plan.detach()
    square = torch.cdist(x, y).square() / 256
    whole = {"matched": (plan * square).sum() / 2, "transport_cost": (plan * cost).sum() / 2, "value": out.value.mean()}
    expected = whole[objective]
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert torch.allclose(slope, torch.autograd.grad(expected, z_s)[0], atol=1e-6)


def test_it_is_part_of_the_loss() -> None:
    options = {"objective": "matched", "marginals": "overlap", "match": "position", "near": 1.0, "alpha": 3.0}
    out = model_of("optiml", **options, stage=3, max_iter=2000).step(*batch_of("optiml"))
    parts = {name: float(value) for name, value in out.log.items()}
    total = 3 * parts["ot"] + 25 * parts["variance"] + parts["covariance"] + 25 * parts["invariance"]
    assert out.loss.item() == pytest.approx(total, rel=1e-5) and parts["ot"] != parts["transport_cost"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"near": 1.0}, "near is for match position"),
        ({"marginals": "overlap"}, "marginals overlap is for match position"),
        ({"near": -1.0, "match": "position"}, "near must be 0 or more, not -1.0"),
        ({"near": 1.0, "match": "position", "marginals": "hardest"}, "near takes marginals uniform or overlap, "),
        ({"objective": "matched"}, "objective matched takes marginals uniform or overlap, "),
        ({"objective": "matched", "marginals": "uniform", "gradient": "unroll"}, "objective matched takes marginals"),
        ({"marginals": "overlap", "match": "position", "objective": "divergence"}, "marginals overlap takes marginals"),
        (
            {"marginals": "overlap", "match": "position", "objective": "value", "gradient": "none"},
            "marginals overlap takes marginals",
        ),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        model_of("optiml", **change)


def test_a_run_without_it_is_the_run_that_it_was() -> None:
    plain, near = (tiny(Path(), Path(), "optiml", marginals="uniform", match="position", near=x) for x in (0.0, 1.0))
    assert "near" not in json.dumps(plain.identity()) and near.identity()["options"]["near"] == 1
