"""Every method in two processes on CPU: the gradients of one process, and runs that go on bit for bit."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("pytorch_lightning", reason="the example needs otloss[examples]")
pytest.importorskip("tyro", reason="the example needs otloss[examples]")

from small_methods import BATCH, batch_of, model_of, tiny
from torch import Tensor, nn
from xray_runs import in_two_processes

from examples.optiml.pretraining.methods import METHODS
from examples.optiml.pretraining.trainer import build, pretrain

#: What two processes must agree on: every method, and OPTiML with all that can be added to it.
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    **{method: (method, {}) for method in METHODS},
    "local": ("optiml", {"dense": 16, "stage": 3, "match": "position", "marginals": "hardest"}),
}

#: Methods that keep more than weights from step to step: queues and targets, and a target that follows a schedule.
WITH_STATE = ("densecl", "byol")


def two_steps(method: str, rank: int = 0, size: int = 1, **special: object) -> dict[str, Tensor]:
    """Gradients of the second step, and the buffers after it; of several processes each takes its share.

    Weights stay as they are, since training would amplify rounding; targets start elsewhere, and so have to follow.
    """
    model = model_of(method, norm="group", **special)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0 if p.requires_grad else 0.01 * torch.randn_like(p)
    model.forward = lambda *views: model.step(*views).loss  # type: ignore[method-assign]
    loss: nn.Module = model
    if size > 1:
        loss = nn.parallel.DistributedDataParallel(model, find_unused_parameters="find_unused" in model.strategy)
    share = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    for number in range(2):
        model.zero_grad()
        loss(*(view[share] for view in batch_of(method, number))).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**grads, **{f"buffer {name}": x.clone() for name, x in model.named_buffers()}}


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    """Under DistributedDataParallel on CPU: negatives, targets and queues are those of the whole batch."""
    in_two_processes(__file__, "gradients", str(tmp_path))
    for name, two in torch.load(tmp_path / "two.pt", weights_only=True).items():
        method, special = VARIANTS[name]
        one = two_steps(method, **special)
        assert one.keys() == two.keys()
        for buffers in (False, True):
            keys = [key for key in one if key.startswith("buffer") is buffers]
            if keys:
                a, b = (torch.cat([x[key].flatten().double() for key in keys]) for x in (one, two))
                assert (a - b).norm() <= 1e-5 * a.norm() and a.norm() > 0, (name, float((a - b).norm() / a.norm()))


def test_two_processes_go_on_bit_for_bit(few_phantoms: Path, tmp_path: Path) -> None:
    """Queues, targets and schedules are in the checkpoint of a run that has several processes."""
    in_two_processes(__file__, "runs", str(tmp_path), str(few_phantoms))
    for method in WITH_STATE:
        last = (tmp_path / f"{method}-{kind}" / "last.ckpt" for kind in ("whole", "again"))
        # The runs' own: they hold the state of loops and optimisers, too.
        whole, again = (torch.load(path, weights_only=False) for path in last)
        start = build(tiny(few_phantoms, tmp_path, method, norm="group").resolve()).state_dict()
        assert whole["global_step"] == again["global_step"] == 6
        assert all(torch.equal(x, again["state_dict"][name]) for name, x in whole["state_dict"].items()), method
        assert not torch.equal(whole["state_dict"]["backbone.conv1.weight"], start["backbone.conv1.weight"]), method


def main(task: str, out: Path, data: Path = Path()) -> None:
    """One of two processes: gradients of all methods, or whole runs of them and ones that stop and go on."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if task == "gradients":
        found = {name: two_steps(method, rank, 2, **special) for name, (method, special) in VARIANTS.items()}
        if rank == 0:
            torch.save(found, out / "two.pt")
        dist.barrier()
    else:
        for method in WITH_STATE:
            assert pretrain(tiny(data, out / f"{method}-whole", method, norm="group"))
            again = tiny(data, out / f"{method}-again", method, norm="group")
            assert pretrain(dataclasses.replace(again, stop_after=1)) is None
            assert pretrain(again)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
