"""What the Triton backend launches, in the interpreter: memory, groups, blocks, bursts, tiles and the benchmark."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from grids import grid
from torch import Tensor
from triton_problems import (
    DTYPES,
    EPS,
    KINDS,
    REGIMES,
    Given,
    check_implicit,
    check_reads_what_is_written,
    check_solve,
    close,
    problem,
    slack,
    upstream,
    wide,
)

import otloss
from benchmarks import gpu_more
from benchmarks.workloads import WORKLOADS
from otloss.backends import reference, triton
from otloss.backends.protocol import Problem, Upstream

if not triton.interpreted():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from otloss.backends.triton import config, launch, solver


def test_the_same_twice(regime: str) -> None:
    given = problem("features", 40, 33, torch.float32)
    one, other = (triton.solve(Problem(*given, EPS), 5, 0.0)[:6] for _ in range(2))
    assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cost_of_features_is_kept(regime: str, dtype: torch.dtype) -> None:
    """In a buffer of the caller, from which the gradient reads it; the results are those without the buffer."""
    given = Problem(*problem("features", 21, 38, dtype, d=48), EPS)
    kept, up = torch.full((2, 21, 38), float("nan"), dtype=dtype), upstream(given.a, given.b)
    with_room, without = (triton.solve(given, 9, 0.0, room) for room in (kept, None))
    close(kept, reference.dense_cost(*wide(given.left, given.right)), slack(dtype))
    got, want = (triton.implicit_gradient(given, *without[:2], up, True, True, room)[0] for room in (kept, None))
    pairs = (*zip(with_room[:6], without[:6], strict=True), *zip(got, want, strict=True))
    if regime == "streamed" and dtype == torch.float32:  # without the buffer every pass makes the cost anew
        for one, other in pairs:
            close(one, other.double(), slack(dtype, room=300.0))
    else:
        assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(("regime", "dtype", "most"), grid(REGIMES, DTYPES, (1, 2, 3)), indirect=["regime"])
def test_groups_of_problems_bound_the_stored_cost(
    regime: str, dtype: torch.dtype, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three problems, ``most`` at a time: no larger cost is made, and the results are those of each alone."""
    left, right, a, b = problem("features", 9, 12, dtype, batch=3)
    made: list[int] = []
    product = launch.DeviceProblem.product

    def noted(self: launch.DeviceProblem, *operands: Any) -> Tensor:
        made.append(self.count)
        return product(self, *operands)

    monkeypatch.setattr(launch.DeviceProblem, "product", noted)
    monkeypatch.setattr(config, "STORED_BYTES", most * 9 * 12 * a.element_size())
    up = upstream(a, b)

    def run(part: slice) -> tuple[Tensor, ...]:
        given = Problem(left[part], right[part], a[part], b[part], EPS)
        solution = triton.solve(given, 6, 0.0)
        some = Upstream(*(x[part] for x in up))
        implicit, residual = triton.implicit_gradient(given, *solution[:2], some, True, True)
        unrolled = triton.unrolled_gradient(given, solution.n_iter, Upstream(*some[:2]), True, 6)
        return (*solution[:6], *implicit, residual, *unrolled)

    got = run(slice(None))
    assert max(made) <= most
    want = [torch.cat(parts) for parts in zip(*(run(slice(k, k + 1)) for k in range(3)), strict=True)]
    for one, other in zip(got, want, strict=True):
        close(one.double(), other.double(), slack(dtype, room=300.0))


