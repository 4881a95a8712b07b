"""The C++ kernels in company: threads, batches, callers and forks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from cpu_problems import DTYPES, ODD_SIZES, everything, features, needs_cpu, unsteady

from otloss.backends import cpu, processors
from otloss.backends.protocol import Problem, Upstream

pytestmark = needs_cpu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m", "d"), ODD_SIZES)
def test_bit_for_bit_whatever_the_batch_and_the_threads(n: int, m: int, d: int, dtype: torch.dtype) -> None:
    assert unsteady(n, m, d, dtype) == []


@needs_cpu
def test_a_large_problem_is_split_the_same_way_by_any_threads() -> None:
    """Alone it is spread over the threads, in a batch it stays on one: the same bits."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, y, a, b = normal(2, 1030, 5), normal(2, 1100, 5), normal(2, 1030).softmax(-1), normal(2, 1100).softmax(-1)

    def run(count: int, threads: int) -> tuple[torch.Tensor, ...]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            problem = Problem(x[:count], y[:count], a[:count], b[:count], 0.05)
            solved, fast = cpu.solve(problem, 10, 0.0), cpu.solve(problem, 20, 1e-9, None, True)
            upstream = Upstream(torch.ones(count))
            gradients, residual = cpu.implicit_gradient(problem, solved.f, solved.g, upstream, True, True)
            return (*solved[:6], *fast[:6], *gradients, residual)
        finally:
            torch.set_num_threads(before)

    alone = run(2, 1)
    for count, threads in ((2, 2), (2, 5), (1, 1), (1, 3)):
        for got, want in zip(run(count, threads), alone, strict=True):
            assert torch.equal(got, want[:count])


def test_called_from_several_threads() -> None:
    problem = features(70, 90, torch.float32, batch=12, d=20)
    want, results = everything(*problem), []
    workers = [threading.Thread(target=lambda: results.append(everything(*problem))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(results) == 4
    assert all(torch.equal(p, q) for result in results for p, q in zip(result, want, strict=True))


FORKED = """
import os, torch
from otloss.backends import cpu
from otloss.backends.protocol import Problem
torch.set_num_threads(2)
x, a = torch.randn(16, 90, 20), torch.full((16, 90), 1 / 90)
problem = Problem(x, x, a, a, 0.1)
want = cpu.solve(problem, 30, 0.0)
child = os.fork()
if child == 0:
    got = cpu.solve(problem, 30, 0.0)
    os._exit(0 if all(map(torch.equal, got[:6], want[:6])) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
cpu.solve(problem, 30, 0.0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_works_in_a_forked_child() -> None:
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=60)


AS_PYTORCH_SAYS = """
import os, time, torch
from torch.utils.data import DataLoader, Dataset
from otloss.backends import cpu
from otloss.backends.protocol import Problem

# In lanes, one problem for each thread, one problem on all threads; made here, on PyTorch's only thread.
SHAPES = (64, 49), (30, 150), (1, 1200)
PROBLEMS = [Problem(torch.rand(k, n, n), None, *[torch.full((k, n), 1 / n)] * 2, 0.1) for k, n in SHAPES]

def running():
    return len(os.listdir("/proc/self/task"))

def started():
    "How many threads calls of the kernels start."
    before = running()
    for problem in PROBLEMS:
        cpu.solve(problem, 20, 0.0)
    return running() - before

class Seen(Dataset):
    def __len__(self):
        return 2
    def __getitem__(self, index):
        return torch.tensor([torch.get_num_threads(), started()])

def main():
    processors, cpu.PROCESSORS = cpu.PROCESSORS, 64
    assert torch.get_num_threads() == 1, "OMP_NUM_THREADS"
    assert started() == 0
    alone, begun = running(), time.monotonic()
    for context in "fork", "spawn":
        for seen in DataLoader(Seen(), num_workers=2, batch_size=None, multiprocessing_context=context):
            assert seen.tolist() == [1, 0], (context, seen)
    while running() > alone and time.monotonic() < begun + 60:
        time.sleep(0.01)  # threads of the loaders' queues end a little later
    for threads, more in (3, 2), (3, 0), (2, 0), (4, 1):
        torch.set_num_threads(threads)
        assert started() == more, threads
    for seen in DataLoader(Seen(), num_workers=2, batch_size=None, multiprocessing_context="fork"):
        assert seen.tolist() == [1, 0], seen  # the parent has threads, which a forked child has not
    cpu.PROCESSORS = processors
    torch.set_num_threads(processors + 9)
    assert started() <= max(0, processors - 4)  # no more than fit on the processors

    time.sleep(0.1)
    before = time.process_time()  # of all threads
    time.sleep(0.5)
    spent = time.process_time() - before
    assert spent < 0.05, f"idle threads took {spent} s"

if __name__ == "__main__":
    main()
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux lists them")
def test_as_many_threads_as_pytorch_has_and_idle_ones_cost_nothing(tmp_path: Path) -> None:
    """By OMP_NUM_THREADS, by set_num_threads and in workers of data loaders, which have one."""
    script = tmp_path / "as_pytorch_says.py"  # which a worker that is spawned reads again
    script.write_text(AS_PYTORCH_SAYS)
    path = str(Path(__file__).resolve().parent.parent)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    subprocess.run([sys.executable, str(script)], check=True, timeout=120, env=environment)


@pytest.mark.parametrize(
    ("groups", "files", "want"),
    [
        ("0::/\n", {"cpu.max": "max 100000"}, 8),
        ("0::/\n", {"cpu.max": "250000 100000"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, 1),
        ("4:memory:/m\n3:cpu:/c\n", {"cpu/c/cpu.cfs_quota_us": "200000", "cpu/c/cpu.cfs_period_us": "100000"}, 2),
        ("3:cpu,cpuacct:/c\n0::/c\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        (None, {}, 8),
    ],
)
def test_processors_of_a_control_group(
    groups: str | None, files: dict[str, str], want: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    if groups is not None:
        (tmp_path / "cgroup").write_text(groups)
    for name, text in files.items():
        (tmp_path / "mounted" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mounted" / name).write_text(text + "\n")
    assert processors.available(tmp_path / "cgroup", tmp_path / "mounted") == want
