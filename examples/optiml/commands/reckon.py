"""What a pretraining takes, before anybody has run it: operations, memory and views of a step, and hours.

Operations are counted and memory is added up on a small batch. The CPU time of the views is measured here, and the time
of a step if asked. Hours follow from a device's rate and from the share of it that training reaches, which is an
assumption.
"""

from __future__ import annotations

import dataclasses
import time
from fractions import Fraction
from math import prod
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

from ..atomic import write_json
from ..markdown import markdown_table
from ..pretraining.methods import method_class
from ..pretraining.methods.base import Method
from ..pretraining.network import FEATURE_DIM, STRIDES
from ..pretraining.settings import PretrainConfig
from ..pretraining.trainer import build, store_size
from ..pretraining.views import Views, seeded
from ..provenance import provenance
from .settings import ReckonConfig

#: Numbers of films on which a step is counted. With queues they must be powers of 2.
COUNTS = (2, 4, 8)
#: Dense bfloat16 operations a second by the makers' data sheets.
DEVICES = {"A100": 312e12, "H100 SXM": 989e12}
#: Share of that rate which training is assumed to reach, by the number of devices that share a batch of 64: a ResNet18
#: is mostly bound by memory, and a small share of a batch leaves a device waiting.
EFFICIENCY = {1: 0.10, 8: 0.05}
#: Operations of a Sinkhorn update for each entry of the cost: subtract, scale, exponential, sum.
PER_ENTRY = 4


