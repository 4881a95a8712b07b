"""``python -m benchmarks.capabilities``: what otloss and its peers can do, each cell from a run on this machine.

A row is a problem with one thing that a library may or may not be able to do. It is given to every mode of every
library, and the result is compared in float64 with plain log-domain iterations, and gradients with central differences
of these. A cell is that of the library's best mode:

* *yes*: the largest relative error is below 1 %, which leaves room for libraries that anneal;
* *no*: there is no such argument, output or function, or the call raises;
* *wrong*: it returns something else, and by how much;
* *not run here*: the library is not installed, or takes what it is given, but on a device that is not there.

``results/capabilities.json`` has every mode with its error or its message, ``results/capabilities.md`` every row.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from benchmarks import results
from benchmarks.capability_rows import ROWS, Check, Row
from benchmarks.machine import environment
from benchmarks.memory import status
from benchmarks.peers.cases import Missing, NoDevice
from benchmarks.peers.ott_ways import OTT
from benchmarks.peers.ways import LIBRARIES, Library

GOOD = 1e-2
SECONDS = 100
"""After which a mode is stopped."""
POINTS, ITERATIONS = 4000, 5
"""Of the problem whose memory is measured: a cost of 64 MB."""
COLUMNS = (*LIBRARIES[:-1], OTT, LIBRARIES[-1])


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """Raise after so many seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def growth(library: str, name: str) -> float:
    """By how many costs this process grows in a call with its gradient.

    A first call on few points does not count, nor what JAX takes to compile for a number of points.
    """
    (column,) = (c for c in COLUMNS if c.name == library)
    function = column.special["stream"][name]

    def run(count: int) -> None:
        x, y = (torch.rand(1, count, 3).requires_grad_() for _ in range(2))
        torch.autograd.grad(function(x, y, 0.1, ITERATIONS).sum(), x)

    run(64)
    if column.jax:
        run(POINTS)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as reset:  # sets the recorded peak back to what is held now
        reset.write("5")
    before = status("VmRSS")
    run(POINTS)
    return (status("VmHWM") - before) * 1024 / (4 * POINTS**2)


