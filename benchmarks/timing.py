"""Ours and the peers timed in turn: medians and spread, ratios within one run."""

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
    """A peer with the calls that it makes for ``problems`` problems, ``per_call`` at a time."""

    peer: Peer
    workload: Workload
    per_call: int
    calls: list[Any] = field(default_factory=list)
    step: Step | None = None
    seconds: list[float] = field(default_factory=list)
    repeats: int = 1

    def prepare(self) -> None:
        """Everything that is not timed. Ends at a state in which the first call may still compile."""
        leaves = self.workload.leaves()
        parts = [leaves] if self.per_call >= self.workload.batch else split(leaves, self.per_call)
        self.calls = [self.peer.native(self.workload, part) for part in parts]
        self.step = self.peer.build(self.workload)

    def run(self) -> tuple[float, list[Any]]:
        """Seconds for the whole batch, the mean of ``repeats`` in a row, and the numbers returned."""
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
        """One run that does not count, or counts as the only one when it takes longer than `DEAR` seconds.

        A peer that compiles makes one call first, so that compiling never counts.
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
"""Seconds above which a first run counts, and below which a run is repeated; fewest runs of ours beside a rival."""

Rival = tuple[Peer, int, int]
"""Who, of how many problems, how many a call."""


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
    """Rounds in which each of the two runs once, as many as fit into ``budget`` seconds, at least one."""
    rival.prepare()
    ours.prepare()
    rival.warm_up()
    ours.warm_up()
    gc.collect()
    gc.freeze()  # what compilers leave behind is not to be walked through before each run
    start, dear = time.perf_counter(), bool(rival.seconds)
    for _ in range(rounds):
        ours.seconds.append(ours.run()[0])
        if not dear:
            rival.seconds.append(rival.run()[0])
        if time.perf_counter() - start > budget:
            break
    while len(ours.seconds) < FEWEST:  # beside a slow rival, else one disturbed run of ours would be the ratio
        ours.seconds.append(ours.run()[0])
    gc.unfreeze()


def measure(
    workload: Workload,
    rivals: list[Rival],
    rounds: int,
    budget: float,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """One row for ours and for each ``(peer, problems, problems a call)``; ours runs the same problems in one call.

    A row's ratio is its median over ours' median in the rounds that the two shared, so that drift meets both.
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
    """How far the rival's <T, C> is from ours at full size, after the iterations that are timed."""
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
    """Who runs what: in chunks where the workload names a size; a main workload also whole.

    The quick suite takes few peers, in chunks only, and those that unroll on one chunk of the batch only.
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
        found.append((peer, whole, chunk))
        if chunk != whole and workload.main and not quick:
            found.append((peer, whole, whole))
    return found
