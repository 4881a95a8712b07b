"""``python -m benchmarks.soak``: random problems over the whole API, the cpu backend against the reference in float64.

    python -m benchmarks.soak                      # 100,000 problems of seed 0 (40 minutes); writes results/soak.*
    python -m benchmarks.soak --minutes 12         # as many as fit; --resume goes on where that stopped
    python -m benchmarks.soak --only 0:1234        # one problem again, with all of its numbers

Ctrl-C keeps what was counted. `settings.py` draws what the problems are, `bounds.py` says how far a result may lie from
the truth, `checks.py` what is checked.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict

import torch

from benchmarks.soak.checks import check, only
from benchmarks.soak.settings import setting_of, settings
from benchmarks.soak.tally import PAGE, Tally, load


def soak(tally: Tally, problems: int, minutes: float = float("inf"), say: bool = True) -> None:
    """Check problems from where the tally stands until there are so many, or the time is over, or Ctrl-C."""
    start, before, spoken = time.monotonic(), tally.seconds, 0.0
    at_start = tally.problems
    try:
        for s in settings(tally.seed, problems, tally.groups, tally.problems):
            known = len(tally.failures)
            tally.add(s, check(s))
            passed = time.monotonic() - start
            tally.seconds = before + passed
            for failure in tally.failures[known:]:
                print(f"\n{failure['problem']}: {'; '.join(failure['found'])}", flush=True)
            if say and (passed - spoken > (1 if sys.stderr.isatty() else 30)):
                spoken = passed
                rate = (tally.problems - at_start) / passed
                left = (problems - tally.problems) / rate / 60
                line = f"{tally.problems:,} of {problems:,}, {len(tally.failures)} failures, {left:.0f} min left"
                print(line, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
            if passed > 60 * minutes:
                break
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)


def show(seed: int, index: int) -> bool:
    """Print one problem and its numbers; whether all are within their bounds."""
    s = setting_of(seed, index)
    verdict, numbers = only(s, index - s.first)
    print("\n".join(f"{name} = {value}" for name, value in asdict(s).items() if name not in ("seed", "first", "count")))
    print(f"{verdict.problem}: {verdict.state}")
    for name, (error, bound, size) in numbers.items():
        print(f"  {name:24} error {error:.3e}  bound {bound:.3e}  largest entry {size:.3e}{'  ***' * (error > bound)}")
    print("\n".join(verdict.failures) or "all within their bounds")
    return not verdict.failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--resume", action="store_true", help="go on where a run of this seed stopped")
    parser.add_argument("--only", metavar="SEED:NUMBER", help="one problem again")
    parser.add_argument("--no-report", action="store_true", help="write no files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.only:
        seed, index = args.only.split(":")
        raise SystemExit(0 if show(int(seed), int(index)) else 1)
    tally = load(args.seed) if args.resume else Tally(args.seed)
    soak(tally, args.problems, args.minutes)
    print(f"{tally.problems:,} problems, {tally.states}, {len(tally.failures)} failures")
    if not args.no_report:
        tally.save()
        print(f"wrote {PAGE}")
    raise SystemExit(1 if tally.failures else 0)


if __name__ == "__main__":
    main()
