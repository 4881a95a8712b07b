"""``python tests/interrupt_soak.py``: prepare, pretrain and compare, interrupted at random moments, and repeated.

    python tests/interrupt_soak.py                     # 50 moments and 12 disks; writes benchmarks/results/interrupts.*
    python tests/interrupt_soak.py --minutes 15        # as many as fit
    python tests/interrupt_soak.py --only 7            # the moments of one seed again, and what the commands said

A seed draws a command, one or two interrupts and their moments: Ctrl-C for its whole process group, SIGKILL for the
group, or SIGKILL for its first process alone. The same command is repeated after each, at once, and is let alone at
last. A moment is a share of the time that the command takes, so that a seed strikes about the same place again, not
exactly the same.

A disk is a small file system in memory, which needs the right to mount one: it has less room than the command needs,
then it is read-only, then it has room. ``interrupted_commands.py`` says what must hold after each run.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from interrupted_commands import COMMANDS, Command, State, draw_data, half_written, printed, start

from benchmarks import results
from benchmarks.machine import environment

RESULTS, PAGE = results.FOLDER / "interrupts.json", results.FOLDER / "interrupts.md"
STRIKES = {"Ctrl-C": signal.SIGINT, "killed": signal.SIGKILL, "first process killed": signal.SIGKILL}
#: Bytes that each command needs at most, a checkpoint beside the last one included.
DISK = {"prepare": 1_300_000, "pretrain": 280_000_000, "compare": 280_000_000}
#: No command of this size takes so long.
HANGS = 300.0


@dataclass
class Trial:
    """What a seed did to a command, and what was wrong with that."""

    seed: int
    command: str
    strikes: list[str]
    shares: list[float]
    """Of the command's time, or of the room that it needs."""
    ended_before: int = 0
    faults: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    """What each run printed last."""