def reckon(config: ReckonConfig) -> dict[str, Any]:
    """All figures, for JSON. Operations are those of convolutions and matrix products; a multiply-add counts as two."""
    run = config.pretraining().resolve()
    counted = {count: _of_a_step(run, count) for count in COUNTS}
    flops = at_batch({count: of["flops"] for count, of in counted.items()}, config.batch_size)
    kept = {count: of["kept"] for count, of in counted.items()}
    weights = counted[COUNTS[0]]["weights"]
    seconds, runs = _view_seconds(run), []
    for films in config.films:
        steps = films // config.batch_size * config.epochs
        total = steps * flops
        hours = {
            name: {str(devices): total / (devices * rate * share) / 3600 for devices, share in EFFICIENCY.items()}
            for name, rate in DEVICES.items()
        }
        views = steps * config.batch_size * seconds / 3600
        runs.append({"films": films, "steps": steps, "flops": total, "hours": hours, "view_hours": views})
    return {
        "options": {name: value for name, value in dataclasses.asdict(config).items() if name != "out"},
        "counted": {str(count): of for count, of in counted.items()},
        "flops_per_step": flops,
        "transport_operations_per_step": config.batch_size * _transport(run),
        "bytes": {str(devices): weights + at_batch(kept, config.batch_size // devices) for devices in EFFICIENCY},
        "view_seconds_per_image": seconds,
        "step_seconds": _step_seconds(run, config.steps),
        "efficiency": {str(devices): share for devices, share in EFFICIENCY.items()},
        "devices": DEVICES,
        "runs": runs,
        **provenance(),
    }


def at_batch(counted: dict[int, int], batch: int) -> int:
    """The value at a batch size of what has been counted at three others, and grows with the batch or its square."""
    total = Fraction(0)
    for count, value in counted.items():
        others = [other for other in counted if other != count]
        total += value * prod((Fraction(batch - other, count - other) for other in others), start=Fraction(1))
    return round(total)


def _of_a_step(config: PretrainConfig, count: int) -> dict[str, int]:
    """Operations of a step on ``count`` films, bytes that its forward pass keeps, and bytes that are always there."""
    model = build(dataclasses.replace(config, batch_size=count)).train()
    views, kept = _batch(config, count), dict[int, int]()
    always = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in always:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    half = config.precision != "32-true"
    with FlopCounterMode(display=False) as counter:
        # What is kept is alive until the backward pass, so that no two of these addresses are one.
        with saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model.step(*views).loss
        loss.backward()
    return {"flops": counter.get_total_flops(), "kept": sum(kept.values()), "weights": _weights(model)}


def _weights(model: Method) -> int:
    """Bytes of weights and buffers, of gradients, and of what the optimiser keeps."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = model._optimizer(model._parameter_groups())
    optimizer.step()  # allocates its state
    state = (x for of_one in optimizer.state.values() for x in of_one.values() if isinstance(x, Tensor))
    tensors = (*model.parameters(), *model.buffers(), *trained, *state)
    return sum(x.numel() * x.element_size() for x in tensors)


def _views(config: PretrainConfig) -> tuple[Views, Image.Image]:
    """The method's views, and a film to make them of."""
    side = store_size(config.image_size)
    film = np.random.default_rng(0).integers(0, 256, (side, side), dtype=np.uint8)
    return method_class(config.method).views(config.image_size, config.augment), Image.fromarray(film)


def _batch(config: PretrainConfig, count: int) -> list[Tensor]:
    views, film = _views(config)
    with seeded(0):
        return list(default_collate([tuple(views(film)) for _ in range(count)]))


def _view_seconds(config: PretrainConfig, rounds: int = 9, films: int = 10) -> float:
    """CPU time of one film's views in one thread, as a worker process makes them; without reading the film."""
    views, film = _views(config)
    times, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    with seeded(0):
        for _ in range(rounds):
            started = time.process_time()
            for _ in range(films):
                views(film)
            times.append((time.process_time() - started) / films)
    torch.set_num_threads(threads)
    return median(times)


def _step_seconds(config: PretrainConfig, steps: int) -> float | None:
    """Median time of a step here, after one that does not count, without making its views; None for no steps."""
    if not steps:
        return None
    model, half, times = build(config).train(), config.precision != "32-true", list[float]()
    optimizer, views = model._optimizer(model._parameter_groups()), _batch(config, config.batch_size)
    for _ in range(steps + 1):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model.step(*views).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - started)
    return median(times[1:])


def _transport(config: PretrainConfig) -> int:
    """At most so many operations of the Sinkhorn iterations for an image; 0 for a method that has none."""
    if config.method != "optiml":
        return 0
    o = config.options.optiml
    per_stage = {4: (FEATURE_DIM, STRIDES[config.stem]), 3: (FEATURE_DIM // 2, STRIDES[config.stem] // 2)}
    channels, stride = per_stage[o.stage]
    points = o.dense or channels if o.match == "channel" else (-(-config.image_size // stride)) ** 2
    return 2 * PER_ENTRY * o.max_iter * points**2


def summary(found: dict[str, Any]) -> str:
    """The figures as a table in Markdown, and two lines about what it leaves out."""
    counts = list(found["efficiency"])
    head = ["films", "steps", "operations", *(f"{count} {name}" for name in found["devices"] for count in counts)]
    rows = []
    for run in found["runs"]:
        hours = [_hours(run["hours"][name][count]) for name in found["devices"] for count in counts]
        sizes = [f"{run['films']:,}", f"{run['steps']:,}", f"{run['flops']:.1e}"]
        rows.append([*sizes, *hours, _hours(run["view_hours"])])
    view, processor = 1000 * found["view_seconds_per_image"], found["made"]["processor"]
    where = {count: "one GPU" if count == "1" else f"each of {count}" for count in counts}
    memory = " and ".join(f"{found['bytes'][count] / 2**30:.1f} GiB on {where[count]}" for count in counts)
    transport = found["transport_operations_per_step"] / found["flops_per_step"]
    lines = [
        *markdown_table([*head, "CPU time of views"], rows, align="right"),
        "",
        f"* A step has {found['flops_per_step']:.3g} operations. The Sinkhorn iterations are not among them: at most "
        f"{transport:.0%} more, but not in matrix products.",
        f"* The views of a film take {view:.1f} ms of one core of an {processor}, without reading the film.",
        f"* Weights, optimiser and what the backward pass needs: {memory}, without workspaces.",
    ]
    if taken := found.get("step_seconds"):  # which figures of earlier versions do not have
        threads = found["made"]["threads"]
        lines.append(f"* A step takes {taken:.3g} s here, without its views; number of threads: {threads}.")
    return "\n".join(lines)


def _hours(x: float) -> str:
    return f"{x:.2g} h" if x < 10 else f"{x:.0f} h"


def main(config: ReckonConfig) -> None:
    """The ``reckon`` command."""
    console, found = Console(), reckon(config)
    console.print(summary(found), markup=False, highlight=False, soft_wrap=True)
    if config.out:
        write_json(config.out, found)
        console.print(f"Figures: {config.out}")
