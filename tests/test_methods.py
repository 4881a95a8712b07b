"""The table of methods: each trains and goes on bit for bit; and what is special to one."""

from __future__ import annotations

import copy
import dataclasses
import functools
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("pytorch_lightning", reason="the example needs otloss[examples]")
pytest.importorskip("tyro", reason="the example needs otloss[examples]")

from lightly.loss.vicreg_loss import VICRegLoss
from lightly.transforms.gaussian_blur import GaussianBlur
from lightly.transforms.solarize import RandomSolarization
from small_methods import BATCH, batch_of, model_of, tiny
from torchvision.transforms.v2 import ColorJitter, RandomApply
from xray_runs import interrupt_at

import otloss
from examples.optiml.errors import CommandError
from examples.optiml.pretraining.log import read_log
from examples.optiml.pretraining.methods import METHODS, method_class
from examples.optiml.pretraining.methods.momentum import Queue, cosine_momentum
from examples.optiml.pretraining.methods.simclr import nt_xent
from examples.optiml.pretraining.settings import PretrainConfig
from examples.optiml.pretraining.trainer import build, pretrain


@pytest.mark.parametrize("method", METHODS)
def test_trains_and_goes_on_bit_for_bit(
    method: str, few_phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within an epoch; all that a method keeps is in the checkpoint. Other stops: test_pretrain_same_run.py."""
    config = tiny(few_phantoms, tmp_path / "whole", method)
    start = build(config.resolve()).state_dict()
    assert pretrain(config)
    again = dataclasses.replace(config, out=tmp_path / "again")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, functools.partial(signal.raise_signal, signal.SIGINT))
        with pytest.raises(SystemExit):
            pretrain(again)
    assert pretrain(again)
    logs = [[{**row, "seconds": 0} for row in read_log(out / "metrics.csv")] for out in (config.out, again.out)]
    assert logs[0] == logs[1] and len(logs[0]) == 6
    assert len({row["loss"] for row in logs[0]}) == 6 and all(row["std_g"] > 0 for row in logs[0])
    assert logs[0][-1]["lr"] < max(row["lr"] for row in logs[0])
    # The runs' own: they hold the state of loops and optimisers, too.
    whole, other = (torch.load(out / "last.ckpt", weights_only=False) for out in (config.out, again.out))
    weights = whole["state_dict"]
    assert all(torch.equal(weights[name], other["state_dict"][name]) for name in start)
    moved = [name for name in start if not torch.equal(weights[name], start[name])]
    assert {"backbone.conv1.weight", "backbone.layer4.1.conv2.weight"} <= set(moved)
    vicreg = build(tiny(few_phantoms, tmp_path, "vicreg").resolve()).backbone.state_dict()
    assert all(torch.equal(x, start[f"backbone.{name}"]) for name, x in vicreg.items())  # all begin alike
    if method in ("moco", "densecl"):
        assert {"queue.keys", "queue.count", "target_backbone.network.conv1.weight"} <= set(moved)
        assert "target_head.network.layers.0.weight" in moved
    if method == "densecl":
        assert {"dense_queue.keys", "dense_queue.count", "target_dense_head.network.layers.0.weight"} <= set(moved)
    if method == "pcrlv2":
        assert [row["beta"] for row in logs[0]] == pytest.approx([(1 + np.cos(np.pi * k / 6)) / 2 for k in range(6)])
    if method == "byol":
        assert [row["momentum"] for row in logs[0]] == pytest.approx([cosine_momentum(0.99, k / 6) for k in range(6)])
    if method == "simsiam":
        groups = whole["optimizer_states"][0]["param_groups"]
        fixed = [sum(len(g["params"]) for g in groups if g["constant"] is constant) for constant in (True, False)]
        assert fixed[0] == 5 and fixed[1] > 60  # two layers, one norm
        assert all((g["lr"] == config.resolve().optim.lr) == g["constant"] for g in groups)


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_float32_under_mixed_precision_and_targets_get_no_gradient(method: str) -> None:
    model = model_of(method)
    with torch.autocast("cpu", torch.bfloat16):
        out = model.step(*batch_of(method))
    assert all(x.dtype == torch.float32 for x in (out.loss, *out.log.values()))
    model.step(*batch_of(method, 1)).loss.backward()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith("target")}
    idle = {name for name, p in model.named_parameters() if p.grad is None}
    assert frozen == idle or ("find_unused" in model.strategy and all(name.startswith("decoder.") for name in idle))


OFFICIAL = {
    "simclr": ("lars", 0.3 / 4, 1e-6, 10, 0.08),
    "moco": ("sgd", 0.03 / 4, 1e-4, 0, 0.2),
    "densecl": ("sgd", 0.03 / 4, 1e-4, 0, 0.2),
    "byol": ("lars", 0.3 / 4, 1e-6, 10, 0.08),
    "simsiam": ("sgd", 0.05 / 4, 1e-4, 0, 0.2),
    "vicreg": ("lars", 0.2 / 4, 1e-6, 10, 0.08),
    "pcrlv2": ("sgd", 0.01, 1e-4, 0, 0.3),
}


@pytest.mark.parametrize("method", OFFICIAL)
def test_official_presets(method: str, tmp_path: Path) -> None:
    config = PretrainConfig(tmp_path, tmp_path, method, preset="official", batch_size=128).resolve()
    o = config.optim
    optimizer, lr, decay, warmup, scale = OFFICIAL[method]
    assert (o.optimizer, o.weight_decay, o.warmup_epochs) == (optimizer, decay, warmup)
    assert o.lr == pytest.approx(2 * lr) and (o.trust, o.momentum, config.augment.min_scale) == (1e-3, 0.9, scale)
    model = build(config)
    zero = [float(block.bn2.weight.detach().max()) for block in model.backbone.layer3]  # type: ignore[union-attr]
    assert zero == ([0.0, 0.0] if method == "simsiam" else [1.0, 1.0])


@pytest.mark.parametrize("preset", ["official", "recommended"])
@pytest.mark.parametrize("method", OFFICIAL)
def test_a_small_step_lowers_the_loss(method: str, preset: str) -> None:
    """The optimisers of a baseline's presets go downhill by their weight matrices, with the same batch and draws."""
    config = dataclasses.replace(tiny(Path(), Path(), method), preset=preset).resolve()  # type: ignore[arg-type]
    model = build(config).train()
    optimizer = model._optimizer(model._parameter_groups())
    for group in optimizer.param_groups:
        rate = {"adamw": 1e-5, "sgd": 1e-3, "lars": 0.1}[config.optim.optimizer or ""]  # LARS: a 1e-4 of their size
        group["lr"] = rate if group["matrices"] else 0.0
    for number in range(2):  # the first fills the queue
        buffers = {name: x.clone() for name, x in model.named_buffers()}
        torch.manual_seed(number)
        loss = model.step(*batch_of(method, number)).loss
    loss.backward()
    optimizer.step()
    model.load_state_dict(buffers, strict=False)
    torch.manual_seed(1)
    assert 0 != model.step(*batch_of(method, 1)).loss < loss


#: Jitter of brightness and contrast; how often either view is blurred, and how often solarised.
VIEWS = {
    **dict.fromkeys(("optiml", "vicreg", "byol"), (0.4, [1.0, 0.1], [0.0, 0.2])),
    "simclr": (0.8, [0.5, 0.5], []),
    **dict.fromkeys(("moco", "densecl", "simsiam"), (0.4, [0.5, 0.5], [])),
}


@pytest.mark.parametrize("method", VIEWS)
def test_jitter_blur_and_solarisation_are_the_official_ones(method: str) -> None:
    """The two views of VICReg, BYOL and OPTiML differ: one is always blurred, only the other ever solarised."""
    pair = method_class(method).views(32, tiny(Path(), Path(), method).resolve().augment).transforms  # type: ignore[attr-defined]
    parts = [part for view in pair for part in view.transform.transforms]
    jitter = [x for part in parts if isinstance(part, RandomApply) for x in (part.p, *part.transforms)]
    strength, blur, solarise = VIEWS[method]
    assert [x for x in jitter if isinstance(x, float)] == [0.8, 0.8]
    around = [(x.brightness, x.contrast) for x in jitter if isinstance(x, ColorJitter)]
    assert [limit for both in around for x in both for limit in x] == pytest.approx([1 - strength, 1 + strength] * 4)
    assert [part.prob for part in parts if isinstance(part, GaussianBlur)] == blur
    assert [part.prob for part in parts if isinstance(part, RandomSolarization)] == solarise


@pytest.mark.filterwarnings("ignore::otloss.ConvergenceWarning")
@pytest.mark.parametrize("method", METHODS)
def test_images_that_look_alike_show(method: str) -> None:
    """Where all images get one embedding, as after a collapse, the logged deviations are next to nothing."""
    model, views = model_of(method), batch_of(method)
    apart, same = (model.step(*batch).log for batch in (views, [view[:1].expand_as(view) for view in views]))
    assert "std_g" in apart and ("std_q" in apart or method == "pcrlv2")
    for name in {"std_q", "std_g"} & apart.keys():
        assert float(same[name]) < 0.02 * float(apart[name])


@pytest.mark.parametrize("stage", [3, 4])
@pytest.mark.parametrize("dense", [0, 16])
def test_what_is_added_to_optiml(stage: int, dense: int) -> None:
    """The invariance of VICReg; maps of another stage; a dense head with variance and covariance of its own."""
    model = model_of("optiml", stage=stage, dense=dense, invariance=2.0, alpha=3.0, match="position")
    first, second, *_ = batch_of("optiml")
    out = model.step(first, second)
    with torch.no_grad():  # in training mode, so statistics are the batch's here too
        maps, pooled = zip(*((s[stage - 3], s[2]) for s in map(model.backbone.stages, (first, second))), strict=True)
        q = [model.expander(g) for g in pooled]
        z = [m.permute(0, 2, 3, 1).flatten(0, 2) for m in maps]  # a row per image and position
        assert maps[0].shape[1:] == ((256, 2, 2) if stage == 3 else (512, 1, 1))
        extra = torch.tensor(0.0)
        if dense:
            z = [model.dense(x) for x in z]
            extra = sum(25 * otloss.VarianceLoss()(x) + otloss.CovarianceLoss()(x) for x in z)
        z = [x.unflatten(0, (BATCH, -1)).mT.reshape(BATCH, -1, *maps[0].shape[2:]) for x in z]
        printed = model.criterion(*z, *q)
        expected = 3 * printed.ot + 25 * printed.variance + printed.covariance + extra
        expected += 2.0 * (q[0] - q[1]).square().mean()
    assert out.loss.item() == pytest.approx(float(expected), rel=1e-4)
    out.loss.backward()
    assert not dense or all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.dense.parameters())


