"""Stage 6 of ``benchmarks.gpu``: OPTiML's whole training step, and its loss alone, in every way a training may run it.

A step is forward under bfloat16 autocast, loss, backward and the optimizer's update. Before a way is timed, it is
tried on a small batch in float32. All ways start from the same weights and views there, so that their losses agree
after a few steps; ``off`` says how far a loss is from that of the plain step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import otloss
from benchmarks import gpu_timing
from benchmarks.results import load, save
from benchmarks.step import DIM, EXPANDED, _network

Result = dict[str, Any]
Run = Callable[[], Any]
Way = Callable[[], "tuple[Run, int]"]
"""Makes what runs one step, and says how many steps it has made for that."""
WARM = 3
"""Steps before a graph is captured: they compile kernels and make the optimizer's buffers."""
MOST_OFF = 1e-2
"""Of a loss after ``WARM + 1`` steps in float32, or in TF32 where PyTorch multiplies so."""


class Training:
    """A network, OPTiML's loss and an optimizer, on two views of a batch that stay the same."""

    def __init__(self, device: str, batch: int, pixels: int, precision: torch.dtype, **options: Any) -> None:
        torch.manual_seed(0)
        self.precision = precision
        self.trunk, self.expander = (module.to(device) for module in _network())
        self.criterion = otloss.OPTiMLLoss(DIM, **options).to(device)
        parameters = (p for module in (self.trunk, self.expander, self.criterion) for p in module.parameters())
        self.optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
        self.views = torch.randn(2, batch, 3, pixels, pixels).to(device)

    def loss(self) -> Tensor:
        half = self.precision != torch.float32
        with torch.autocast(self.views.device.type, torch.bfloat16, enabled=half):
            maps = [self.trunk(view) for view in self.views]
            embeddings = [self.expander(z.mean((2, 3))) for z in maps]
            return self.criterion(*maps, *embeddings).loss  # type: ignore[no-any-return]

    def step(self, loss: Callable[[], Tensor] | None = None, update: Run | None = None) -> Tensor:
        """One step with this loss and this update of the weights, by default its own; returns the loss before it."""
        self.optimizer.zero_grad(set_to_none=True)
        value = (loss or self.loss)()
        value.backward()
        (update or self.optimizer.step)()
        return value.detach()

    def compiled(self, **options: Any) -> Callable[[], Tensor]:
        """The step with network and loss in one compiled graph, and the update in another."""
        loss, update = torch.compile(self.loss, fullgraph=True, **options), torch.compile(self.optimizer.step)
        return lambda: self.step(loss, update)


class Loss:
    """The loss and its gradients by maps and embeddings in the precision of the network."""

    def __init__(self, device: str, batch: int, pixels: int, precision: torch.dtype, **options: Any) -> None:
        torch.manual_seed(0)
        self.criterion = otloss.OPTiMLLoss(DIM, **options).to(device)
        shapes = 2 * [(batch, DIM, pixels // 32, pixels // 32)] + 2 * [(batch, EXPANDED)]
        self.leaves = [torch.randn(shape).to(device, precision).requires_grad_() for shape in shapes]

    def step(self) -> Tensor:
        value: Tensor = self.criterion(*self.leaves).loss
        torch.autograd.grad(value, self.leaves)
        return value.detach()


def beside(runs: list[Callable[[], Tensor]]) -> Callable[[], Tensor]:
    """All of them at once, each on a stream of its own; returns the mean of what they return."""
    streams = [torch.cuda.Stream() for _ in runs]

    def run() -> Tensor:
        main, results = torch.cuda.current_stream(), []
        for stream in streams:
            stream.wait_stream(main)
        for stream, each in zip(streams, runs, strict=True):
            with torch.cuda.stream(stream):
                results.append(each())
        for stream in streams:
            main.wait_stream(stream)
        return torch.stack(results).mean()

    return run


def captured(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``run`` in a CUDA graph, after ``WARM`` runs on a side stream, as PyTorch asks for; each call replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = run()

    def replay() -> Tensor:
        graph.replay()
        return value

    return replay


def ways(device: str, batch: int, pixels: int, precision: torch.dtype, match: str) -> dict[str, Way]:
    """What is measured, by name. The first two are what the others are compared with; graphs come last."""

    def make(kind: type[Training | Loss], **options: Any) -> Any:
        return kind(device, batch, pixels, precision, match=match, **options)

    def of_two(kind: type[Training | Loss]) -> tuple[Run, int]:
        return beside([make(kind).step, make(kind).step]), 0

    found: dict[str, Way] = {
        "step": lambda: (make(Training).step, 0),
        "loss": lambda: (make(Loss).step, 0),
        "two steps on two streams": lambda: of_two(Training),
        "two losses on two streams": lambda: of_two(Loss),
        "loss in a CUDA graph": lambda: (captured(make(Loss).step), WARM),
        "step in a CUDA graph": lambda: (captured(make(Training).step), WARM),
        "step in a CUDA graph, max_iter 100": lambda: (captured(make(Training, max_iter=100).step), WARM),
    }
    if match == "channel":  # compiling takes a minute or more
        found["compiled step"] = lambda: (make(Training).compiled(), 0)
        found["compiled step, reduce-overhead"] = lambda: (make(Training).compiled(mode="reduce-overhead"), 0)
    return found


def measure(path: Path, batch: int = 64, pixels: int = 224, repeats: int = 5) -> Result:
    """Milliseconds and launches of each way, matching channels and positions; written after each.

    One that fails is named, and the others run. A second run tries it again, and what is missing.
    """
    result: Result = load(path)
    for match in ("channel", "position"):
        small, large = ways("cuda", 8, 64, torch.float32, match), ways("cuda", batch, pixels, torch.bfloat16, match)
        rows = result.setdefault(match, {})
        for name in large:
            if "ms" in rows.get(name, {}):
                continue
            try:
                rows[name] = {"value": _value(*small[name]())[0]}
                plain = rows["loss" if "loss" in name else "step"]["value"]
                rows[name]["off"] = abs(rows[name]["value"] / plain - 1)
                if not rows[name]["off"] <= MOST_OFF:
                    raise ArithmeticError("it does not compute the same")
                run = _value(*large[name]())[1]
                rows[name]["ms"] = gpu_timing.event_ms(run, repeats)
                rows[name]["launches"] = gpu_timing.launches(gpu_timing.kernels(run))
            except Exception as error:
                rows[name] = {**rows.get(name, {}), "failed": f"{type(error).__name__}: {str(error)[:300]}"}
            save(path, result)
            print(f"  {match}, {name}: {rows[name]}", flush=True)
        if "ms" in rows["step"] and "ms" in rows["loss"]:
            rows["loss"]["share"] = rows["loss"]["ms"] / rows["step"]["ms"]
    every = [row for match in ("channel", "position") for row in result[match].values()]
    return result | {"complete": all("failed" not in row for row in every)}


def _value(run: Run, made: int) -> tuple[float, Run]:
    """The loss of step ``WARM + 1``, of which so many were made, and what runs one more."""
    for _ in range(made, WARM + 1):
        value = run()
    return float(value), run
