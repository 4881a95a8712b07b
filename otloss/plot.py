"""Pictures of a solve: its plan, and how it converges. They need matplotlib, which otloss itself does not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from otloss.checks import check_choice, check_count
from otloss.operators import ConvergenceWarning
from otloss.output import SinkhornOutput
from otloss.sinkhorn import SOLVERS

__all__ = ["convergence", "plan"]


def _axes(ax: Any) -> Any:
    """The axes given, or those of a new figure."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("otloss.plot needs matplotlib: pip install matplotlib") from error
    return pyplot.subplots()[1] if ax is None else ax


@torch.no_grad()
def plan(out: SinkhornOutput, *, problem: int = 0, log: bool = False, ax: Any = None) -> Any:
    """Draw the plan of one problem as a picture, with a colour bar: row i, column j shows T_ij.

    Args:
        out: what :func:`otloss.sinkhorn` or :func:`otloss.cosine_sinkhorn` returned.
        problem: which problem of the batch, counted over all leading dimensions.
        log: whether to show log10 T_ij, in which entries that underflow can be seen too.
        ax: axes of matplotlib to draw on; None makes a new figure.

    Returns:
        The axes; ``.figure.savefig(path)`` writes them to a file.

    Raises:
        ImportError: matplotlib is not installed.
        IndexError: there is no such problem.

    Example:
        >>> import torch, otloss
        >>> out = otloss.sinkhorn(torch.rand(20, 30))
        >>> ax = otloss.plot.plan(out)  # doctest: +SKIP
        >>> ax.figure.savefig("plan.png")  # doctest: +SKIP
    """
    ax = _axes(ax)
    values = out.log_plan / math.log(10) if log else out.plan
    values = values.reshape(-1, *values.shape[-2:])[problem]
    image = ax.imshow(values.cpu().numpy(), interpolation="nearest", aspect="auto" if _is_long(values) else "equal")
    ax.figure.colorbar(image, ax=ax, label="log10 of the mass" if log else "mass")
    ax.set(xlabel="column j", ylabel="row i", title="log10 of the plan" if log else "plan")
    return ax


def _is_long(values: Tensor) -> bool:
    n, m = values.shape
    return max(n, m) > 3 * min(n, m)


@torch.no_grad()
def convergence(
    solve: Callable[..., SinkhornOutput],
    *args: Tensor,
    solvers: Sequence[str] = SOLVERS,
    max_iter: int = 1000,
    tol: float = 1e-5,
    ax: Any = None,
    **options: Any,
) -> Any:
    """Draw how the marginal error falls with the iterations: its median over the problems, and the largest.

    The problems are solved again and again, with a limit that grows by half each time, until all have converged. That
    takes about three times as long as the last of these solves.

    Args:
        solve: :func:`otloss.sinkhorn` or :func:`otloss.cosine_sinkhorn`.
        args, options: its arguments, as in ``convergence(otloss.sinkhorn, cost, eps=0.01)``.
        solvers: which solvers to compare, of ``"auto"`` and ``"plain"``.
        max_iter: the largest number of iterations.
        tol: the error at which a problem stops; drawn as a line.
        ax: axes of matplotlib to draw on; None makes a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: an argument is not one that ``solve`` takes.

    Example:
        >>> import torch, otloss
        >>> ax = otloss.plot.convergence(otloss.sinkhorn, torch.rand(8, 50, 50), eps=0.01)  # doctest: +SKIP
    """
    check_count("max_iter", max_iter)
    for solver in solvers:
        check_choice("solvers", solver, SOLVERS)
    ax = _axes(ax)
    for solver in solvers:
        steps, errors = [], []
        for limit in _limits(max_iter):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                out = solve(*args, max_iter=limit, tol=tol, solver=solver, **options)
            steps.append(int(out.n_iter.max()))
            errors.append(out.marginal_error.flatten().double())
            if out.converged.all():
                break
        (line,) = ax.plot(steps, [float(error.median()) for error in errors], marker=".", label=solver)
        ax.plot(steps, [float(error.max()) for error in errors], linestyle=":", color=line.get_color())
    ax.axhline(tol, color="grey", linewidth=0.8)
    ax.set(xscale="log", yscale="log", xlabel="iterations", ylabel="marginal error (dotted: the largest)")
    ax.legend(title="solver")
    return ax


def _limits(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 9, 13, ... up to ``most``."""
    limits = [1]
    while limits[-1] < most:
        limits.append(min(max(limits[-1] + 1, 3 * limits[-1] // 2), most))
    return limits
