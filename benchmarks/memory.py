"""Peak memory of one step (Linux only). A process of its own makes the step and is stopped before memory runs out.

``python -m benchmarks.memory WORKLOAD PEER PROBLEMS PER_CALL`` is that process. It prints GiB.
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import time

from benchmarks.machine import available_gib
from benchmarks.peers import Peer, by_name
from benchmarks.timing import Entrant
from benchmarks.workloads import WORKLOADS, Workload

SPARE_GIB = 1.5


class MemoryExhausted(RuntimeError):
    """A step would take more than the machine has left."""


def status(key: str) -> int:
    with open("/proc/self/status") as lines:
        return int(next(line for line in lines if line.startswith(key)).split()[1])


def growth(peer: Peer, workload: Workload, per_call: int) -> float:
    """GiB by which this process grows at the peak of one step. Inputs, and what a first call leaves, do not count."""
    small = workload.part(2, 64)
    first = Entrant(peer, workload if peer.warm_in_full else small, per_call)
    first.prepare()
    first.run()
    entrant = Entrant(peer, workload, per_call)
    if peer.warm_in_full:
        entrant = first
    else:
        entrant.prepare()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as reset:  # sets the recorded peak back to what is held now
        reset.write("5")
    before = status("VmRSS")
    entrant.run()
    return (status("VmHWM") - before) / 2**20


def measure(peer: Peer, workload: Workload, problems: int, per_call: int, timeout: float = 180) -> float:
    """`growth` in a fresh process.

    Raises:
        MemoryExhausted: the process was stopped.
        RuntimeError: it failed or took longer than ``timeout`` seconds.
    """
    command = [sys.executable, "-m", "benchmarks.memory", workload.name, peer.name, str(problems), str(per_call)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    began, reason = time.monotonic(), None
    try:
        while process.poll() is None and reason is None:
            if available_gib() < SPARE_GIB:
                reason = MemoryExhausted(f"stopped with {SPARE_GIB} GiB left of the machine's memory")
            elif time.monotonic() - began > timeout:
                reason = RuntimeError(f"took longer than {timeout:.0f} s")
            time.sleep(0.05)
    finally:
        process.kill()
    out, err = process.communicate()
    if reason is not None:
        raise reason
    if process.returncode:
        raise RuntimeError((err.strip().splitlines() or ["no message"])[-1])
    return float(out.strip().splitlines()[-1])


if __name__ == "__main__":
    name, peer_name, problems, per_call = sys.argv[1:]
    whole = WORKLOADS[name]
    part = whole if int(problems) == whole.batch else whole.part(int(problems))
    print(growth(by_name(peer_name), part, int(per_call)))
