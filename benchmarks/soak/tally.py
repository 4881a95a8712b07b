"""What the soak test has counted, and its report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks import results
from benchmarks.machine import environment
from benchmarks.soak.checks import Verdict
from benchmarks.soak.settings import Setting

RESULTS, PAGE = (results.FOLDER / name for name in ("soak.json", "soak.md"))


@dataclass
class Tally:
    """Counts over all problems of a seed."""

    seed: int
    problems: int = 0
    groups: int = 0
    seconds: float = 0.0
    states: dict[str, int] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Problems by what the setting says, see `Setting.tags`."""
    compared: dict[str, dict[str, int]] = field(default_factory=dict)
    """Numbers that were compared, by dtype and name."""
    loose: dict[str, dict[str, int]] = field(default_factory=dict)
    """Of those, where the bound is above a tenth of the number."""
    worst: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """The largest error over its bound, and the problem."""
    failures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, s: Setting, verdicts: list[Verdict]) -> None:
        """Count a group."""
        self.problems, self.groups = self.problems + s.count, self.groups + 1
        for tag, value in s.tags().items():
            _count(self.counts.setdefault(tag, {}), value, s.count)
        for verdict in verdicts:
            _count(self.states, verdict.state)
            for name, ratio in verdict.ratios.items():
                _count(self.compared.setdefault(s.dtype, {}), name)
                worst = self.worst.setdefault(s.dtype, {}).setdefault(name, {"ratio": -1.0})
                if ratio > worst["ratio"]:
                    worst |= {"ratio": ratio, "problem": verdict.problem}
            for name in verdict.loose:
                _count(self.loose.setdefault(s.dtype, {}), name)
            if verdict.failures:
                self.failures.append({"problem": verdict.problem, "found": verdict.failures, "setting": asdict(s)})

    def save(self) -> None:
        """Write both files."""
        results.save(RESULTS, asdict(self) | {"environment": environment()})
        PAGE.write_text(page(results.load(RESULTS)))


def load(seed: int) -> Tally:
    """What a stopped run has counted; nothing if there was none of this seed."""
    known = results.load(RESULTS)
    if known.get("seed") != seed:
        return Tally(seed)
    known.pop("environment")
    return Tally(**known)


def _count(counts: dict[str, int], name: str, number: int = 1) -> None:
    counts[name] = counts.get(name, 0) + number


def page(found: dict[str, Any]) -> str:
    """The report."""
    machine, problems = found["environment"], found["problems"]
    states = found["states"]
    loose = sum(sum(names.values()) for names in found["loose"].values())
    numbers = sum(sum(names.values()) for names in found["compared"].values())
    lines = [
        "# Soak test",
        "",
        "Written by `python -m benchmarks.soak`; the numbers are in `soak.json`. Random problems over the whole API, "
        "on the cpu backend against the reference backend in float64, outputs and gradients, each within a bound that "
        "follows from how the problem reacts to rounding and to the error that `tol` leaves "
        f"(`benchmarks/soak/bounds.py`). {machine['cpu']}, kernels {machine['level']}, "
        f"torch {machine['versions']['torch']}, commit {machine['commit']}, {machine['date'][:10]}.",
        "",
        f"{problems:,} problems of seed {found['seed']} in {found['seconds'] / 60:.0f} minutes: "
        f"**{len(found['failures'])} beyond a bound**. {numbers:,} numbers were compared. "
        f"{states.get('not converged', 0):,} problems ({_share(states.get('not converged', 0), problems)}) did not "
        f"converge, and said so; of {states.get('no truth', 0):,} the reference did not converge to 1e-12 either, so "
        "that they were not compared. Of "
        f"{states.get('warned of', 0):,} a gradient is beyond its bound, of which the call warns. "
        f"{_share(loose, numbers)} of the bounds are above a tenth of the largest entry: "
        "these problems are too ill-conditioned for the comparison to say much.",
        "",
        "## Largest error over its bound",
        "",
        "| | " + " | ".join(f"{dtype} | problem | compared | loose" for dtype in found["worst"]) + " |",
        "|---" * (1 + 4 * len(found["worst"])) + "|",
    ]
    for name in sorted({name for names in found["worst"].values() for name in names}):
        cells = [f"`{name}`"]
        for dtype, names in found["worst"].items():
            if name not in names:
                cells += ["", "", "", ""]
                continue
            few = found["loose"].get(dtype, {}).get(name, 0)
            count = found["compared"][dtype][name]
            cells += [f"{names[name]['ratio']:.2g}", names[name].get("problem", ""), f"{count:,}", _share(few, count)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "`python -m benchmarks.soak --only SEED:NUMBER` makes a problem again and shows all its numbers.", ""]
    lines += ["## What the problems are", "", "| | problems |", "|---|---|"]
    for tag, values in found["counts"].items():
        shown = ", ".join(f"{value} {count:,}" for value, count in sorted(values.items(), key=lambda item: -item[1]))
        lines.append(f"| {tag} | {shown} |")
    lines += ["", "## Beyond a bound", ""]
    lines += [f"* {failure['problem']}: {'; '.join(failure['found'])}" for failure in found["failures"]] or ["None."]
    return "\n".join(lines) + "\n"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.2g} %"
