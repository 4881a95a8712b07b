"""Optimal transport as modules: thin wrappers around the functions, which add an objective and a reduction."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from otloss.backends import check_backend
from otloss.checks import check_choice, check_count, check_device, check_number, check_tensor, working_dtype
from otloss.cost import cosine_cost
from otloss.gradients import MODES
from otloss.output import SinkhornOutput
from otloss.sinkhorn import SOLVERS, cosine_sinkhorn, sinkhorn

__all__ = ["CosineCost", "CosineSinkhornLoss", "SinkhornLoss"]

OBJECTIVES = ("transport_cost", "value", "divergence")
REDUCTIONS = ("mean", "sum", "none")


def _divergence(between: SinkhornOutput, xx: SinkhornOutput, yy: SinkhornOutput) -> Tensor:
    """The Sinkhorn divergence ``(B,)`` from the problem between two sets and those within each of them."""
    return between.value - 0.5 * (xx.value + yy.value)


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
        eps: float = 0.05,
        objective: str = "transport_cost",
        max_iter: int = 1000,
        tol: float = 1e-5,
        gradient: str = "implicit",
        reduction: str = "mean",
        backend: str | None = None,
        solver: str = "auto",
    ) -> None:
        super().__init__()
        check_number("eps", eps, positive=True)
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
        self.eps, self.objective, self.max_iter, self.tol = eps, objective, max_iter, tol
        self.gradient, self.reduction, self.backend, self.solver = gradient, reduction, backend, solver

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "eps": self.eps,
            "max_iter": self.max_iter,
            "tol": self.tol,
            "gradient": self.gradient,
            "solver": self.solver,
            "backend": self.backend,
        }

    def _reduce(self, loss: Tensor) -> Tensor:
        if self.reduction == "mean":
            return loss.sum() / max(loss.numel(), 1)  # 0 for an empty batch
        return loss.sum() if self.reduction == "sum" else loss

    def extra_repr(self) -> str:
        text = (
            f"eps={self.eps}, objective={self.objective!r}, max_iter={self.max_iter}, tol={self.tol}, "
            f"gradient={self.gradient!r}, reduction={self.reduction!r}, solver={self.solver!r}"
        )
        return text if self.backend is None else f"{text}, backend={self.backend!r}"


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
        max_iter, tol, gradient, solver, backend: as in :func:`otloss.sinkhorn`.
        reduction: what to do over problems: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or value, or ``gradient="none"`` is combined with an
            objective other than the transport cost.

    Source: Feydy et al. 2019 (arXiv:1810.08278) for the divergence.

    Example:
        >>> import torch, otloss
        >>> cost = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]])
        >>> otloss.SinkhornLoss(eps=0.01, reduction="none")(cost).round(decimals=3).tolist()
        [0.0, 1.0]
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
        cost_xx: Tensor | None = None,
        cost_yy: Tensor | None = None,
    ) -> Tensor:
        """Loss of ``cost (B, n, m)``. The marginals are those of :func:`otloss.sinkhorn`.

        The objective ``"divergence"`` needs ``cost_xx (B, n, n)`` and ``cost_yy (B, m, m)``; the others take neither.

        Returns:
            A scalar, or ``(B,)`` with ``reduction="none"``. It is float64 for float64 input and float32 otherwise.

        Raises:
            TypeError, ValueError: as :func:`otloss.sinkhorn`; ``cost_xx`` or ``cost_yy`` is missing, has a shape that
                does not fit the cost, or was given with another objective.
        """
        within = {"cost_xx": cost_xx, "cost_yy": cost_yy}
        self._check_within(cost, within)
        out = sinkhorn(cost, a, b, log_a=log_a, log_b=log_b, **self._options)
        if cost_xx is None or cost_yy is None:
            return self._reduce(getattr(out, self.objective))
        xx = sinkhorn(cost_xx, a, a, log_a=log_a, log_b=log_a, **self._options)
        yy = sinkhorn(cost_yy, b, b, log_a=log_b, log_b=log_b, **self._options)
        return self._reduce(_divergence(out, xx, yy))

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


class CosineSinkhornLoss(_TransportLoss):
    r"""Entropic optimal-transport loss between two sets of features under the cosine cost.

    The objectives ``"transport_cost"`` and ``"value"`` are those of `SinkhornLoss`. Let V be the value. The objective
    ``"divergence"`` is the Sinkhorn divergence

    .. math:: S(x, y) = V(x, y) - \tfrac12 V(x, x) - \tfrac12 V(y, y)

    The marginals of the three terms are (a, b), (a, a) and (b, b). Unlike V, the divergence is zero for equal sets. It
    solves three problems instead of one.

    Args:
        eps: strength of the entropy, in units of the cost.
        objective: ``"transport_cost"``, ``"value"`` or ``"divergence"``.
        max_iter, tol, gradient, solver, backend: as in :func:`otloss.sinkhorn`.
        reduction: what to do over problems: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        TypeError, ValueError: as `SinkhornLoss`.

    Source: Feydy et al. 2019 (arXiv:1810.08278) for the divergence.

    Example:
        >>> import torch, otloss
        >>> x = torch.randn(4, 20, 8)
        >>> loss = otloss.CosineSinkhornLoss(objective="divergence", reduction="none")
        >>> bool((loss(x, x).abs() < 1e-5).all()), bool((loss(x, torch.randn(4, 20, 8)) > 0).all())
        (True, True)
    """

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        a: Tensor | None = None,
        b: Tensor | None = None,
        *,
        log_a: Tensor | None = None,
        log_b: Tensor | None = None,
    ) -> Tensor:
        """Loss of ``x (B, n, d)`` and ``y (B, m, d)``. The marginals are those of :func:`otloss.sinkhorn`.

        Returns:
            A scalar, or ``(B,)`` with ``reduction="none"``. It is float64 for float64 input and float32 otherwise.
        """
        return self._reduce(self.per_problem(x, y, a, b, log_a=log_a, log_b=log_b)[0])

    def per_problem(
        self,
        x: Tensor,
        y: Tensor,
        a: Tensor | None = None,
        b: Tensor | None = None,
        *,
        log_a: Tensor | None = None,
        log_b: Tensor | None = None,
    ) -> tuple[Tensor, SinkhornOutput]:
        """The objective ``(B,)`` before reduction, and the solver's output for (x, y), which holds the diagnostics."""
        out = cosine_sinkhorn(x, y, a, b, log_a=log_a, log_b=log_b, **self._options)
        if self.objective != "divergence":
            return getattr(out, self.objective), out
        xx = cosine_sinkhorn(x, x, a, a, log_a=log_a, log_b=log_a, **self._options)
        yy = cosine_sinkhorn(y, y, b, b, log_a=log_b, log_b=log_b, **self._options)
        return _divergence(out, xx, yy), out
