"""Optimal transport as modules: thin wrappers around the functions, which add an objective and a reduction."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from otloss.arguments import Arguments, Ragged
from otloss.backends import check_backend
from otloss.checks import (
    check_choice,
    check_count,
    check_device,
    check_number,
    check_strength,
    check_tensor,
    working_dtype,
)
from otloss.cost import COSTS, cosine_cost
from otloss.gradients import MODES
from otloss.output import SinkhornOutput
from otloss.ragged import padded
from otloss.sinkhorn import SOLVERS, feature_sinkhorn, sinkhorn

__all__ = ["CosineCost", "CosineSinkhornLoss", "FeatureSinkhornLoss", "SinkhornLoss"]

OBJECTIVES = ("transport_cost", "value", "divergence")
REDUCTIONS = ("mean", "sum", "none")


class _Side(NamedTuple):
    """What a call says of one of the two sets."""

    mass: Ragged | None
    log_mass: Ragged | None
    mask: Ragged | None


class CosineCost(nn.Module):
    r"""Cosine cost matrix between two sets of features: the function :func:`otloss.cosine_cost` as a module.

    .. math:: C_{ij} = 1 - \frac{\langle x_i, y_j \rangle}{\lVert x_i \rVert \, \lVert y_j \rVert} \in [0, 2]

    Shapes, dtypes and errors are those of the function: ``x (B, n, d)``, ``y (B, m, d)`` give ``(B, n, m)``.

    Example:
        >>> import torch, otloss
        >>> otloss.CosineCost()(torch.eye(2), torch.eye(2)).tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Cost ``(B, n, m)`` of ``x (B, n, d)`` and ``y (B, m, d)``."""
        return cosine_cost(x, y)


class _TransportLoss(nn.Module):
    """What the two losses share: options, their checks, and the reduction over problems."""

    def __init__(
        self,
        eps: float | Tensor = 0.05,
        objective: str = "transport_cost",
        max_iter: int = 1000,
        tol: float = 1e-5,
        gradient: str = "implicit",
        reduction: str = "mean",
        backend: str | None = None,
        solver: str = "auto",
        rho_a: float | Tensor | None = None,
        rho_b: float | Tensor | None = None,
        partial: float | Tensor | None = None,
    ) -> None:
        super().__init__()
        for name, strength in (("eps", eps), ("rho_a", rho_a), ("rho_b", rho_b), ("partial", partial)):
            if strength is not None or name == "eps":
                check_strength(name, strength)
        check_choice("objective", objective, OBJECTIVES)
        check_count("max_iter", max_iter)
        check_number("tol", tol, positive=False)
        check_choice("gradient", gradient, MODES)
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("solver", solver, SOLVERS)
        if backend is not None:
            check_backend(backend)
        if gradient == "none" and objective != "transport_cost":
            raise ValueError(
                f"gradient 'none' differentiates objective 'transport_cost' only, got objective {objective!r}; "
                "take gradient 'implicit'"
            )
        if objective == "divergence" and rho_a is not rho_b and rho_a != rho_b:
            raise ValueError(f"objective 'divergence' needs one penalty for both sides, got {rho_a=} and {rho_b=}")
        if partial is not None and objective == "divergence":
            raise ValueError(
                f"objective 'divergence' does not take partial, got {partial=}: sets that differ in what is left would "
                "be at distance 0; take objective 'transport_cost' or 'value', or rho_a and rho_b"
            )
        if partial is not None and not (rho_a is None and rho_b is None):
            raise ValueError(f"give partial, or rho_a and rho_b, not both, got {partial=}, {rho_a=} and {rho_b=}")
        self.eps, self.objective, self.max_iter, self.tol = eps, objective, max_iter, tol
        self.gradient, self.reduction, self.backend, self.solver = gradient, reduction, backend, solver
        self.rho_a, self.rho_b, self.partial = rho_a, rho_b, partial

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "eps": self.eps,
            "rho_a": self.rho_a,
            "rho_b": self.rho_b,
            "partial": self.partial,
            "max_iter": self.max_iter,
            "tol": self.tol,
            "gradient": self.gradient,
            "solver": self.solver,
            "backend": self.backend,
        }

    def _objective_of(
        self,
        solve: Callable[..., SinkhornOutput],
        points: Sequence[Sequence[Any]],
        x: _Side,
        y: _Side,
        init: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, SinkhornOutput]:
        """The objective ``(B,)``, and the output of the problem between the sets.

        ``points`` are the first arguments of ``solve`` between the sets, within x and within y. The problem between the
        sets starts from ``init``.
        """

        def between(arguments: Sequence[Any], a: _Side, b: _Side, **more: Any) -> SinkhornOutput:
            masses = {"a": a.mass, "b": b.mass, "log_a": a.log_mass, "log_b": b.log_mass}
            return solve(*arguments, **masses, mask_x=a.mask, mask_y=b.mask, **more)

        out = between(points[0], x, y, init=init)
        if self.objective != "divergence":
            return getattr(out, self.objective), out
        within = between(points[1], x, x)._exact_value() + between(points[2], y, y)._exact_value()
        return out._exact_value() - 0.5 * within + 0.5 * out._mass_bias(), out

    def _reduce(self, loss: Tensor) -> Tensor:
        if self.reduction == "mean":
            return loss.sum() / max(loss.numel(), 1)  # 0 for an empty batch
        return loss.sum() if self.reduction == "sum" else loss

    def extra_repr(self) -> str:
        text = (
            f"eps={self.eps}, objective={self.objective!r}, max_iter={self.max_iter}, tol={self.tol}, "
            f"gradient={self.gradient!r}, reduction={self.reduction!r}, solver={self.solver!r}"
        )
        some = {name: getattr(self, name) for name in ("rho_a", "rho_b", "partial", "backend")}
        return ", ".join([text, *(f"{name}={value!r}" for name, value in some.items() if value is not None)])


class SinkhornLoss(_TransportLoss):
    r"""Entropic optimal-transport loss on a given cost.

    .. math:: T = \arg\min_{T1 = a,\, T^\top 1 = b} \langle T, C\rangle + \varepsilon\, \mathrm{KL}(T \,|\, a b^\top)

    ``objective="transport_cost"`` gives the sharp cost :math:`\langle T, C \rangle`. ``"value"`` gives the minimum V.
    ``"divergence"`` is the Sinkhorn divergence

    .. math:: S = V(C_{xy}; a, b) - \tfrac12 V(C_{xx}; a, a) - \tfrac12 V(C_{yy}; b, b)

    of a cost between two sets and the costs within each of them, which the call takes as ``cost_xx`` and ``cost_yy``.
    It solves three problems. Unlike V it is zero for equal sets.

    Args:
        eps: strength of the entropy, in units of the cost.
        objective: ``"transport_cost"``, ``"value"`` or ``"divergence"``.
        max_iter, tol, gradient, solver, backend, rho_a, rho_b, partial: as in :func:`otloss.sinkhorn`. A tensor eps,
            penalty or partial may be an ``nn.Parameter``. The divergence needs rho_a = rho_b; it then holds
            eps (m_a - m_b)^2 / 2 too, m the totals. It does not take partial.
        reduction: what to do over problems: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or value; ``gradient="none"`` is combined with an
            objective other than the transport cost, or ``partial`` with the divergence or a penalty.

    Source: Feydy et al. 2019 (arXiv:1810.08278) for the divergence.

    Example:
        >>> import torch, otloss
        >>> cost = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]])
        >>> otloss.SinkhornLoss(eps=0.01, reduction="none")(cost).round(decimals=3).tolist()
        [0.0, 1.0]
        >>> far = torch.tensor([[0.0, 1.0], [1.0, 0.0], [9.0, 9.0]])  # the last row is far from all: it is left
        >>> otloss.SinkhornLoss(eps=0.01, partial=0.6)(far).round(decimals=3).item()
        0.0
        >>> x, y = torch.rand(20, 2), torch.rand(30, 2)
        >>> loss, cost = otloss.SinkhornLoss(objective="divergence"), otloss.sqeuclidean_cost
        >>> bool(loss(cost(x, y), cost_xx=cost(x, x), cost_yy=cost(y, y)) > 0)
        True
    """

    def forward(
        self,
        cost: Tensor,
        a: Tensor | None = None,
        b: Tensor | None = None,
        *,
        log_a: Tensor | None = None,
        log_b: Tensor | None = None,
        mask_x: Tensor | None = None,
        mask_y: Tensor | None = None,
        cost_xx: Tensor | None = None,
        cost_yy: Tensor | None = None,
        init: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Loss of ``cost (B, n, m)``. Marginals, masks and init are those of :func:`otloss.sinkhorn`.

        The objective ``"divergence"`` needs ``cost_xx (B, n, n)`` and ``cost_yy (B, m, m)``; the others take neither.
        Of its three problems the one between the sets starts from ``init``.

        Returns:
            A scalar, or ``(B,)`` with ``reduction="none"``. It is float64 for float64 input and float32 otherwise.

        Raises:
            TypeError, ValueError: as :func:`otloss.sinkhorn`; ``cost_xx`` or ``cost_yy`` is missing, has a shape that
                does not fit the cost, or was given with another objective.
        """
        within = {"cost_xx": cost_xx, "cost_yy": cost_yy}
        self._check_within(cost, within)
        solve = functools.partial(sinkhorn, **self._options)
        costs = (cost,), (cost_xx,), (cost_yy,)
        loss, _ = self._objective_of(solve, costs, _Side(a, log_a, mask_x), _Side(b, log_b, mask_y), init)
        return self._reduce(loss)

    def _check_within(self, cost: object, within: dict[str, Tensor | None]) -> None:
        """Check that the costs within the sets are there when they are needed, and that they fit the cost."""
        missing = [name for name, value in within.items() if value is None]
        if self.objective != "divergence":
            given = [name for name in within if name not in missing]
            if given:
                raise ValueError(
                    f"{' and '.join(given)} must be given with objective 'divergence' only, got {self.objective!r}"
                )
            return
        if missing:
            raise ValueError(
                f"objective 'divergence' needs cost_xx (B, n, n) and cost_yy (B, m, m) beside the cost, "
                f"missing: {' and '.join(missing)}"
            )
        check_tensor("cost", cost, 2, "(B, n, m)")
        assert isinstance(cost, Tensor)
        for (name, value), count in zip(within.items(), cost.shape[-2:], strict=True):
            wanted = (*cost.shape[:-2], count, count)
            check_tensor(name, value, 2, str(wanted))
            assert value is not None
            if value.shape != wanted:
                raise ValueError(f"{name} must have shape {wanted}, got {tuple(value.shape)}")
        working_dtype(cost=cost, **within)
        check_device(cost=cost, **within)


