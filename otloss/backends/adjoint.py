"""The adjoint system of the reference backend: what remains of it on one side, solved by a Cholesky factorisation."""

from __future__ import annotations

import torch
from torch import Tensor

from otloss.backends.massless import live, or_one
from otloss.checks import wide


def solve_adjoint(plan: Tensor, r: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """V of [D_a T; T' D_b][U; V] = [r; s] by the Schur complement on the shorter side, and the relative residual.

    D holds the realised marginals; with a and b the system would be inconsistent for a plan that has not converged.
    The complement on the columns, D_b - T' D_a^-1 T, is then the Laplacian of the graph on them with weights
    W = T' D_a^-1 T: its diagonal is computed as the degrees of W, a sum without cancellation. It is scaled to diagonal
    1, its null vector is lifted by a rank-one term, and a ridge of the size of rounding keeps it definite where the
    graph falls apart into blocks; two steps of refinement take the ridge out again. Cholesky, because MKL 2024.2's
    batched LU returns wrong results once a process has raised its number of threads. A row or column without mass is
    left out. Where there are fewer rows, their complement gives U, and V = D_b^-1 (s - T' U).
    """
    dtype, (n, m) = plan.dtype, plan.shape[-2:]
    plan, r, s = wide(plan), wide(r), wide(s)
    if m <= n:
        v, residual = _solve_columns(plan, r, s, dtype)
    else:
        u, residual = _solve_columns(plan.transpose(-1, -2), s, r, dtype)
        v = (s - (plan * u.unsqueeze(-1)).sum(-2)) / or_one(plan.sum(-2))
    return v.to(dtype), residual.to(dtype)


def _solve_columns(plan: Tensor, r: Tensor, s: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """V and the relative residual by the complement on the columns of a plan that was computed in ``dtype``."""
    m = plan.shape[-1]
    by_rows = plan / or_one(plan.sum(-1)).unsqueeze(-1)
    diagonal = torch.eye(m, dtype=plan.dtype, device=plan.device)
    weights = (plan.transpose(-1, -2) @ by_rows) * (1 - diagonal)
    degrees = weights.sum(-1)
    unroot = torch.where(live(degrees), or_one(degrees).rsqrt(), 0.0)
    null = degrees * unroot * or_one(degrees.sum(-1, keepdim=True)).rsqrt()
    laplacian = diagonal - unroot.unsqueeze(-1) * weights * unroot.unsqueeze(-2)
    laplacian = laplacian + null.unsqueeze(-1) * null.unsqueeze(-2)
    ridge = max(torch.finfo(dtype).eps, m * torch.finfo(plan.dtype).eps)
    factor, failed = torch.linalg.cholesky_ex(laplacian + ridge * diagonal)
    of_rows = (by_rows * r.unsqueeze(-1)).sum(-2)
    right_side = _balanced(s - of_rows, plan.sum(-2))
    right_side = (unroot * right_side).unsqueeze(-1)
    z = torch.cholesky_solve(right_side, factor)
    for _ in range(2):
        z = z + torch.cholesky_solve(right_side - laplacian @ z, factor)
    z = z - null.unsqueeze(-1) * (null * z.squeeze(-1)).sum(-1)[..., None, None]
    z = torch.where(failed[..., None, None] == 0, z, torch.nan)  # it fails only on input that is not finite
    norm = torch.linalg.vector_norm
    size, terms = norm(right_side, dim=(-1, -2)), norm(unroot * s, dim=-1) + norm(unroot * of_rows, dim=-1)
    left_over = norm(right_side - laplacian @ z, dim=(-1, -2))
    solved = size <= 8 * torch.finfo(dtype).eps * terms  # the right side is the rounding of terms that cancel
    residual = torch.where(solved, 0.0, left_over / or_one(size))
    return unroot * z.squeeze(-1), residual.detach()


def _balanced(right_side: Tensor, mass: Tensor) -> Tensor:
    """The right side with total 0, as an exact one has. What rounding left goes to each point by its mass.

    Each entry was rounded in proportion to its mass. Of a heavy point that is more than a light one's whole entry,
    which would be lost if the rest were spread evenly.
    """
    rest = right_side.sum(-1, keepdim=True) / or_one(mass.sum(-1, keepdim=True))
    return right_side - mass * rest