def everything(given: Given) -> list[Tensor]:
    """A solution, and both gradients."""
    problem, up = Problem(*given, EPS), upstream(given[2], given[3])
    solution = triton.solve(problem, 3, 0.0)
    f, g, *_, n_iter, _, shift = solution
    implicit, residual = triton.implicit_gradient(problem, f, g, up, True, True, shift=shift)
    unrolled = triton.unrolled_gradient(problem, n_iter, Upstream(up.cost, up.value), True, 3)
    return [*solution[:6], *(shift or ()), *implicit, residual, *unrolled]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_read_before_it_is_written(regime: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(kind, 17, 19, torch.float32)
    check_reads_what_is_written(lambda: everything(given), monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_of_inputs_does_not_matter(regime: str, kind: str) -> None:
    given = [None if t is None else t[:1].expand(2, *t.shape[1:]) for t in problem(kind, 6, 9, torch.float32)]
    strange = [t if t is None or t.dim() < 3 else t.mT.contiguous().mT for t in given]
    results = []
    for inputs in (strange, [None if t is None else t.contiguous() for t in given]):
        torch.manual_seed(1)
        results.append(everything(tuple(inputs)))
    assert all(map(torch.equal, *results))


def test_a_batch_is_divided_evenly_and_the_largest_problem_is_not_stored() -> None:
    assert config.groups(64, 512, 512, False) == 2 and config.groups(33, 512, 512, False) == 2
    assert config.groups(1, 2896, 2896, False) == 1 and config.groups(1, 2897, 2897, False) == 0
    assert config.groups(7, 4096, 4096, True) == 7  # float64: one at a time at least
    assert config.groups(0, 5, 5, False) == 1


def test_blocks_of_rows_have_no_cliff() -> None:
    """One problem more than the processors hold at once does not double the time: waves of programs, times tiles."""

    def time(count: int) -> int:
        blocks, tiles = config.row_blocks(count, 512, 8, 264)
        assert blocks * tiles >= 64 and blocks <= config.BLOCKS
        return -(-count * blocks // 264) * tiles

    assert time(132) == 32 and time(133) < 1.5 * time(132)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_program_takes_several_tiles_of_rows(kind: str, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "LIMITS", REGIMES["medium"])
    monkeypatch.setattr(config, "BLOCKS", blocks)
    assert config.row_blocks(1, 70, 16, 16) == {1: (1, 5), 3: (3, 2)}[blocks]
    given = problem(kind, 70, 20, torch.float32, batch=1)
    check_solve(given, EPS, 4)
    check_implicit(given)


def test_columns_that_no_row_prefers_take_a_launch_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of the second column underflow; it has to be found by half-steps of the row blocks, added."""
    monkeypatch.setattr(config, "LIMITS", REGIMES["medium"])
    launches: list[Any] = []
    made = solver.launch

    def counted(kernel: Any, *rest: Any, **more: Any) -> None:
        launches.append(kernel)
        made(kernel, *rest, **more)

    monkeypatch.setattr(solver, "launch", counted)
    monkeypatch.setattr(solver, "iterate", lambda step, most, running: [step() for _ in range(most) if running.any()])
    cost = torch.rand(1, 40, 5)
    cost[..., 1] += 100
    a, b = torch.full((1, 40), 1 / 40), torch.full((1, 5), 0.2)
    check_solve((cost, None, a, b), EPS, 3, room=16.0 * 50)
    assert len(launches) == 3 + 1 + 1  # iterations, the columns of the first, and the one that sees that they are done


@pytest.mark.parametrize("last", [1, 8, 20, 100])
def test_the_host_looks_one_burst_behind(last: int) -> None:
    """The device is done after ``last`` steps: at most two bursts more are launched, and never more than asked for."""
    running, steps = torch.ones(1), 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps >= last:
            running.zero_()

    launch.iterate(step, 50, running)
    assert min(last, 50) <= steps <= min(last + 2 * launch.BURST, 50)


@pytest.mark.parametrize(("captured", "steps"), [(None, 50), (7, 7), (70, 50)])
def test_a_graph_of_the_caller_holds_a_bounded_number_of_steps(
    captured: int | None, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    made: list[int] = []
    launch.iterate(lambda: made.append(1), 50, on_gpu, captured)
    assert len(made) == steps


def test_columns_split_over_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "LIMITS", REGIMES["large"])
    monkeypatch.setattr(config, "STORED_BYTES", 0)
    given = problem("features", 3, 600, torch.float32, batch=1)
    assert config.splits(1, -(-600 // 64), 8) > 1
    check_solve(given, EPS, 3)
    check_solve(tuple(given[k] for k in (1, 0, 3, 2)), EPS, 3)
    check_implicit(given)


def test_tuning_takes_the_fastest_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles: list[config.Tile] = []

    def timer(run: Callable[[], None]) -> float:
        run()
        tiles.append(config.TUNED[key])
        return {32: 1.0, 64: 2.0, 128: 3.0}[tiles[-1].cols]

    key = config.bucket(70, 90, 5, False)
    monkeypatch.setattr(config, "TUNED", {})
    monkeypatch.setattr(config, "STORED_BYTES", 0)
    monkeypatch.setattr(launch, "timed", timer)
    monkeypatch.setenv("OTLOSS_TRITON_AUTOTUNE", "1")
    check_solve(problem("features", 70, 90, torch.float32), EPS, 2)
    assert config.TUNED[key].cols == 32 and len(config.TUNED) == 1 and len(tiles) == len(set(tiles)) > 2


def test_the_stage_of_tiles_writes_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = replace(WORKLOADS["large"], batch=1, n=70, m=90, d=5, iterations=2)
    monkeypatch.setattr(gpu_more, "MAIN", {"large": workload})
    monkeypatch.setattr(gpu_more, "leaves_on", lambda _, workload: workload.leaves())
    monkeypatch.setattr(config, "STORED_BYTES", 0)
    monkeypatch.setattr(config, "capability", lambda: (9, 0))
    monkeypatch.setattr(launch, "timed", lambda run: float(run() is None))
    path = tmp_path / "tuned.py"
    path.write_text(gpu_more.DEFAULTS.read_text())
    with otloss.use_backend("triton"):
        result = gpu_more.tiles(path)
    written = runpy.run_path(str(path))["TILES"]
    assert set(written) == {(*size, False, (9, 0)) for size in ((128, 128, 16), (128, 128, 0))}
    assert result["complete"] and {row["bucket"]: row["rows"] for row in result["tiles"]} == {
        key: tile[0] for key, tile in written.items()
    }
    assert not config.TUNED


@pytest.mark.parametrize("name", ["positions", "channels-dense", "pot-example"])
def test_the_benchmark_of_a_device(name: str) -> None:
    """What ``benchmarks/gpu_timing.py`` runs on a device, on the CPU: errors of ours, a step of each peer here."""
    from benchmarks import gpu_timing as gpu

    workload = replace(WORKLOADS[name].part(2, 6), d=3, eps=0.5, iterations=5)
    assert max(gpu.errors(workload, "cpu", 20).values()) < 1e-3
    for peer in gpu.ENTRANTS:
        if peer.applies(workload) and not peer.skip(workload) and not peer.warm_in_full and peer is not gpu.OURS:
            numbers, _ = peer.build(workload)(gpu.leaves_on("cpu", workload))
            assert len(numbers) == 2
