"""The checks of one group of problems, and what they find."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch

import otloss
from benchmarks.soak.bounds import compare
from benchmarks.soak.calls import Run, run
from benchmarks.soak.problems import Tensors, tensors
from benchmarks.soak.settings import Setting
from benchmarks.soak.truth import in_float64, truth

DRAWS, MORE_DRAWS = 2, 16
"""Of rounding, for all problems and again for each that is above its bound: a draw may miss what is sensitive."""
LOOSE = 0.1
"""A bound above this share of the largest entry says little."""


@dataclass
class Verdict:
    """What was found of one problem."""

    problem: str
    state: str = "compared"
    """Or "not converged"; "no truth", where the reference has not; "warned of", where a gradient is known to be off."""
    ratios: dict[str, float] = field(default_factory=dict)
    """Error over bound."""
    loose: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def check(s: Setting) -> list[Verdict]:
    """The verdicts of all problems of a group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", otloss.ConvergenceWarning)
        t = tensors(s)
        try:
            found = _check(s, t)
        except Exception as error:  # of whatever kind: the problem is to be found
            if s.count == 1:
                return [Verdict(f"{s.seed}:{s.first}", "raised", failures=[f"{type(error).__name__}: {error}"])]
            found = [verdict for place in range(s.count) for verdict in check(s.alone(place))]
            if not any(verdict.failures for verdict in found):
                found[0].failures.append(f"raises in its group alone: {type(error).__name__}: {error}")
            return found
        if s.count > 1 and s.group % 4 == 0 and is_steady(s):
            place = s.group // 4 % s.count
            found[place].failures += changed_alone(s, t, place)
        return found


def _check(s: Setting, t: Tensors) -> list[Verdict]:
    got, exact = run(s, t, "cpu"), in_float64(t)
    steps = got.ends[0].n_iter if s.gradient == "unroll" else None
    known = truth(s, exact, steps=steps)
    verdicts = [Verdict(f"{s.seed}:{s.first + place}") for place in range(s.count)]
    places = list(range(s.count))
    if steps is None:
        solved = torch.stack([end.converged for end in known.ends]).all(0)
        places = solved.nonzero().flatten().tolist()
        for place in (~solved).nonzero().flatten().tolist():
            verdicts[place].state = "no truth"
        if not places:
            return verdicts
        if len(places) < s.count:  # the others would take long each time
            exact, got = {name: x[solved] for name, x in exact.items()}, got.of(solved)
            known = truth(s, exact)
    rng = torch.Generator().manual_seed(s.first)
    found = compare(s, exact, got, known, steps, DRAWS, rng)
    for row, place in enumerate(places):
        verdict = verdicts[place]
        numbers = {name: tuple(float(x[row]) for x in three) for name, three in found.items()}
        if steps is None and not all(bool(end.converged[row]) for end in got.ends):
            verdict.state = "not converged"
            numbers = {name: numbers[name] for name in ("where nothing may go", "marginal_error") if name in numbers}
            needed = sweeps_of_reference(s, t, place) if s.solver == "auto" else s.max_iter
            if 2 * needed < s.max_iter:
                verdict.failures.append(f"does not converge in {s.max_iter} sweeps; the reference does in {needed}")
        elif not all(error <= bound for error, bound, _ in numbers.values()):
            numbers = again(s, t, got.of(slice(row, row + 1)), place)
            beyond = [name for name, (error, bound, _) in numbers.items() if not error <= bound]
            if any(name.startswith("by ") for name in beyond) and is_warned_of(s, t, place):
                verdict.state = "warned of"
                numbers = {name: three for name, three in numbers.items() if not name.startswith("by ")}
        judge(verdict, numbers)
    return verdicts


def sweeps_of_reference(s: Setting, t: Tensors, place: int) -> int:
    """How many sweeps the reference needs for one problem of a group, in float64; its limit if they do not do."""
    mine = in_float64({name: x[place : place + 1] for name, x in t.items()})
    ends = run(s.alone(place), mine, "reference").ends
    return max(int(end.n_iter) if bool(end.converged) else s.max_iter for end in ends)


def again(s: Setting, t: Tensors, one: Run, place: int) -> dict[str, Any]:
    """Error, bound and size of one problem of a group, by many draws; ``one`` is its own run."""
    alone, mine = s.alone(place), {name: x[place : place + 1] for name, x in t.items()}
    exact = in_float64(mine)
    steps = one.ends[0].n_iter if s.gradient == "unroll" else None
    rng = torch.Generator().manual_seed(alone.first)
    found = compare(alone, exact, one, truth(alone, exact, steps=steps), steps, MORE_DRAWS, rng)
    return {name: tuple(float(x) for x in three) for name, three in found.items()}


def is_warned_of(s: Setting, t: Tensors, place: int) -> bool:
    """Whether the call says of this problem that the linear system of its gradient was left inaccurate."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        run(s.alone(place), {name: x[place : place + 1] for name, x in t.items()}, "cpu")
    return any("linear system" in str(warning.message) for warning in given)


def judge(verdict: Verdict, numbers: dict[str, Any]) -> None:
    """Ratios, loose bounds and failures from error, bound and size."""
    for name, (error, bound, size) in numbers.items():
        verdict.ratios[name] = error / bound if bound > 0 else (torch.inf if error > 0 else 0.0)
        if bound > LOOSE * size and size > 0:
            verdict.loose.append(name)
        if not error <= bound:
            verdict.failures.append(f"{name}: error {error:.3g}, bound {bound:.3g}, largest entry {size:.3g}")


def is_steady(s: Setting) -> bool:
    """Whether kernels alone make the problem's numbers, so that they have the same bits in every batch."""
    plain = not (s.relaxed or s.partial or s.tensor_eps or s.masked or s.divergence)
    return plain and s.output in ("transport_cost", "value")


def changed_alone(s: Setting, t: Tensors, place: int) -> list[str]:
    """Which numbers of a problem have other bits when it is solved by itself."""
    mine = {name: x[place : place + 1].clone() for name, x in t.items()}
    group, alone = run(s, t, "cpu").of(slice(place, place + 1)), run(s.alone(place), mine, "cpu")
    by_kernels = [name for name in group.found if name not in ("plan", "log_plan", "f", "g")]
    numbers = [(name, group.found[name], alone.found[name]) for name in by_kernels]
    numbers += [(name, getattr(group.ends[0], name), getattr(alone.ends[0], name)) for name in ("error", "n_iter")]
    return [f"{name} has other bits alone than in its group" for name, x, y in numbers if not torch.equal(x, y)]


def only(s: Setting, place: int) -> tuple[Verdict, dict[str, Any]]:
    """One problem by itself, with its numbers."""
    alone = s.alone(place)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", otloss.ConvergenceWarning)
        (verdict,) = check(alone)
        t = tensors(alone)
        return verdict, again(alone, t, run(alone, t, "cpu"), 0)  # what the check has caught is raised here
