"""``python -m benchmarks``: time ours beside the peers, write ``benchmarks/results`` and the README's table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import runner
from benchmarks.readme import write_section
from benchmarks.workloads import WORKLOADS

RESULTS = Path(__file__).parent / "results"


def table(results: dict[str, Any]) -> str:
    """The README's section, from a results file."""
    lines = ["Medians, forward + backward from features and logits."]
    for name, entry in results["workloads"].items():
        w, where = entry["workload"], entry["environment"]
        lines += [
            "",
            f"**{name}**: {w['batch']} problems, n = {w['n']}, m = {w['m']}, d = {w['d']}, eps {w['eps']}, "
            f"{w['iterations']} iterations. {where['cpu']}, {where['threads']} threads, "
            f"torch {where['versions']['torch']}, commit {where['commit']}, {where['date']}.",
            "",
            "| | exact sharp gradient | seconds | times ours |",
            "|---|---|---|---|",
        ]
        for row in entry["times"]:
            calls = "" if row["problems_per_call"] == w["batch"] else f", {row['problems_per_call']} problems a call"
            exact = "yes" if row["exact"] else "no"
            lines.append(f"| {row['name']}{calls} | {exact} | {row['median_s']:.3g} | {row['ratio']:.3g} |")
        error = entry["errors"]["otloss"]
        lines += [
            "",
            f"Against float64: relative error of cost {error['cost']:.1e}, of gradients {error['gradient']:.1e}.",
        ]
        if "memory_growth_gib" in entry:
            lines.append(f"Peak memory for 1024 such problems grows by {entry['memory_growth_gib']:.2f} GiB.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS), help=f"of: {', '.join(WORKLOADS)} (all)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of ours beside each peer")
    parser.add_argument("--no-readme", action="store_true", help="leave README.md alone")
    args = parser.parse_args()
    unknown = sorted(set(args.workloads) - set(WORKLOADS))
    if unknown:
        parser.error(f"unknown workload {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "cpu.json"
    results: dict[str, Any] = {"environment": runner.environment(), "workloads": {}}
    if path.exists():  # workloads that are not timed now keep their figures
        known = json.loads(path.read_text())["workloads"]
        results["workloads"] = {name: known[name] for name in WORKLOADS if name in known}
    for name in args.workloads:
        workload = WORKLOADS[name]
        print(name, flush=True)
        entry: dict[str, Any] = {"workload": vars(workload), "environment": results["environment"]}
        entry["errors"] = runner.check(workload)
        entry["times"] = runner.measure(workload, args.rounds)
        if name == "channels":
            entry["memory_growth_gib"] = runner.memory_growth(workload, 1024)
            print(f"  peak memory for 1024 problems grows by {entry['memory_growth_gib']:.2f} GiB")
        results["workloads"][name] = entry
        path.write_text(json.dumps(results, indent=1) + "\n")
    if not args.no_readme:
        write_section("bench", table(results))


if __name__ == "__main__":
    main()
