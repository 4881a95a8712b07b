"""`sinkhorn` and `cosine_sinkhorn`: entropic optimal transport for batches of problems, with exact gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from otloss.autograd import solve
from otloss.backends import choose_backend, get_backend
from otloss.backends.protocol import Given, Problem, Shift, Solution
from otloss.checks import (
    check_choice,
    check_count,
    check_device,
    check_features,
    check_number,
    check_tensor,
    working_dtype,
)
from otloss.compat import is_exporting
from otloss.gradients import MODES, State
from otloss.operators import Options
from otloss.output import PlanSource, SinkhornOutput

__all__ = ["SinkhornOutput", "cosine_sinkhorn", "sinkhorn"]

SOLVERS = ("auto", "plain")

#: How far the totals of a and b may lie apart, relatively: a softmax over 10^5 points is off by 1e-5 in float32.
#: In half precision 2e-2.
MASS_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}


def _in(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in this dtype; no operation where it is already."""
    return x if x.dtype == dtype else x.to(dtype)


def _one_batch(x: Tensor, dims: int) -> Tensor:
    """``x`` with all dimensions before the last ``dims`` joined into one."""
    return x if x.dim() == dims + 1 else x.reshape(math.prod(x.shape[:-dims]), *x.shape[-dims:])


def _mass(
    name: str, mass: Tensor | None, log_mass: Tensor | None, like: Tensor, batch: torch.Size, count: int
) -> tuple[Tensor, str]:
    """Masses ``(B, count)`` of the dtype of ``like``, and the form in which they were given, see `Given`."""
    if mass is not None and log_mass is not None:
        raise ValueError(f"give {name} or log_{name}, not both")
    given, form, label = (mass, "masses", name) if log_mass is None else (log_mass, "logs", f"log_{name}")
    if given is None:
        return like.new_full((math.prod(batch), count), 1 / count), "uniform"
    if given.shape[-1] != count or given.dim() > len(batch) + 1:
        raise ValueError(f"{label} must have shape {(*batch, count)} or ({count},), got {tuple(given.shape)}")
    given = _in(given, like.dtype)
    if given.shape[:-1] != batch:
        try:
            given = given.expand(*batch, count)
        except RuntimeError:
            raise ValueError(
                f"{label} must have shape {(*batch, count)} or be broadcastable to it, got {tuple(given.shape)}"
            ) from None
    return _one_batch(given, 1), form


def _solve(
    left: Tensor,
    right: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    log_a: Tensor | None,
    log_b: Tensor | None,
    eps: float,
    max_iter: int,
    tol: float,
    gradient: str,
    solver: str,
    backend: str | None,
) -> SinkhornOutput:
    check_number("eps", eps, positive=True)
    check_number("tol", tol, positive=False)
    check_count("max_iter", max_iter)
    check_choice("gradient", gradient, MODES)
    check_choice("solver", solver, SOLVERS)
    masses = {name: x for name, x in (("a", a), ("log_a", log_a), ("b", b), ("log_b", log_b)) if x is not None}
    for name, mass in masses.items():
        check_tensor(name, mass, 1, "(B, n)" if name.endswith("a") else "(B, m)")
    named: dict[str, Any] = {"cost": left} if right is None else {"x": left, "y": right}
    named.update(masses)
    check_device(**named)
    dtype = working_dtype(**named)
    chosen = choose_backend(backend, left.device.type)
    batch, n, m = left.shape[:-2], left.shape[-2], left.shape[-1] if right is None else right.shape[-2]
    if not get_backend(chosen).READS_HALF:
        left, right = _in(left, dtype), None if right is None else _in(right, dtype)
    left, right = _one_batch(left, 2), None if right is None else _one_batch(right, 2)
    like = left if left.dtype == dtype else left.new_empty(0, dtype=dtype)
    mass_a, form_a = _mass("a", a, log_a, like, batch, n)
    mass_b, form_b = _mass("b", b, log_b, like, batch, m)
    if gradient == "none":  # no output is differentiated by the masses
        mass_a, mass_b = mass_a.detach(), mass_b.detach()
    tolerance = max((MASS_TOLERANCE.get(mass.dtype, 2e-2) for mass in masses.values()), default=0.0)
    accelerate = solver == "auto" and gradient != "unroll" and tol > 0
    # Whether keeping the cost pays depends on the sizes, which an exported graph may leave open.
    keep = gradient != "unroll" and torch.is_grad_enabled() and not is_exporting()
    problem, given = Problem(left, right, mass_a, mass_b, float(eps)), Given(form_a, form_b, tolerance)
    options = Options(int(max_iter), float(tol), accelerate, keep, gradient, chosen)
    cost, value, error, *rest = solve(*problem, *given, *options)
    state = State(*rest)
    shift = Shift(state.row_shift, state.column_shift) if right is None else None
    solution = Solution(state.f, state.g, cost, value, state.n_iter, error, shift)
    source = PlanSource(problem.with_masses(state.a, state.b), batch)
    return SinkhornOutput(source, solution, gradient, options.tol)


