"""``python -m benchmarks``: time otloss beside its peers, measure what the machine allows, draw plots, write pages.

  all       everything below in order, into results/cpu.json, then plots and pages (make bench)
  quick     the main workloads, few peers and rounds: three minutes, into results/cpu-quick.json (make bench-quick)
  run       some workloads               limits    floors, and shares of the machine's rates
  sweeps    curves of the plots          step      share of an OPTiML training step
  call      the fixed cost of one call, into results/call.json
  plots     draw the plots, write pages  readme    write pages from the files in results/, without measuring
  list      workloads and peers          table     print the main tables of results/cpu.json

The pages are README.md, benchmarks/README.md, docs/gpu.md and results/cpu.md. A part that is not measured again keeps
its figures. A stopped run continues with --resume.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import replace

from benchmarks import call, plots, report, results, suite
from benchmarks.limits import CALL
from benchmarks.peers import PEERS
from benchmarks.readme import write_pages
from benchmarks.sweeps import SWEEPS
from benchmarks.workloads import MAIN, WORKLOADS

COMMANDS = ("all", "quick", "run", "limits", "sweeps", "step", "call", "plots", "readme", "list", "table")
NAMES = {"run": list(WORKLOADS), "limits": [*MAIN, CALL.name], "sweeps": list(SWEEPS), "quick": list(MAIN)}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("names", nargs="*", help="which workloads, limits or curves (all)")
    parser.add_argument("--rounds", type=int, help="rounds beside each peer, at most")
    parser.add_argument("--budget", type=float, help="seconds beside each peer, about")
    parser.add_argument("--peers", help="only peers whose name contains this")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--resume", action="store_true", help="keep what was measured at this very commit")
    args = parser.parse_args(arguments)
    unknown = sorted(set(args.names) - set(NAMES.get(args.command, [])))
    if unknown:
        possible = ", ".join(NAMES.get(args.command, [])) or "none"
        parser.error(f"{args.command} does not know {', '.join(unknown)}; possible names: {possible}")
    if args.peers and not any(args.peers in peer.name for peer in PEERS):
        parser.error(f"no peer's name contains {args.peers!r}; see `python -m benchmarks list`")
    return args


def plan_of(args: argparse.Namespace) -> suite.Plan:
    plan = suite.QUICK if args.command == "quick" else suite.Plan(results.FULL)
    chosen = {
        "rounds": args.rounds,
        "budget": args.budget,
        "peers": tuple(peer for peer in PEERS if args.peers in peer.name) if args.peers else None,
        "with_memory": False if args.no_memory else None,
        "resume": args.resume or None,
    }
    return replace(plan, **{name: value for name, value in chosen.items() if value is not None})


def draw() -> None:
    """Draw every plot that the full results hold points for."""
    plots.draw(results.load(results.FULL), results.FOLDER)


def show() -> None:
    """Print the workloads, and which peers can run here."""
    for w in WORKLOADS.values():
        print(f"{w.name + ('*' if w.main else ''):18s} {w.describe()}")
    print("* has targets\n")
    for peer in PEERS:
        print(f"{peer.name:48s} {peer.missing() or 'installed'}")


def dispatch(args: argparse.Namespace) -> None:
    plan = plan_of(args)
    chosen = [WORKLOADS[name] for name in args.names if name in WORKLOADS]
    if args.command == "list":
        show()
    elif args.command == "quick":
        suite.run_workloads(chosen or list(MAIN.values()), plan)
        suite.run_limits(plan, [CALL.name])
        print("\n".join(report.speedups(results.load(plan.path))))
    elif args.command == "run":
        suite.run_workloads(chosen or list(WORKLOADS.values()), plan)
    elif args.command == "limits":
        suite.run_limits(plan, args.names)
    elif args.command == "sweeps":
        suite.run_sweeps(plan, args.names)
    elif args.command == "step":
        suite.run_step(plan)
    elif args.command == "call":
        call.main()
    elif args.command == "all":
        suite.run_workloads(list(MAIN.values()), plan)
        suite.run_limits(plan)
        suite.run_step(plan)
        suite.run_sweeps(plan)
        suite.run_workloads([w for w in WORKLOADS.values() if not w.main], plan)
    elif args.command == "table":
        known = results.load(results.FULL)
        print("\n".join([*report.speedups(known), "", *report.limits(known)]))
    if args.command in ("all", "plots"):
        draw()
    if args.command in ("all", "plots", "readme"):
        write_pages()
        print(report.readme(results.load(results.FULL)))


def main() -> None:
    warnings.filterwarnings("ignore", message=".*did not converge.*")
    warnings.filterwarnings("ignore", module=r"(geomloss|ot|ott|jax|torch)(\.|$)")
    try:
        dispatch(parse())
    except KeyboardInterrupt:
        sys.exit("\nstopped; what was finished is kept, and --resume continues")


if __name__ == "__main__":
    main()