class Bench:
    """A folder to work in, and the ends of commands that nothing disturbed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, draw_data(folder / "data")
        self.out, self.said = folder / "work" / "out", folder / "said"
        self._whole: dict[str, tuple[State, float]] = {}

    def whole(self, command: Command) -> tuple[State, float]:
        """The end and the seconds of a run that is let alone."""
        if command.name not in self._whole:
            self.clear()
            begun = time.monotonic()
            code = self.run(command)
            if code:
                raise SystemExit(f"{command.name} does not even work undisturbed:\n{''.join(printed(self.said))}")
            self._whole[command.name] = command.end(self.out), time.monotonic() - begun
        return self._whole[command.name]

    def clear(self) -> None:
        shutil.rmtree(self.out.parent, ignore_errors=True)
        self.out.parent.mkdir()

    def run(self, command: Command, strike: str = "", after: float = HANGS) -> int:
        """The exit code of a run that is struck after so many seconds, if it has not ended before."""
        process = start(command.line(self.data, self.out), self.said)
        assert process.pid is not None
        process.join(after)
        if process.is_alive() and strike:
            (os.kill if strike == "first process killed" else os.killpg)(process.pid, STRIKES[strike])
            process.join(HANGS)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            raise TimeoutError(f"still at work after {HANGS:.0f} s")
        assert process.exitcode is not None
        return process.exitcode


def _lost(before: State, after: State) -> list[str]:
    return [name for name, value in before.items() if after.get(name, "") != value]


def _check(trial: Trial, command: Command, bench: Bench, before: State) -> State:
    """After any run: nothing that was kept is lost or made again, and nothing is half written. Returns what is kept."""
    if broken := half_written(bench.out):
        trial.faults.append(f"half written: {broken[0]}")
    kept = command.kept(bench.out)
    if lost := _lost(before, kept):
        trial.faults.append(f"{len(lost)} that were kept are lost or made again: {lost[0]}")
    return kept


def _last_words(trial: Trial, bench: Bench) -> list[str]:
    """Standard error, line by line; a traceback is a fault, also in another process of the command."""
    out, err = printed(bench.said)
    lines = [line for line in err.splitlines() if line.strip()]
    trial.said.append((lines or out.strip().splitlines() or ["nothing"])[-1])
    if "Traceback" in out + err:
        trial.faults.append(f"a traceback: {trial.said[-1]}")
    return lines


def _finish(trial: Trial, command: Command, bench: Bench, kept: State) -> None:
    """The same command, let alone, comes to the same end."""
    want, _ = bench.whole(command)
    code = bench.run(command)
    _last_words(trial, bench)
    if code:
        trial.faults.append(f"the repeated command ends with {code}: {trial.said[-1]}")
        return
    _check(trial, command, bench, kept)
    end = command.end(bench.out)
    if differs := sorted({*_lost(want, end), *_lost(end, want)}):
        trial.faults.append(f"the end differs in {', '.join(differs[:3])}")


def interrupted(seed: int, bench: Bench) -> Trial:
    """The moments of a seed."""
    draw = random.Random(seed)
    command = COMMANDS[draw.choice(list(COMMANDS))]
    strikes = draw.choices(list(STRIKES), weights=(2, 1, 1), k=draw.choice((1, 1, 2)))
    trial = Trial(seed, command.name, strikes, [draw.random() for _ in strikes])
    _, seconds = bench.whole(command)
    bench.clear()
    kept: State = {}
    try:
        for strike, share in zip(strikes, trial.shares, strict=True):
            code = bench.run(command, strike, share * seconds)
            _last_words(trial, bench)
            if code == 0:
                trial.ended_before += 1
            elif strike == "Ctrl-C" and "goes on" not in trial.said[-1] + printed(bench.said)[0]:
                trial.faults.append(f"Ctrl-C: ends with {code} and says {trial.said[-1]}")
            elif code < 0 and strike == "Ctrl-C":
                trial.faults.append(f"Ctrl-C: ends by signal {-code}")
            elif code > 0 and strike != "Ctrl-C":
                trial.faults.append(f"not struck, but ends with {code}: {trial.said[-1]}")
            kept = _check(trial, command, bench, kept)
        _finish(trial, command, bench, kept)
    except TimeoutError as error:
        trial.faults.append(str(error))
    return trial


def mount(folder: Path, *options: str) -> bool:
    """Whether the file system in memory is there, with these options."""
    given = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    return shutil.which("mount") is not None and subprocess.run(given, capture_output=True).returncode == 0


def filled(seed: int, bench: Bench) -> Trial | None:
    """A disk that is full at some moment, then read-only, then large enough; None where nothing can be mounted."""
    draw = random.Random(f"disk {seed}")
    command = list(COMMANDS.values())[seed % len(COMMANDS)]
    trial = Trial(seed, command.name, ["full disk", "read-only"], [draw.random()])
    bench.whole(command)
    bench.clear()
    room = DISK[command.name.partition(" ")[0]]
    if not mount(bench.out.parent, f"size={max(8192, int(trial.shares[0] * room))}"):
        return None
    try:
        kept: State = {}
        for what, words in (("full disk", "o space left"), ("read-only", "ead-only")):
            if what == "read-only":
                mount(bench.out.parent, "remount", "ro")
            code = bench.run(command)
            lines = _last_words(trial, bench)
            if code == 0:
                trial.ended_before += 1
            elif code < 0 or len(lines) != 1 or words not in lines[0]:
                trial.faults.append(f"{what}: ends with {code} and {len(lines)} lines: {trial.said[-1]}")
            kept = _check(trial, command, bench, kept)
        mount(bench.out.parent, "remount", "rw", "size=1g")
        _finish(trial, command, bench, kept)
    except TimeoutError as error:
        trial.faults.append(str(error))
    finally:
        subprocess.run(["umount", "-l", str(bench.out.parent)], check=False)
    return trial


def page(found: dict[str, Any]) -> str:
    """The report."""
    machine, trials = found["environment"], found["trials"]
    moments = sum(len(trial["strikes"]) - trial["ended_before"] for trial in trials)
    faults = [trial for trial in (*trials, *found["disks"]) if trial["faults"]]
    lines = [
        "# Interrupted commands",
        "",
        "Written by `python tests/interrupt_soak.py`; the trials are in `interrupts.json`. Commands of the example, on "
        "phantoms and at tiny size, are interrupted at random moments, and repeated at once until they end. "
        f"{machine['cpu']}, commit {machine['commit']}, {machine['date'][:10]}.",
        "",
        "After each run every file that is not named `.part` is read to its end. What was kept before the repetition "
        "must still be there and must not have been made again: films that are noted as done, rows of the log up to "
        "the checkpoint, records. The end must be that of a run that nothing disturbed: bit for bit, but for times.",
        "",
        f"**{moments} moments** in {len(trials)} trials, {len(found['disks'])} full and read-only disks, in "
        f"{found['seconds'] / 60:.0f} minutes: **{len(faults)} trials with a fault**.",
        "",
        "| command | trials | Ctrl-C | killed, all processes | killed, the first process | ended before | faults |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in COMMANDS:
        mine = [trial for trial in trials if trial["command"] == name]
        struck = [sum(trial["strikes"].count(strike) for trial in mine) for strike in STRIKES]
        ended, wrong = sum(trial["ended_before"] for trial in mine), sum(bool(trial["faults"]) for trial in mine)
        lines.append(f"| {name} | {len(mine)} | {' | '.join(map(str, struck))} | {ended} | {wrong} |")
    lines += ["", "## Full and read-only disks", ""]
    if found["disks"]:
        lines += [
            "The room of the disk is a random share of what the command needs. It must end with one line that names "
            "the reason, on the full disk and again when the disk is read-only, and go on when there is room.",
            "",
            "| command | disks | had room | faults |",
            "|---|---|---|---|",
        ]
        for name in COMMANDS:
            mine = [trial for trial in found["disks"] if trial["command"] == name]
            fit, wrong = sum(t["ended_before"] == 2 for t in mine), sum(bool(t["faults"]) for t in mine)
            lines.append(f"| {name} | {len(mine)} | {fit} | {wrong} |")
    else:
        lines.append("Not run: nothing could be mounted here.")
    lines += ["", "## Faults", ""]
    lines += [
        f"* {trial['command']}, {' and '.join(trial['strikes'])}, seed {trial['seed']}: {'; '.join(trial['faults'])}"
        for trial in faults
    ] or ["None."]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--disks", type=int, default=12)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no trial after so long")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial; the others count on")
    parser.add_argument("--only", type=int, nargs="+", metavar="SEED", help="these again, without a report")
    parser.add_argument("--only-disks", type=int, nargs="+", metavar="SEED", help="the same of disks")
    options = parser.parse_args()
    machine, begun = environment(), time.monotonic()
    trials: list[Trial] = []
    disks: list[Trial] = []
    alone = options.only is not None or options.only_disks is not None
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))

        def tell(trial: Trial) -> None:
            where = f"{', '.join(trial.strikes)} at {', '.join(f'{share:.3f}' for share in trial.shares)}"
            print(f"seed {trial.seed}: {trial.command}: {where}: {'; '.join(trial.faults) or 'good'}", flush=True)
            if alone:
                print(*trial.said, "", sep="\n  ")

        def in_time() -> bool:
            return time.monotonic() - begun < 60 * options.minutes

        for seed in options.only_disks or range(0 if alone else options.disks):
            if in_time() and (disk := filled(seed, bench)):
                disks.append(disk)
                tell(disk)
        seeds = iter(options.only or range(options.seed, options.seed + (0 if alone else options.moments)))
        while in_time() and sum(len(trial.strikes) for trial in trials) < options.moments:
            seed = next(seeds, None)
            if seed is None:
                break
            trials.append(interrupted(seed, bench))
            tell(trials[-1])
    faults = sum(bool(trial.faults) for trial in (*trials, *disks))
    print(f"{sum(len(trial.strikes) for trial in trials)} moments, {len(disks)} disks, {faults} trials with a fault")
    if not alone:
        found = {"trials": [asdict(trial) for trial in trials], "disks": [asdict(disk) for disk in disks]}
        results.save(RESULTS, found | {"environment": machine, "seconds": time.monotonic() - begun})
        PAGE.write_text(page(results.load(RESULTS)))
        print(f"wrote {PAGE}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