def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    eps: float = 0.05,
    log_a: Tensor | None = None,
    log_b: Tensor | None = None,
    max_iter: int = 1000,
    tol: float = 1e-5,
    gradient: str = "implicit",
    solver: str = "auto",
    backend: str | None = None,
) -> SinkhornOutput:
    r"""Entropic optimal transport for a batch of costs.

    .. math:: T = \arg\min_{T1 = a,\; T^\top 1 = b} \langle T, C \rangle + \varepsilon\, \mathrm{KL}(T \,|\, a b^\top)

    Solved by Sinkhorn iterations, f then g, or by steps that need fewer of them, see ``solver``. Each problem stops by
    itself when the L1 error of its marginals falls below ``tol``.

    Args:
        cost: ``(B, n, m)``; ``B`` is any number of leading dimensions, also none. float16 and bfloat16 are solved in
            float32.
        a: masses ``(B, n)``, or ``(n,)`` for all problems; None is uniform. Normalised to total 1, with the
            gradient of that. Zero, or a share of at most 1e-30 (1e-290 in float64), means that the row takes no part;
            its mass still has a gradient (in mode "unroll" 0 where rounding of huge costs has lost it).
        b: masses ``(B, m)`` likewise. The totals of a and b may differ by rounding only: by 1e-6 in float64, 1e-4 in
            float32, 2e-2 in half precision.
        eps: strength of the entropy, in units of the cost. ``torch.compile`` makes a graph for each value.
        log_a: logarithms of the masses instead of ``a``, as ``log_softmax`` gives them; ``-inf`` means no mass.
        log_b: likewise.
        max_iter: most iterations; each is one sweep over the cost.
        tol: bound on the L1 error of the marginals; 0 runs ``max_iter`` plain iterations.
        gradient: "implicit" differentiates the solution itself, for every output; "unroll" the iterations that were
            run, for ``transport_cost`` and ``value``; "none" takes the plan as a constant, so that only
            ``transport_cost`` has a gradient, by the cost alone.
        solver: "plain" runs Sinkhorn's iterations from f = g = 0. "auto" takes quasi-Newton steps on the dual where
            plain iterations are slow, each only if it provably raises the dual by what a plain iteration is bound to,
            and solves roughly at larger eps first where the start is far off. It gives the same solution within
            ``tol``; in mode "unroll", and with tol 0, it is "plain".
        backend: name of a backend, see :func:`otloss.backends`; None takes the best for the device.

    Returns:
        :class:`SinkhornOutput`; float64 for float64 input, else float32.

    Raises:
        TypeError: an argument is of the wrong type or dtype; float64 is mixed with another dtype.
        ValueError: shapes, devices or options do not fit; a mass is negative, totals differ, the cost is not finite.
            The values are looked at on a CPU; on a GPU that would stop its queue, so there only if the environment
            sets ``OTLOSS_CHECK_VALUES=1``.

    Warns:
        ConvergenceWarning: a problem did not reach ``tol``; ``converged`` says which. Given where values are looked at.

    Example:
        >>> import torch, otloss
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> out = otloss.sinkhorn(cost, torch.tensor([0.25, 0.75]), eps=0.1)
        >>> [round(p, 3) for p in out.plan.sum(0).tolist()]
        [0.5, 0.5]
        >>> round(out.transport_cost.item(), 3)
        0.25

    Source: Cuturi 2013 (arXiv 1306.0895); Schmitzer 2019 (1610.06519) for the stabilised iterations and for larger eps
    first; Liu and Nocedal 1989 for the quasi-Newton steps.
    """
    check_tensor("cost", cost, 2, "(B, n, m)")
    if 0 in cost.shape[-2:]:
        raise ValueError(f"cost must have at least one row and one column, got {tuple(cost.shape)}")
    return _solve(cost, None, a, b, log_a, log_b, eps, max_iter, tol, gradient, solver, backend)


def cosine_sinkhorn(
    x: Tensor,
    y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    eps: float = 0.05,
    log_a: Tensor | None = None,
    log_b: Tensor | None = None,
    max_iter: int = 1000,
    tol: float = 1e-5,
    gradient: str = "implicit",
    solver: str = "auto",
    backend: str | None = None,
) -> SinkhornOutput:
    r"""Entropic optimal transport between sets of features under the cosine cost.

    The costs of the batch are not stored (the reference backend excepted; the CPU backend holds that of one problem
    per thread), unless a gradient may follow and they are at most half as large as the features, where n and m are
    small beside d.

    .. math:: C_{ij} = 1 - \cos(x_i, y_j)

    Args:
        x: features ``(B, n, d)``.
        y: features ``(B, m, d)``.
        a, b, eps, log_a, log_b, max_iter, tol, gradient, solver, backend: as in :func:`sinkhorn`.

    Returns:
        :class:`SinkhornOutput`, differentiable by x and y.

    Raises:
        TypeError, ValueError: as :func:`sinkhorn`.

    Example:
        >>> import torch, otloss
        >>> x = torch.eye(3)
        >>> out = otloss.cosine_sinkhorn(x, x.flip(0), eps=0.02)
        >>> bool(out.transport_cost < 1e-6)
        True
    """
    check_features(x, y)
    return _solve(x, y, a, b, log_a, log_b, eps, max_iter, tol, gradient, solver, backend)
