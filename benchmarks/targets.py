"""The speeds that the cpu backend is to reach on two cores, and whether the results reach them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

POT, OTT, ANY = "POT log_sinkhorn, autodiff", "OTT-JAX", "any peer"

SPEEDUPS: dict[str, dict[str, float]] = {
    "channels": {POT: 300, OTT: 15, ANY: 8},
    "tokens": {POT: 150, OTT: 12, ANY: 8},
    "positions": {POT: 60, OTT: 10, ANY: 8},
    "tiny": {POT: 30, OTT: 5, ANY: 3},
    "large": {POT: 100, OTT: 5, ANY: 2},
}
"""How many times as fast forward and backward are to be as POT's unrolled log-domain solver, as OTT-JAX's best mode,
and as the fastest peer in any mode, also in one whose gradient is not that of the sharp cost."""

ITERATION_SHARE, PRODUCTS_SHARE, THREADS_SPEEDUP = 0.65, 0.65, 1.8
CALL_US, STEP_SHARE = 150.0, 0.05


@dataclass(frozen=True)
class Verdict:
    """One target: what is wanted, and what was found (None: not measured)."""

    name: str
    wanted: float
    found: float | None
    least: bool = True
    who: str = ""

    @property
    def met(self) -> bool | None:
        if self.found is None:
            return None
        return self.found >= self.wanted if self.least else self.found <= self.wanted


def speedups(name: str, entry: dict[str, Any]) -> list[Verdict]:
    """The three speed-ups of a main workload, from its rows.

    POT counts with the whole batch in one call. OTT-JAX and "any" count with their fastest row, in chunks or whole.
    """
    rows = [row for row in entry["times"] if row["library"] != "otloss"]
    pot = [row for row in rows if row["name"] == POT]
    whole = [row for row in pot if row["problems_per_call"] == entry["workload"]["batch"]]
    groups = {POT: whole, OTT: [row for row in rows if row["library"] == OTT], ANY: rows}
    verdicts = []
    for group, wanted in SPEEDUPS[name].items():
        best = min(groups[group], key=lambda row: row["ratio"], default=None)
        found, who = (None, "") if best is None else (best["ratio"], best["name"])
        verdicts.append(Verdict(group, wanted, found, who=who))
    return verdicts


def limits(entry: dict[str, Any]) -> list[Verdict]:
    """Shares of the machine's limits and the gain of threads, of one workload."""
    wanted = {
        "iteration_share": ITERATION_SHARE,
        "products_share": PRODUCTS_SHARE,
        "threads_speedup": THREADS_SPEEDUP,
    }
    return [Verdict(name, least, entry.get(name)) for name, least in wanted.items()]


def others(results: dict[str, Any]) -> list[Verdict]:
    """The fixed cost of a call, and the share of a training step."""
    extra = results.get("limits", {}).get("call", {}).get("extra_us")
    share = results.get("step", {}).get("optiml", {}).get("channel", {}).get("share")
    return [
        Verdict("µs of a call beyond plain operations", CALL_US, extra, least=False),
        Verdict("share of an OPTiML step", STEP_SHARE, share, least=False),
    ]
