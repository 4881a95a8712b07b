"""The verbs: entropic optimal transport for batches of problems, with exact gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from otloss.arguments import Arguments, Ragged, describe
from otloss.autograd import solve
from otloss.backends.protocol import Shift, Solution, is_relaxed
from otloss.checks import check_choice, check_count, check_features, check_number, check_tensor
from otloss.compat import is_exporting
from otloss.cost import COSTS
from otloss.gradients import MODES, State
from otloss.operators import Options
from otloss.output import PlanSource, SinkhornOutput
from otloss.partial import Slack
from otloss.ragged import padded

__all__ = ["SinkhornOutput", "cosine_sinkhorn", "feature_sinkhorn", "sinkhorn"]

SOLVERS = ("auto", "plain")

def _solve(
    left: Tensor,
    right: Tensor | None,
    kind: str,
    said: Arguments,
    max_iter: int,
    tol: float,
    gradient: str,
    solver: str,
    backend: str | None,
) -> SinkhornOutput:
    check_number("tol", tol, positive=False)
    check_count("max_iter", max_iter)
    check_choice("gradient", gradient, MODES)
    check_choice("solver", solver, SOLVERS)
    described = describe(left, right, kind, said, backend)
    problem, given, slack = described.problem, described.given, described.slack
    if is_relaxed(problem) and gradient == "unroll":
        raise ValueError("gradient 'unroll' has no penalties rho_a and rho_b; take gradient 'implicit'")
    if said.init is not None and gradient == "unroll":
        raise ValueError("gradient 'unroll' differentiates iterations from potentials 0, without init; take 'implicit'")
    if gradient == "none":  # no output is differentiated by the masses
        problem = problem.with_masses(problem.a.detach(), problem.b.detach())
        slack = None if slack is None else Slack(slack.total.detach(), slack.rest.detach(), slack.price)
    accelerate = solver == "auto" and gradient != "unroll" and tol > 0
    # Whether keeping the cost pays depends on the sizes, which an exported graph may leave open.
    keep = gradient != "unroll" and torch.is_grad_enabled() and not is_exporting()
    options = Options(int(max_iter), float(tol), accelerate, keep, gradient, described.backend)
    cost, value, error, *rest = solve(problem, given, options, described.start)
    state = State(*rest)
    shift = Shift(state.row_shift, state.column_shift) if problem.right is None else None
    solution = Solution(state.f, state.g, cost, value, state.n_iter, error, shift)
    source = PlanSource(problem.with_masses(state.a, state.b), described, slack)
    return SinkhornOutput(source, solution, gradient, options.tol)


def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    eps: float | Tensor = 0.05,
    log_a: Tensor | None = None,
    log_b: Tensor | None = None,
    mask_x: Tensor | None = None,
    mask_y: Tensor | None = None,
    rho_a: float | Tensor | None = None,
    rho_b: float | Tensor | None = None,
    partial: float | Tensor | None = None,
    init: tuple[Tensor, Tensor] | None = None,
    max_iter: int = 1000,
    tol: float = 1e-5,
    gradient: str = "implicit",
    solver: str = "auto",
    backend: str | None = None,
) -> SinkhornOutput:
    r"""Entropic optimal transport for a batch of costs.

    .. math:: T = \arg\min_{T1 = a,\; T^\top 1 = b} \langle T, C \rangle + \varepsilon\, \mathrm{KL}(T \,|\, a b^\top)

    Solved by Sinkhorn iterations, f then g, or by steps that need fewer of them, see ``solver``. Each problem stops by
    itself when the L1 error of its marginals falls below ``tol``. With penalties in place of constraints,

    .. math:: T = \arg\min_T \langle T, C \rangle + \varepsilon\, \mathrm{KL}(T | a b^\top)
              + \rho_a \mathrm{KL}(T1 | a) + \rho_b \mathrm{KL}(T^\top 1 | b), \qquad
              \mathrm{KL}(p | q) = \sum p \log(p/q) - p + q.

    With ``partial`` = s, T1 <= a, T'1 <= b and the total of T is s. What is not sent goes to one more column, and from
    one more row to b. Their cost is a constant, their common pair is forbidden, and outputs do not show them. But the
    entropy counts them: with the plan T' and masses a', b' that include them, and M = 1'a + 1'b - s,

    .. math:: T' = \arg\min \langle T, C \rangle + \varepsilon\, \mathrm{KL}(T' \,|\, a' b'^\top / M).

    POT's ``entropic_partial_wasserstein`` counts the sum of T log T over what is sent alone, so that its plan is
    another one at the same eps. For eps to 0 both become the exact partial transport.

    The leading dimensions of all arguments are broadcast against each other, as PyTorch does it: one cost may serve
    many marginals, and the reverse. The CPU kernels read a cost that all problems share from one place; its gradient is
    made for each and summed.

    Args:
        cost: ``(B, n, m)``; ``B`` is any number of leading dimensions, also none. float16 and bfloat16 are solved in
            float32. ``inf`` forbids a pair: there the plan is 0, ``log_plan`` is -inf and the gradient is 0. (What has
            overflowed in half precision is inf, too.) Pairs that are left may admit no plan with these marginals, or
            one in blocks that share no mass. The first does not converge; in the second the potentials of each block
            have a constant of their own. The gradient by the mass of a point that has none and is forbidden to all that
            have is finite, but means nothing.

        a: masses ``(B, n)``, or ``(n,)`` for all problems; None is uniform. Normalised to total 1, with the
            gradient of that, except under penalties. Zero, or a share of at most 1e-30 (1e-290 in float64), means that
            the row takes no part; its mass still has a gradient (in mode "unroll" 0 where rounding of huge costs has
            lost it).
        b: masses ``(B, m)`` likewise. The totals of a and b may differ by rounding only: by 1e-6 in float64, 1e-4 in
            float32, 2e-2 in half precision.
        log_a: logarithms of the masses instead of ``a``, as ``log_softmax`` gives them; ``-inf`` means no mass.
        log_b: likewise.
        mask_x: which rows take part, ``(B, n)`` bool. The others have no mass; what stands in their costs does not
            matter, and every gradient by it is 0. Uniform marginals are uniform over the rest. Potentials are 0 there.
        mask_y: likewise, which columns take part, ``(B, m)``.

        eps: strength of the entropy, in units of the cost: a number, or a tensor ``(B,)`` or ``()``, which gets a
            gradient. ``torch.compile`` makes a graph for each number, and one for all tensors.
        rho_a: penalty on the marginal a, in units of the cost: a number, or a tensor ``(B,)`` or ``()``, which gets a
            gradient. None makes it a constraint. With a penalty on either side masses are taken as they are, and their
            totals are free. The CPU kernels take quasi-Newton steps here too, the other backends plain iterations.
        rho_b: likewise on the marginal b.
        partial: how much mass is sent: a number, or a tensor ``(B,)`` or ``()``, which gets a gradient; positive, and
            at most the smaller of the totals of a and b. Masses are then taken as they are, and what a point sends or
            gets is at most its mass. None is a constraint on every point. It does not go with rho_a and rho_b.

        init: potentials ``(f, g)`` to start from, ``(B, n)`` and ``(B, m)``: in a training loop those of the step
            before, ``(out.f.detach(), out.g.detach())``. The solution is the same within ``tol``, in fewer iterations.
            From a start that is worse than none, iterations begin as if there were none. It is a constant of every
            gradient. What it holds at points without mass does not matter. Iterations are f, then g, so that g alone
            decides. Not with ``gradient="unroll"``.
        max_iter: most iterations; each is one sweep over the cost.
        tol: bound on the L1 error of the marginals; 0 runs ``max_iter`` plain iterations.
        gradient: "implicit" differentiates the solution itself, for every output; "unroll" the iterations that were
            run, for ``transport_cost`` and ``value``; "none" takes the plan as a constant, so that only
            ``transport_cost`` has a gradient, by the cost alone.
        solver: "plain" runs Sinkhorn's iterations from f = g = 0. "auto" takes quasi-Newton steps on the dual where
            plain iterations are slow, each only if it provably raises the dual by what a plain iteration is bound to,
            and solves roughly at larger eps first where the start is far off. The solution is the same within ``tol``.
            The problem of a set with itself, of equal masses and of equal features or a symmetric cost, has f = g, and
            takes about five sweeps at every eps if exp(-C/eps) is positive definite, as distances have it. On GPUs
            "auto" is "plain" for all other problems. In mode "unroll", and with tol 0, it is "plain".
        backend: name of a backend, see :func:`otloss.backends`; None takes the best for the device.

    Returns:
        :class:`SinkhornOutput`; float64 for float64 input, else float32.

    Raises:
        TypeError: an argument is of the wrong type or dtype; float64 is mixed with another dtype.
        ValueError: shapes, devices or options do not fit; a mass is negative, totals differ, the cost is NaN or -inf,
            or inf in all pairs with mass of a row or column with mass. The values are looked at on a CPU; on a GPU that
            would stop its queue, so there only if the environment sets ``OTLOSS_CHECK_VALUES=1``.

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
        >>> again = otloss.sinkhorn(1.01 * cost, torch.tensor([0.25, 0.75]), eps=0.1, init=(out.f, out.g))
        >>> bool(again.n_iter < out.n_iter)
        True

    Source: Cuturi 2013 (arXiv 1306.0895); Schmitzer 2019 (1610.06519) for the stabilised iterations and for larger eps
    first; Liu and Nocedal 1989 for the quasi-Newton steps; Chizat et al. 2018 (1607.05816) for penalties. They are
    those of POT (``reg_type="kl"``) and of geomloss (``reach**p``), whose value has ``eps (m_a + m_b) / 2`` for
    ``eps m_a m_b`` here, where m is a total.
    """
    check_tensor("cost", cost, 2, "(B, n, m)")
    if 0 in cost.shape[-2:]:
        raise ValueError(f"cost must have at least one row and one column, got {tuple(cost.shape)}")
    said = Arguments(eps, a, b, log_a, log_b, mask_x, mask_y, rho_a, rho_b, partial, init)
    return _solve(cost, None, "cosine", said, max_iter, tol, gradient, solver, backend)


def feature_sinkhorn(
    x: Ragged,
    y: Ragged,
    a: Ragged | None = None,
    b: Ragged | None = None,
    *,
    cost: str = "cosine",
    eps: float | Tensor = 0.05,
    log_a: Ragged | None = None,
    log_b: Ragged | None = None,
    mask_x: Ragged | None = None,
    mask_y: Ragged | None = None,
    rho_a: float | Tensor | None = None,
    rho_b: float | Tensor | None = None,
    partial: float | Tensor | None = None,
    init: tuple[Tensor, Tensor] | None = None,
    max_iter: int = 1000,
    tol: float = 1e-5,
    gradient: str = "implicit",
    solver: str = "auto",
    backend: str | None = None,
) -> SinkhornOutput:
    r"""Entropic optimal transport between sets of features.

    .. math::
        C_{ij} = 1 - \cos(x_i, y_j) \;\text{("cosine")}, \qquad
        \lVert x_i - y_j \rVert^2 \;\text{("sqeuclidean")}, \qquad
        -\langle x_i, y_j \rangle \;\text{("dot")}

    geomloss halves the second, and so does flash-sinkhorn with ``half_cost=True``: for their plan take twice their eps.

    The costs of the batch are not stored, unless a gradient may follow and they are at most half as large as the
    features, where n and m are small beside d. The reference backend stores them. The CPU backend holds that of one
    problem per thread. The Triton backend holds at most 32 MiB of them at a time, and in the backward as much of their
    gradient, but in float64 always those of one problem. Under ``partial`` the costs are stored.

    Squared distances are sums of squared differences, so they keep their digits wherever the points lie. A tensor eps
    is divided out of the features, of which it makes a copy.

    Args:
        x: features ``(B, n, d)``. Sets of different sizes are a list of B tensors ``(n_k, d)``, or a nested tensor of
            jagged layout; their masses and masks are then lists or nested tensors likewise. They are padded with zeros
            to the longest, which masks leave out: there, potentials and plan are 0.
        y: features ``(B, m, d)`` likewise.
        cost: "cosine", "sqeuclidean" or "dot". Any other cost is made by a function of yours, for :func:`sinkhorn`.
        a, b, log_a, log_b, mask_x, mask_y: as in :func:`sinkhorn`. Features that a mask leaves out do not matter.
        eps, rho_a, rho_b, partial, init: as in :func:`sinkhorn`.
        max_iter, tol, gradient, solver, backend: as in :func:`sinkhorn`.

    Returns:
        :class:`SinkhornOutput`, differentiable by x and y.

    Raises:
        TypeError, ValueError: as :func:`sinkhorn`.

    Example:
        >>> import torch, otloss
        >>> x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
        >>> out = otloss.feature_sinkhorn(x, x + 1, cost="sqeuclidean")
        >>> round(out.transport_cost.item(), 3)
        2.0
    """
    check_choice("cost", cost, tuple(COSTS))
    said = Arguments(eps, a, b, log_a, log_b, mask_x, mask_y, rho_a, rho_b, partial, init)
    x, y, said = padded(x, y, said)
    check_features(x, y)
    return _solve(x, y, cost, said, max_iter, tol, gradient, solver, backend)


def cosine_sinkhorn(
    x: Ragged,
    y: Ragged,
    a: Ragged | None = None,
    b: Ragged | None = None,
    *,
    eps: float | Tensor = 0.05,
    log_a: Ragged | None = None,
    log_b: Ragged | None = None,
    mask_x: Ragged | None = None,
    mask_y: Ragged | None = None,
    rho_a: float | Tensor | None = None,
    rho_b: float | Tensor | None = None,
    partial: float | Tensor | None = None,
    init: tuple[Tensor, Tensor] | None = None,
    max_iter: int = 1000,
    tol: float = 1e-5,
    gradient: str = "implicit",
    solver: str = "auto",
    backend: str | None = None,
) -> SinkhornOutput:
    r"""Entropic optimal transport between sets of features under the cosine cost, which is not stored.

    .. math:: C_{ij} = 1 - \cos(x_i, y_j)

    The short form of :func:`feature_sinkhorn` with ``cost="cosine"``. All arguments and errors are those of it.

    Args:
        x: features ``(B, n, d)``, or a list of sets of different sizes.
        y: features ``(B, m, d)`` likewise.
        a, b, eps, log_a, log_b, mask_x, mask_y, rho_a, rho_b, partial, init: as in :func:`sinkhorn`.
        max_iter, tol, gradient, solver, backend: as in :func:`sinkhorn`.

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
    said = Arguments(eps, a, b, log_a, log_b, mask_x, mask_y, rho_a, rho_b, partial, init)
    x, y, said = padded(x, y, said)
    check_features(x, y)
    return _solve(x, y, "cosine", said, max_iter, tol, gradient, solver, backend)
