"""Balanced assignments of samples to prototypes by a few iterations, as SwAV and DINO use them, also over processes.

Scores of a batch become soft assignments in which every prototype gets an equal share of the batch. A few iterations
are enough and nothing is differentiated. In one process that is a call of ``otloss.sinkhorn`` with the prototypes as
rows, so that the last half-step gives each sample its mass.

Where the batch is split over processes, a prototype's sum runs over all of them: one all-reduce of a number for each
prototype and process, per iteration. A sample's sum needs none. The result is that of one process.

    python -m examples.assignment --processes 2

Source: Caron et al. 2020, SwAV (arXiv 2006.09882); Caron et al. 2021, DINO (2104.14294), and DINOv2 (2304.07193).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import otloss


@torch.no_grad()
def assign(scores: Tensor, eps: float = 0.05, iterations: int = 3) -> Tensor:
    """Assignments ``(B, K)``, with rows of total 1, of scores ``(B, K)`` of samples and prototypes."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        return assign_shared(scores, eps, iterations)
    # tol 0: exactly that many plain iterations, and no warning that they do not converge.
    out = otloss.sinkhorn(-scores.T, eps=eps, max_iter=iterations, tol=0.0, solver="plain", gradient="none")
    return len(scores) * out.plan.T


@torch.no_grad()
def assign_shared(scores: Tensor, eps: float, iterations: int) -> Tensor:
    """The rows of this process; the samples of all processes count. It iterates on f, then g, as the solver does."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    logits = scores.float() / eps
    total = torch.tensor(float(len(scores)), device=scores.device)
    dist.all_reduce(total)
    g = torch.zeros_like(logits[:, :1])  # of samples; potentials are in units of eps
    for _ in range(iterations):
        sums = logits.new_zeros(processes, logits.shape[1])
        sums[rank] = torch.logsumexp(logits + g, 0)
        dist.all_reduce(sums)  # each process fills its own row, so that logarithms can be added
        f = total.log() - torch.logsumexp(sums, 0)
        g = -torch.logsumexp(logits + f, 1, keepdim=True)
    return (logits + f + g).exp()


def worker(rank: int, processes: int, folder: str, scores: Tensor, eps: float, iterations: int) -> None:
    """One process: its share of the samples, and a file with their assignments."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    try:
        torch.save(assign(scores.tensor_split(processes)[rank], eps, iterations), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def in_processes(processes: int, scores: Tensor, eps: float, iterations: int) -> Tensor:
    """The assignments of all samples, each computed by the process that has it."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (processes, folder, scores, eps, iterations), nprocs=processes)
        return torch.cat([torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(processes)])


def main(argv: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
    """Print how balanced the assignments are; return those of one process, and those of several."""
    parser = argparse.ArgumentParser(description="Balanced assignments of samples to prototypes, over processes.")
    parser.add_argument("--samples", type=int, default=512, help="samples of the whole batch (%(default)s)")
    parser.add_argument("--prototypes", type=int, default=64, help="number of prototypes (%(default)s)")
    parser.add_argument("--iterations", type=int, default=3, help="iterations (%(default)s)")
    parser.add_argument("--eps", type=float, default=0.05, help="strength of the entropy (%(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="processes that share the batch (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the features (%(default)s)")
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    features = torch.randn(options.samples, 32) + 2 * torch.randn(32)  # all on one side: the nearest would be few
    scores = 1 - otloss.cosine_cost(features, torch.randn(options.prototypes, 32))
    alone = assign(scores, options.eps, options.iterations)
    shared = alone
    if options.processes > 1:
        shared = in_processes(options.processes, scores, options.eps, options.iterations)
        print(f"{options.processes} processes and one differ by at most {float((shared - alone).abs().max()):.1e}")
    nearest = torch.bincount(scores.argmax(1), minlength=options.prototypes)
    for name, share in (("nearest prototype", nearest), ("balanced", shared.sum(0))):
        print(f"samples of a prototype, {name}: {float(share.min()):.2f} to {float(share.max()):.2f}")
    return alone, shared


if __name__ == "__main__":
    main()
