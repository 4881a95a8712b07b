"""The stages of ``benchmarks.gpu`` that need a device, as far as they run without one."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_more, gpu_step, gpu_timing
from benchmarks.check import check
from benchmarks.peers import OURS, by_name
from benchmarks.results import load
from benchmarks.workloads import Workload
from otloss.backends.triton import config

SMALL = Workload("small", batch=4, n=9, m=7, d=5, main=True)
PLAIN = by_name("PyTorch, log-domain")


@pytest.mark.parametrize("name", [w.name for w in gpu.rows() if w.dtype == "bfloat16"])
def test_ours_passes_the_check_in_half_precision(name: str) -> None:
    """The truth is that of the rounded inputs; only the gradient is rounded again."""
    workload = next(w for w in gpu.rows() if w.name == name).part(2, 64)
    found = check(workload, ())[OURS.name]
    assert found["number"] < 1e-4 and found["same"]


def _event(key: str, count: int, device: Any = torch.autograd.DeviceType.CUDA) -> Any:
    return SimpleNamespace(key=key, count=count, device_type=device)


def test_launches_are_kernels_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [
        _event("solve_small", 3),
        _event("void at::native::vectorized_elementwise_kernel<4>", 2),
        _event("Memcpy DtoH (Device -> Pinned)", 7),
        _event("Memset (Device)", 11),
        _event("cudaLaunchKernel", 5, torch.autograd.DeviceType.CPU),
    ]

    @contextmanager
    def profile(activities: object) -> Iterator[Any]:
        yield SimpleNamespace(key_averages=lambda: seen)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.profiler, "profile", profile)
    called: list[None] = []
    events = gpu_timing.kernels(lambda: called.append(None))
    assert events == seen[:4] and len(called) == 1
    assert gpu_timing.launches(events) == 5


def test_a_slow_peer_is_timed_once_and_all_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    warm = {OURS.name: 0.25, PLAIN.name: 40.0}
    repeats: dict[str, list[int]] = {name: [] for name in warm}
    names: dict[Any, str] = {}

    def bind(peer: Any, *_: object) -> Any:
        def run() -> None:
            pass

        names[run] = peer.name
        return run

    def event_ms(run: Any, times: int) -> float:
        repeats[names[run]].append(times)
        return 7.0

    monkeypatch.setattr(gpu_timing, "ENTRANTS", (OURS, PLAIN))
    monkeypatch.setattr(gpu_timing, "leaves_on", lambda *_: ())
    monkeypatch.setattr(gpu_timing, "_bind", bind)
    monkeypatch.setattr(gpu_timing, "_first_calls", lambda run: {"cold_s": 1.0, "warm_s": warm[names[run]]})
    monkeypatch.setattr(gpu_timing, "check", lambda *_, device: {name: {"same": True} for name in warm})
    monkeypatch.setattr(gpu_timing, "event_ms", event_ms)
    monkeypatch.setattr(gpu_timing, "kernels", lambda run: [_event("k", len(names[run]))])
    rows = gpu_timing.measure(SMALL, rounds=3, repeats=10)
    assert repeats == {OURS.name: [4, 4, 4], PLAIN.name: [1]}
    assert [(row["median_ms"], row["launches"]) for row in rows] == [(7.0, len(OURS.name)), (7.0, len(PLAIN.name))]


def test_tiles_that_were_found_become_defaults_of_their_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tuned.py"
    path.write_text(gpu_more.DEFAULTS.read_text())
    gpu_more.write_defaults({}, path)
    assert path.read_text() == gpu_more.DEFAULTS.read_text()  # nothing found, nothing changed

    monkeypatch.setattr(config, "capability", lambda: (9, 0))
    key, tile = config.bucket(500, 300, 49, False), config.Tile(32, 128, 16, 4)
    assert key == (512, 512, 64, False, (9, 0)) and config.stream(500, 300, 49, False) != tile
    gpu_more.write_defaults({key: tile, (*key[:-1], None): tile}, path)
    written = runpy.run_path(str(path))["TILES"]
    monkeypatch.setattr(gpu_more.tuned, "TILES", written)
    monkeypatch.setattr(config, "TILES", written)
    assert config.stream(500, 300, 49, False) == tile
    assert config.stream(500, 300, 49, True) != tile
    monkeypatch.setattr(config, "capability", lambda: (10, 0))
    assert config.stream(500, 300, 49, False) != tile

    other = config.bucket(20, 30, 0, False)
    gpu_more.write_defaults({other: tile}, path)
    assert set(runpy.run_path(str(path))["TILES"]) == {key, other}


@pytest.mark.parametrize("match", ["channel", "position"])
def test_a_training_step_and_its_loss_run(match: str) -> None:
    """All ways of a training start alike, so that their losses can be compared."""
    pytest.importorskip("torchvision")
    options: dict[str, Any] = {"match": match, "max_iter": 20, "tol": 1e-2}
    training, other = (gpu_step.Training("cpu", 3, 64, torch.bfloat16, **options) for _ in range(2))
    before = [p.clone() for p in training.trunk.parameters()]
    first = training.step()
    assert torch.equal(first, other.step()) and first.isfinite() and not first.requires_grad
    assert all(not torch.equal(one, p) for one, p in zip(before, training.trunk.parameters(), strict=True))
    alone = gpu_step.Loss("cpu", 3, 64, torch.bfloat16, **options)
    assert torch.equal(alone.step(), alone.step())


@pytest.mark.slow
def test_the_compiled_step_is_the_plain_one() -> None:
    """One graph without breaks; its second loss shows that gradient and update are the same."""
    pytest.importorskip("torchvision")
    options: dict[str, Any] = {"match": "position", "max_iter": 20, "tol": 1e-2}
    plain, other = (gpu_step.Training("cpu", 8, 64, torch.float32, **options) for _ in range(2))
    compiled = other.compiled(backend="aot_eager")
    for _ in range(2):
        assert float(compiled()) == pytest.approx(float(plain.step()), rel=gpu_step.MOST_OFF)


def test_ways_that_fail_or_differ_are_named_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def fails() -> Any:
        raise RuntimeError("no capture")

    def way(name: str, value: float, made: int = 0) -> Any:
        def prepare() -> Any:
            tried.append(name)
            return lambda: torch.tensor(value), made

        return prepare

    ways = {"step": way("step", 2.0), "loss": way("loss", 1.0), "step in a CUDA graph": fails}
    ways |= {"other step": way("other step", 2.5, 3)}
    monkeypatch.setattr(gpu_step, "ways", lambda *_: ways)
    monkeypatch.setattr(gpu_timing, "event_ms", lambda run, repeats: 8.0)
    monkeypatch.setattr(gpu_timing, "kernels", lambda run: [_event("k", 6)])
    path = tmp_path / "6-step.json"
    found = gpu_step.measure(path)
    rows = found["channel"]
    assert not found["complete"] and load(path)["position"].keys() == rows.keys() == ways.keys()
    assert rows["step in a CUDA graph"] == {"failed": "RuntimeError: no capture"}
    assert rows["loss"] == {"value": 1.0, "off": 0.0, "ms": 8.0, "launches": 6, "share": 1.0}
    assert rows["other step"]["off"] == pytest.approx(0.25) and "compute the same" in rows["other step"]["failed"]

    tried.clear()
    ways |= {name: way(name, 2.0) for name in ("step in a CUDA graph", "other step")}
    assert gpu_step.measure(path)["complete"]
    assert set(tried) == {"step in a CUDA graph", "other step"}


def test_a_training_is_measured_in_every_way() -> None:
    names = list(gpu_step.ways("cuda", 2, 64, torch.float32, "channel"))
    assert names[:2] == ["step", "loss"]  # the others are compared with these
    for word in ("compiled", "two streams", "CUDA graph"):
        assert any(word in name and "step" in name for name in names)