class FeatureSinkhornLoss(_TransportLoss):
    r"""Entropic optimal-transport loss between two sets of features: :func:`otloss.feature_sinkhorn` as a module.

    The objectives ``"transport_cost"`` and ``"value"`` are those of `SinkhornLoss`. Let V be the value. The objective
    ``"divergence"`` is the Sinkhorn divergence

    .. math:: S(x, y) = V(x, y) - \tfrac12 V(x, x) - \tfrac12 V(y, y)

    The marginals of the three terms are (a, b), (a, a) and (b, b). Unlike V, the divergence is zero for equal sets. It
    solves three problems instead of one.

    Args:
        cost: ``"cosine"``, ``"sqeuclidean"`` or ``"dot"``, as in :func:`otloss.feature_sinkhorn`.
        eps: strength of the entropy, in units of the cost.
        objective: ``"transport_cost"``, ``"value"`` or ``"divergence"``.
        max_iter, tol, gradient, solver, backend, rho_a, rho_b, partial: as in :func:`otloss.sinkhorn`. A tensor eps,
            penalty or partial may be an ``nn.Parameter``. The divergence needs rho_a = rho_b; it then holds
            eps (m_a - m_b)^2 / 2 too, m the totals. It does not take partial.
        reduction: what to do over problems: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        TypeError, ValueError: as `SinkhornLoss`.

    Source: Feydy et al. 2019 (arXiv:1810.08278) for the divergence.

    Example:
        >>> import torch, otloss
        >>> x = torch.randn(4, 20, 8)
        >>> loss = otloss.FeatureSinkhornLoss("sqeuclidean", eps=0.5, objective="divergence", reduction="none")
        >>> bool((loss(x, x).abs() < 1e-4).all()), bool((loss(x, torch.randn(4, 20, 8)) > 0).all())
        (True, True)
    """

    def __init__(self, cost: str = "cosine", eps: float | Tensor = 0.05, **options: Any) -> None:
        super().__init__(eps, **options)
        check_choice("cost", cost, tuple(COSTS))
        self.cost = cost

    def forward(
        self,
        x: Ragged,
        y: Ragged,
        a: Ragged | None = None,
        b: Ragged | None = None,
        *,
        log_a: Ragged | None = None,
        log_b: Ragged | None = None,
        mask_x: Ragged | None = None,
        mask_y: Ragged | None = None,
        init: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Loss of ``x (B, n, d)`` and ``y (B, m, d)``, or of lists of sets, as in :func:`otloss.feature_sinkhorn`.

        Of the three problems of the divergence the one between the sets starts from ``init``.

        Returns:
            A scalar, or ``(B,)`` with ``reduction="none"``. It is float64 for float64 input and float32 otherwise.
        """
        loss, _ = self.per_problem(x, y, a, b, log_a=log_a, log_b=log_b, mask_x=mask_x, mask_y=mask_y, init=init)
        return self._reduce(loss)

    def per_problem(
        self,
        x: Ragged,
        y: Ragged,
        a: Ragged | None = None,
        b: Ragged | None = None,
        *,
        log_a: Ragged | None = None,
        log_b: Ragged | None = None,
        mask_x: Ragged | None = None,
        mask_y: Ragged | None = None,
        init: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, SinkhornOutput]:
        """The objective ``(B,)`` before reduction, and the solver's output for (x, y), which holds the diagnostics."""
        solve = functools.partial(feature_sinkhorn, cost=self.cost, **self._options)
        x, y, said = padded(x, y, Arguments(self.eps, a, b, log_a, log_b, mask_x, mask_y))
        of_x, of_y = _Side(said.a, said.log_a, said.mask_x), _Side(said.b, said.log_b, said.mask_y)
        return self._objective_of(solve, ((x, y), (x, x), (y, y)), of_x, of_y, init)

    def extra_repr(self) -> str:
        return f"cost={self.cost!r}, {super().extra_repr()}"


class CosineSinkhornLoss(FeatureSinkhornLoss):
    """`FeatureSinkhornLoss` under the cosine cost, which is not stored. It takes the same options but ``cost``.

    Example:
        >>> import torch, otloss
        >>> x = torch.randn(4, 20, 8)
        >>> loss = otloss.CosineSinkhornLoss(objective="divergence", reduction="none")
        >>> bool((loss(x, x).abs() < 1e-5).all()), bool((loss(x, torch.randn(4, 20, 8)) > 0).all())
        (True, True)
    """

    def __init__(self, eps: float | Tensor = 0.05, *arguments: Any, **options: Any) -> None:
        _TransportLoss.__init__(self, eps, *arguments, **options)
        self.cost = "cosine"

    def extra_repr(self) -> str:
        return _TransportLoss.extra_repr(self)