def test_a_dense_head_that_the_heads_do_not_divide_is_refused() -> None:
    for dense in (-8, 12):
        with pytest.raises(ValueError, match=rf"^dense must be a multiple of heads \(8\), or 0, not {dense}$"):
            model_of("optiml", dense=dense)


def test_adamw_decays_matrices_only() -> None:
    optimizer = (model := model_of("vicreg"))._optimizer(model._parameter_groups())
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["betas"] == (0.9, 0.999)
    decays = {p.ndim > 1: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {True: 1e-4, False: 0.0}


def test_simclr_is_ntxent_over_both_directions() -> None:
    model = model_of("simclr")
    first, second = batch_of("simclr")
    q = torch.cat([model.head(model.backbone(x)[1]) for x in (first, second)]).detach().double()
    cosine = F.cosine_similarity(q[:, None], q[None], dim=2) / 0.1
    losses = []
    for i in range(2 * BATCH):
        others = [j for j in range(2 * BATCH) if j != i]
        losses.append(float(cosine[i, others].logsumexp(0) - cosine[i, (i + BATCH) % (2 * BATCH)]))
    assert float(model.step(first, second).loss) == pytest.approx(np.mean(losses), rel=1e-4)
    assert np.mean(losses[:BATCH]) != pytest.approx(np.mean(losses[BATCH:]), rel=1e-3)
    lightly = pytest.importorskip("lightly.loss").NTXentLoss(0.1)(*q.float().chunk(2))
    assert float(nt_xent(F.normalize(q.float(), dim=1), 0.1)[0]) == pytest.approx(float(lightly), rel=1e-5)


def test_mocos_keys_are_the_momentum_networks_and_the_queue_wraps() -> None:
    model = model_of("moco", momentum=1.0)
    batches = [batch_of("moco", number) for number in range(4)]
    for number, (first, second) in enumerate(batches):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for p in [*other.backbone.parameters(), *other.head.parameters()]:
                p += 0.1 * torch.randn_like(p)
        out, changed = model.step(first, second), other.step(first, second)
        assert out.log["queue"] == min(number + 1, 2) * BATCH and torch.equal(model.queue.keys, other.queue.keys)
        assert (out.loss == 0 and changed.loss == 0) if number == 0 else out.loss != changed.loss
        keys = F.normalize(model.target_head(model.target_backbone(second)[1]), dim=1)
        row = number % 2 * BATCH  # the queue holds two batches
        assert torch.allclose(model.queue.keys[row : row + BATCH], keys, atol=1e-6)
    before = F.normalize(model.target_head(model.target_backbone(batches[2][1])[1]), dim=1)
    assert torch.allclose(model.queue.keys[:BATCH], before, atol=1e-6)
    with pytest.raises(CommandError, match="queue of 20 keys does not divide by --batch-size 8"):
        Queue(20, 4, 8)


def test_byols_target_follows_by_the_scheduled_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("byol", momentum=0.9)
    first, second = batch_of("byol")
    monkeypatch.setattr(model, "done", lambda: 0.25)
    targets = [*model.target_backbone.parameters(), *model.target_projector.parameters()]
    onlines = [*model.backbone.parameters(), *model.projector.parameters()]
    before = [p.clone() for p in targets]
    model.step(first, second)
    assert all(torch.equal(p, b) for p, b in zip(targets, before, strict=True))  # equal ones stay put
    with torch.no_grad():
        for p in onlines:
            p += 0.1 * torch.randn_like(p)
    out = model.step(first, second)
    tau = 1 - 0.1 * (np.cos(np.pi / 4) + 1) / 2
    for target, was, online in zip(targets, before, onlines, strict=True):
        assert torch.allclose(target, tau * was + (1 - tau) * online, rtol=1e-6, atol=1e-7)
    p = [model.predictor(model.projector(model.backbone(x)[1])) for x in (first, second)]
    z = [model.target_projector(model.target_backbone(x)[1]) for x in (second, first)]
    distances = [(F.normalize(p[i], dim=1) - F.normalize(z[i], dim=1)).square().sum(1).mean() for i in (0, 1)]
    assert float(out.loss) == pytest.approx(float(sum(distances)), rel=1e-5)
    assert float(out.log["momentum"]) == pytest.approx(tau)


def test_simsiams_target_is_constant() -> None:
    model = model_of("simsiam", dim=64)
    views = batch_of("simsiam")
    z = [model.projector(model.backbone(x)[1]) for x in views]
    p = [model.predictor(x) for x in z]
    weights = list(model.parameters())
    losses = [
        -sum(F.cosine_similarity(p[i], target[1 - i]).mean() for i in (0, 1)) / 2
        for target in ([x.detach() for x in z], z)
    ]
    constant, through = (torch.autograd.grad(loss, weights, retain_graph=True) for loss in losses)
    out = model.step(*views)
    grads = torch.autograd.grad(out.loss, weights)
    assert all(torch.allclose(g, c, rtol=1e-4, atol=1e-6) for g, c in zip(grads, constant, strict=True))
    assert not all(torch.allclose(g, t, rtol=1e-2, atol=1e-4) for g, t in zip(grads, through, strict=True))
    assert float(out.log["std_q"]) == pytest.approx(64**-0.5, rel=0.2)


def test_vicregs_loss_is_the_official_one() -> None:
    model = model_of("vicreg")
    first, second = batch_of("vicreg")
    q = [model.expander(model.backbone(x)[1]).detach() for x in (first, second)]
    variance, covariance = 0.0, 0.0
    for x in q:
        centred = x - x.mean(0)
        variance += float((1 - (x.var(0) + 1e-4).sqrt()).relu().mean()) / 2
        matrix = centred.T @ centred / (BATCH - 1)
        covariance += float((matrix - matrix.diag().diag()).square().sum()) / x.shape[1]
    expected = 25 * float((q[0] - q[1]).square().mean()) + 25 * variance + covariance
    loss = float(model.step(first, second).loss.detach())
    assert loss == pytest.approx(expected, rel=1e-4) and loss == pytest.approx(float(VICRegLoss()(*q)), rel=1e-4)