def grown(library: str, name: str) -> float:
    """`growth` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.capabilities", "--grow", library, name]
    # Without its frames JAX ends a message with a remark on them.
    environment = {**os.environ, "JAX_TRACEBACK_FILTERING": "off"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * SECONDS, check=False, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        kind, _, said = last.partition(": ")
        raise NoDevice(said) if kind.endswith(NoDevice.__name__) else RuntimeError(last)
    return float(done.stdout.split()[-1])


def modes(row: Row, library: Library) -> dict[str, Callable[..., Any]]:
    """What is asked of a library: its functions for the row where it has some, else its modes where these will do."""
    if row.asks == "stream":
        return {name: partial(grown, library.name, name) for name in library.special.get("stream", {})}
    if row.asks == "ragged":
        return library.special.get(row.asks, {})
    return library.special.get(row.asks, library.ways)


def tried(check: Check, mode: Callable[..., Any], seconds: int = SECONDS) -> dict[str, Any]:
    """The outcome of one mode: a state with its error, or with the reason."""
    try:
        with limit(seconds), torch.enable_grad():  # geomloss turns gradients off, and after an error for good
            error = float(check(mode))
    except NoDevice as failure:
        return {"state": "not run here", "why": str(failure)}
    except Exception as failure:  # of whatever kind a library has
        said = (str(failure).strip().splitlines() or [""])[0][:200]
        return {"state": "no", "why": said if isinstance(failure, Missing) else f"{type(failure).__name__}: {said}"}
    if error < GOOD:
        return {"state": "yes", "error": error}
    return {"state": "wrong", "error": error if math.isfinite(error) else None}


def cell(row: Row, library: Library) -> dict[str, Any]:
    """The best mode's outcome, the name of that mode, and the outcomes of those that were asked up to it.

    Where a mode takes the problem but could not be run, nobody knows what the best one is.
    """
    if why := library.missing():
        return {"state": "not run here", "why": why}
    check = row.in_jax if row.in_jax is not None and library.jax else row.check
    found: dict[str, dict[str, Any]] = {}
    for name, mode in modes(row, library).items():
        found[name] = tried(check, mode)
        if found[name]["state"] == "yes":  # the others need not be asked
            return {**found[name], "by": name, "modes": found}
    if not found:
        return {"state": "no", "why": "has no such function"}

    def rank(name: str) -> tuple[int, float]:
        error = found[name].get("error")
        return ("not run here", "wrong", "no").index(found[name]["state"]), math.inf if error is None else error

    by = min(found, key=rank)
    return {**found[by], "by": by, "modes": found}


def shown(entry: dict[str, Any]) -> str:
    """A cell of a table."""
    if entry["state"] != "wrong":
        return str(entry["state"])
    if entry["error"] is None:
        return "**NaN**"
    percent = 100 * entry["error"]
    return f"**wrong by {f'{percent:.2g}' if percent < 1 else f'{percent:.0f}'} %**"


def table(found: dict[str, Any]) -> list[str]:
    """A row for each capability."""
    names = found["libraries"]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for key, cells in found["rows"].items():
        lines.append(f"| {ROWS[key].title} | {' | '.join(shown(cells[name]) for name in names)} |")
    return lines


def readme(found: dict[str, Any]) -> str:
    """README.md: a row for each library of which something is known, a column for each capability with a short name."""
    keys = [key for key in found["rows"] if ROWS[key].short]
    absent = "; ".join(f"{name} {why}" for name, why in found["not_run"].items())
    head = f"?: not run here, {absent}" if absent else ""
    lines = [f"| {head} | {' | '.join(ROWS[key].short for key in keys)} |", "|---" * (len(keys) + 1) + "|"]
    for name in found["libraries"]:
        cells = [found["rows"][key][name] for key in keys]
        texts = ["?" if entry["state"] == "not run here" else shown(entry) for entry in cells]
        if set(texts) != {"?"}:
            lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines)


def page(found: dict[str, Any]) -> str:
    """All rows, by which mode, and why not."""
    versions = ", ".join(f"{name} {number}" for name, number in found["environment"]["versions"].items() if number)
    lines = [
        "# What each library can do",
        "",
        "Written by `python -m benchmarks.capabilities`; every mode and message is in `capabilities.json`. A cell is "
        "that of a library's best mode, run on this machine in float64 and compared with plain log-domain iterations, "
        "gradients with central differences of these. *yes*: within 1 %. *no*: there is no such argument, output or "
        f"function, or the call raises. {versions}.",
        "",
        *table(found),
        "",
        *(f"{name} {why}: *not run here* is what it would do there." for name, why in found["not_run"].items()),
        "",
        "## By which mode, and why not",
        "",
    ]
    for key, cells in found["rows"].items():
        parts = []
        for name, entry in cells.items():
            if entry["state"] == "not run here":
                continue
            why = f"{entry['error']:.0e}" if entry.get("error") is not None else entry.get("why", "not finite")
            parts.append(f"{name}: {entry['state']}{', ' + entry['by'] if entry.get('by') else ''} (`{why}`)")
        lines.append(f"* **{ROWS[key].title}**. {'; '.join(parts)}.")
    return "\n".join(lines) + "\n"


def updated(there: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The results that are there with the rows of ``found``; ``later`` says where each of these was run.

    Raises:
        SystemExit: they are of other versions or libraries.
    """
    for what, mine, theirs in (
        ("versions", found["environment"]["versions"], there.get("environment", {}).get("versions")),
        ("libraries", found["libraries"], there.get("libraries")),
    ):
        if mine != theirs:
            raise SystemExit(f"the results that are there are of other {what}: run all rows again, without --update")
    rows = {**there["rows"], **found["rows"]}
    later = {**there.get("later", {}), **dict.fromkeys(found["rows"], found["environment"])}
    return {**there, "rows": {key: rows[key] for key in ROWS if key in rows}, "later": later}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS), help="only these; prints alone")
    parser.add_argument("--update", action="store_true", help="puts these rows into the results that are there")
    parser.add_argument("--libraries", nargs="*", choices=[c.name for c in COLUMNS], help="only these; prints alone")
    parser.add_argument("--grow", nargs=2, metavar=("LIBRARY", "FUNCTION"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.grow:
        print(growth(*args.grow))
        return
    if args.update and args.libraries:
        parser.error("--update takes whole rows, without --libraries")
    columns = [c for c in COLUMNS if args.libraries is None or c.name in args.libraries]
    found: dict[str, Any] = {
        "environment": environment(),
        "libraries": [c.name for c in columns],
        "not_run": {c.name: why for c in columns if (why := c.lacking())},
        "rows": {},
    }
    for key in args.rows:
        cells = found["rows"][key] = {c.name: cell(ROWS[key], c) for c in columns}
        print(f"{key:20}", *(f"{name} {shown(entry)}" for name, entry in cells.items()), sep="  ", flush=True)
    if not args.update and (len(args.rows) < len(ROWS) or len(columns) < len(COLUMNS)):
        return
    from benchmarks.readme import write_pages  # which imports this module

    results.save(results.CAPABILITIES, updated(results.load(results.CAPABILITIES), found) if args.update else found)
    write_pages()


if __name__ == "__main__":
    main()
