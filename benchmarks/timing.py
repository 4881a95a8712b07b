"""Time otloss and its peers in turn: medians, spread, and ratios within one run."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.check import difference, tensor
from benchmarks.peers import OURS, PEERS, Peer, Step
from benchmarks.workloads import Workload, split


@dataclass
class Entrant:
    """A peer with the calls that it makes for a workload, ``per_call`` problems in each."""

    peer: Peer
    workload: Workload
    per_call: int
    calls: list[Any] = field(default_factory=list)
    step: Step | None = None
    seconds: list[float] = field(default_factory=list)
    repeats: int = 1

    def prepare(self) -> None:
        """Do everything that is not timed. The first call afterwards may still compile."""
        leaves = self.workload.leaves()
        parts = [leaves] if self.per_call >= self.workload.batch else split(leaves, self.per_call)
        self.calls = [self.peer.native(self.workload, part) for part in parts]
        self.step = self.peer.build(self.workload)

    def run(self) -> tuple[float, list[Any]]:
        """Seconds for the whole batch, as the mean of ``repeats`` runs in a row, and the numbers returned."""
        assert self.step is not None
        gc.collect()
        start = time.perf_counter()
        for _ in range(self.repeats):
            numbers = []
            for leaves in self.calls:
                number, _gradients = self.step(leaves)
                numbers.append(number)
        return (time.perf_counter() - start) / self.repeats, numbers

    def warm_up(self) -> None:
        """Run once without counting it. A run that takes longer than `DEAR` seconds counts, as the only one.

        A peer that compiles makes one call before that, so that the time of compiling never counts.
        """
        assert self.step is not None
        if self.peer.warm_in_full:
            for leaves in self.calls[:1] + self.calls[-1:]:
                self.step(leaves)
        seconds, _ = self.run()
        self.repeats = max(1, min(50, int(SHORT / seconds)))
        self.seconds = [seconds] if seconds > DEAR else []

    def release(self) -> None:
        self.calls, self.step = [], None


DEAR, SHORT, FEWEST = 12.0, 0.02, 5
"""Seconds above which a first run counts, seconds below which a run is repeated, fewest runs of otloss per rival."""

Rival = tuple[Peer, int, int]
"""A peer, the number of its problems, and how many of them are in one call."""


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, extremes, quartiles and the number of runs."""
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    return {
        "runs": len(seconds),
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "q1_s": quartiles[0],
        "q3_s": quartiles[2],
        "max_s": max(seconds),
    }


def alternate(rival: Entrant, ours: Entrant, rounds: int, budget: float) -> None:
    """Make rounds in which each of the two runs once: as many as fit into ``budget`` seconds, and at least one."""
    rival.prepare()
    ours.prepare()
    rival.warm_up()
    ours.warm_up()
    gc.collect()
    gc.freeze()  # so that each collection skips the many objects that compilers have left
    start, dear = time.perf_counter(), bool(rival.seconds)
    for _ in range(rounds):
        ours.seconds.append(ours.run()[0])
        if not dear:
            rival.seconds.append(rival.run()[0])
        if time.perf_counter() - start > budget:
            break
    while len(ours.seconds) < FEWEST:  # after one round beside a slow rival, one disturbed run would be the ratio
        ours.seconds.append(ours.run()[0])
    gc.unfreeze()


def measure(
    workload: Workload,
    rivals: list[Rival],
    rounds: int,
    budget: float,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """One row for otloss, and one for each rival. Beside each rival, otloss runs the same problems in one call.

    The ratio of a row is the rival's median divided by that of otloss in the rounds that the two shared, so that a
    drift of the machine affects both.
    """
    rows: list[dict[str, Any]] = []
    all_ours: list[float] = []
    for peer, problems, per_call in rivals:
        part = workload if problems == workload.batch else workload.part(problems)
        rival, ours = Entrant(peer, part, per_call), Entrant(OURS, part, problems)
        try:
            alternate(rival, ours, rounds, budget)
        except Exception as error:
            say(f"  {peer.name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
            continue
        if problems == workload.batch:
            all_ours += ours.seconds
        row = _row(peer, problems, per_call, rival.seconds)
        row["ratio"] = row["median_s"] / statistics.median(ours.seconds)
        row["ours_beside_s"] = statistics.median(ours.seconds)
        row["number_off"] = _number_off(rival, ours)
        rival.release()
        ours.release()
        rows.append(row)
        say(line(row, workload.batch))
    if not all_ours:
        ours = Entrant(OURS, workload, workload.batch)
        ours.prepare()
        ours.warm_up()
        all_ours = [ours.run()[0] for _ in range(rounds)]
    first = {**_row(OURS, workload.batch, workload.batch, all_ours), "ratio": 1.0}
    say(line(first, workload.batch))
    return [first, *rows]


def _row(peer: Peer, problems: int, per_call: int, seconds: list[float]) -> dict[str, Any]:
    return {
        "name": peer.name,
        "library": peer.library,
        "exact": peer.exact,
        "number": peer.number,
        "problems": problems,
        "problems_per_call": per_call,
        **spread(seconds),
    }


def _number_off(rival: Entrant, ours: Entrant) -> float | None:
    """How far the rival's <T, C> is from that of otloss at full size, after the iterations that are timed."""
    if rival.peer.number != "cost" or rival.seconds[0] > 1:
        return None
    theirs, mine = rival.run()[1], ours.run()[1]
    return max(difference(a, b) for a, b in _same_parts(theirs, tensor(mine[0])))


def _same_parts(parts: list[Any], whole: Any) -> list[tuple[Any, Any]]:
    sizes = [len(tensor(part)) for part in parts]
    return list(zip(parts, whole.split(sizes), strict=True))


def line(row: dict[str, Any], batch: int) -> str:
    """A row for the terminal."""
    where = "" if row["problems"] == batch else f" on {row['problems']} problems"
    if row["problems_per_call"] != row["problems"]:
        where += f" by {row['problems_per_call']}"
    return f"  {row['name'] + where:48s} {row['median_s']:10.4f} s {row['ratio']:8.1f}x   {row['runs']} runs"


def entrants(workload: Workload, peers: tuple[Peer, ...] = PEERS, quick: bool = False) -> list[Rival]:
    """Which peer runs how many problems in calls of which size.

    Where the workload names a chunk, peers run in chunks; on a main workload they also run the whole batch in one call.
    The quick suite takes few peers, in chunks only. A peer that unrolls gets one chunk of the batch there.
    """
    found = []
    for peer in peers:
        if not peer.applies(workload) or peer.skip(workload):
            continue
        whole, chunk = workload.batch, workload.chunk or workload.batch
        if quick and not peer.quick:
            continue
        if quick and "autodiff" in peer.name:
            found.append((peer, chunk, chunk))
            continue
        if peer.streams and not quick:
            chunk = whole
        found.append((peer, whole, chunk))
        if chunk != whole and workload.main and not quick:
            found.append((peer, whole, whole))
    return found
