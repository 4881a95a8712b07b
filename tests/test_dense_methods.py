"""The baselines that look at maps. DenseCL: correspondence, keys, queues. PCRLv2: views, scales, reconstruction."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("pytorch_lightning", reason="the example needs otloss[examples]")
pytest.importorskip("tyro", reason="the example needs otloss[examples]")

from PIL import Image
from small_methods import batch_of, model_of, tiny
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate, normalize

from examples.optiml.pretraining.methods import method_class
from examples.optiml.pretraining.methods.base import Method
from examples.optiml.pretraining.methods.crops import GlobalAndLocal
from examples.optiml.pretraining.methods.densecl import corresponding
from examples.optiml.pretraining.methods.momentum import contrast
from examples.optiml.pretraining.methods.pcrlv2 import PCRLv2, _agreement
from examples.optiml.pretraining.views import seeded

# --- DenseCL -------------------------------------------------------------------------------------------------


def test_correspondence_finds_where_positions_went() -> None:
    queries, order = torch.randn(3, 9, 32), torch.stack([torch.randperm(9) for _ in range(3)])
    keys = torch.empty_like(queries).scatter_(1, order[..., None].expand_as(queries), queries)
    lengths = torch.rand(3, 9, 1) + 0.1  # by cosine, not by product
    assert torch.equal(corresponding(queries, keys * lengths), order)


def test_the_dense_loss_takes_the_keys_of_matching_positions() -> None:
    """A second view that is the first one mirrored: its maps are those of the first with their columns reversed."""
    model, grid = model_of("densecl", dense=1.0), torch.randn(8, 512, 2, 2).relu()
    maps = iter([grid, grid.flip(3)])
    for network in (model.backbone, model.target_backbone):
        network.forward = lambda _: (x := next(maps), x.mean((2, 3)))  # type: ignore[method-assign]
    negatives = normalize(torch.randn(8, 16), dim=1)
    model.queue.put(negatives)
    model.dense_queue.put(negatives)
    out = model.step(torch.zeros(()), torch.zeros(()))
    # Both heads begin alike, so that the key of a query's own position is the query.
    q = normalize(model.dense_head(grid.flatten(2).transpose(1, 2)), dim=2).flatten(0, 1)
    assert out.loss.item() == pytest.approx(contrast(q, q, negatives, 0.2)[0].item(), rel=1e-5)
    assert out.log["matched"] == 1


def test_keys_come_from_the_momentum_network_and_one_per_image_is_queued() -> None:
    model, (first, second) = model_of("densecl", momentum=1.0), torch.randn(2, 8, 3, 64, 64)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in [*other.backbone.parameters(), *other.head.parameters(), *other.dense_head.parameters()]:
            p += 0.1 * torch.randn_like(p)
    model.step(first, second)
    other.step(first, second)
    maps, pooled = model.target_backbone(second)
    assert maps.shape[2:] == (2, 2)
    key = normalize(model.target_head(pooled), dim=1)
    mean_key = normalize(model.target_dense_head(maps.permute(0, 2, 3, 1)).mean((1, 2)), dim=1)
    for queue, wanted in (("queue", key), ("dense_queue", mean_key)):
        keys = getattr(model, queue).filled()
        assert keys.shape == (8, 16) and torch.allclose(keys, wanted, atol=1e-6)
        assert torch.equal(keys, getattr(other, queue).filled())  # whatever the online network is
    assert model.step(first, second).log["dense"] != other.step(first, second).log["dense"]


def test_without_its_dense_part_it_is_moco() -> None:
    mine, moco = model_of("densecl", dense=0.0), model_of("moco")
    for own, theirs in ((mine.head, moco.head), (mine.target_head.network, moco.target_head.network)):
        own.load_state_dict(theirs.state_dict())
    for number in range(3):
        one, other = (model.step(*batch_of("moco", number)).loss for model in (mine, moco))
        assert one.item() == other.item() and (one > 0 or number == 0)


# --- PCRLv2 --------------------------------------------------------------------------------------------------


def test_the_target_is_the_first_view_before_its_grey_values_change(monkeypatch: pytest.MonkeyPatch) -> None:
    film = Image.fromarray(np.full((96, 96), 255, np.uint8))
    views = method_class("pcrlv2").views(96, tiny(Path(), Path(), "pcrlv2").resolve().augment)
    with seeded(3):
        first, second, target, *local = views(film)
    assert [x.shape for x in (first, second, target)] == [(3, 96, 96)] * 3
    assert [x.shape for x in local] == [(3, 41, 41)] * 6
    # On a white film with black corners only a hole has ImageNet's mean.
    assert [bool((x == 0).any()) for x in (first, second, target)] == [True, True, False]
    assert not any((x == 0).any() for x in local)
    for name in ("change", "cutout"):
        monkeypatch.setattr(views, name, lambda x: x)
    with seeded(3):
        plain, other, same, *_ = views(film)
    assert torch.equal(plain, target) and torch.equal(same, target) and not torch.equal(other, target)


def test_cutout_is_a_seventh_of_the_image() -> None:
    views = GlobalAndLocal(224, tiny(Path(), Path(), "pcrlv2").resolve().augment)
    cut = torch.stack([views.cutout(torch.ones(3, 224, 224), holes=1) for _ in range(50)])
    height, width = ((cut[:, 0] == 0).any(dim).sum(1) for dim in (2, 1))
    assert height.max() == width.max() == 32 and height.min() >= 16 and width.min() >= 16
    assert torch.equal((cut == 0).sum((1, 2, 3)), 3 * height * width)


def test_no_gradient_through_the_embedding_that_is_predicted() -> None:
    x, p, y, q = (torch.randn(4, 8, requires_grad=True) for _ in range(4))
    _agreement((x, p), (y, q)).backward()
    assert x.grad is None and y.grad is None and p.grad is not None and q.grad is not None
    assert _agreement((x, y), (y, x)).item() == pytest.approx(-1)


def drawing(monkeypatch: pytest.MonkeyPatch, scales: list[int], done: float = 0.0) -> Method:
    model = model_of("pcrlv2")
    monkeypatch.setattr(model, "scales", lambda count: scales[:count])
    monkeypatch.setattr(model, "done", lambda: done)
    return model


@pytest.mark.parametrize(("done", "beta"), [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)])
def test_only_heads_of_the_drawn_scales_are_trained(monkeypatch: pytest.MonkeyPatch, done: float, beta: float) -> None:
    model = drawing(monkeypatch, [1, *[3, 1] * 6], done)
    out = model.step(*batch_of("pcrlv2"))
    parts = {name: value.item() for name, value in out.log.items()}
    assert parts["beta"] == pytest.approx(beta, abs=1e-7)
    total = parts["reconstruction"] + beta * parts["reconstruction_scale"] + parts["pair"] + parts["local"]
    assert out.loss.item() == pytest.approx(total, rel=1e-6)
    out.loss.backward()
    for k, block in enumerate(model.decoder.blocks):
        assert all(p.grad.any() for p in block.convs.parameters() if p.ndim == 4)
        for name, scales in (("predictor", (1, 3)), ("norm", (1, 3)), ("supervision", (1,))):
            grads = [p.grad for p in block.get_submodule(name).parameters()]
            assert all((g is not None) == (k in scales) for g in grads), (k, name)
            assert k not in scales or any(g.any() for g in grads) == (name != "supervision" or beta > 0), (k, name)


def test_each_local_view_is_compared_with_both_global_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 40 pixels, which 32 does not divide: the reconstruction is brought to the target's size."""
    scales = [0, *torch.randint(5, (12,)).tolist()]
    model = drawing(monkeypatch, scales)
    x: list[Tensor] = [torch.randn(4, 3, 40, 40) for _ in range(3)] + [torch.randn(4, 3, 17, 17) for _ in range(6)]
    out = model.step(*x)
    maps = [model.decoder(model.backbone(views)[0]) for views in (x[0], x[1], torch.cat(x[3:]))]
    expected = []
    for i in range(6):
        for g in (0, 1):
            k = scales[1 + 2 * i + g]
            whole, own = (model.decoder.blocks[k].embed(maps[view][k]) for view in (g, 2))
            (a, p), (b, q) = whole, (rows[4 * i : 4 * i + 4] for rows in own)
            expected += [-cosine_similarity(p, b).mean().item(), -cosine_similarity(q, a).mean().item()]
    assert out.log["local"].item() == pytest.approx(np.mean(expected), rel=1e-4, abs=1e-6)
    image = interpolate(model.decoder.head(maps[0][4]), (40, 40), mode="bilinear")
    assert out.log["reconstruction"].item() == pytest.approx((image - x[2]).square().mean().item(), rel=1e-4)


def test_scales_follow_the_step_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the global generators, which differ between processes."""
    model, steps, draws = model_of("pcrlv2"), iter([0, 0, 1]), []
    monkeypatch.setattr(PCRLv2, "global_step", property(lambda _: next(steps)))
    for seed in range(3):
        torch.manual_seed(seed)
        draws.append(model.scales(500))
    assert draws[0] == draws[1] != draws[2] and set(draws[0]) == {0, 1, 2, 3, 4}
