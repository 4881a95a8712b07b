"""OTT-JAX as a solver of a `Case`: PyTorch's autograd asks JAX for the products with its Jacobians, of any order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.cases import Case, Missing
from benchmarks.peers.ott_peers import RIDGE
from benchmarks.peers.ways import Library, Way

Function = Callable[..., Any]
"""From JAX arrays to one JAX array."""


def _arrays(tensors: tuple[Tensor, ...]) -> list[Any]:
    import jax.numpy as jnp

    return [jnp.asarray(t.detach().numpy()) for t in tensors]


class _InJax(torch.autograd.Function):
    """A function of JAX between tensors. Its gradient is such a function too, so that it can be taken twice."""

    @staticmethod
    def forward(ctx: Any, function: Function, *tensors: Tensor) -> Tensor:
        import jax

        ctx.function = function
        ctx.save_for_backward(*tensors)
        with jax.enable_x64(True):
            return torch.from_numpy(np.array(function(*_arrays(tensors)), dtype=np.float64))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]

        def of(k: int) -> Function:
            def pulled(*arrays: Any) -> Any:
                import jax

                *inputs, cotangent = arrays
                out, pull = jax.vjp(ctx.function, *inputs)
                return pull(cotangent.astype(out.dtype))[k]

            return pulled

        grads = [_InJax.apply(of(k), *tensors, *upstream) if need else None for k, need in enumerate(needed)]
        return (None, *grads)


def _solver(case: Case, implicit: bool, danskin: bool | None) -> Any:
    from ott.solvers.linear import implicit_differentiation
    from ott.solvers.linear.sinkhorn import Sinkhorn

    how = implicit_differentiation.ImplicitDiff(solver_kwargs={"ridge_kernel": RIDGE}) if implicit else None
    return Sinkhorn(
        threshold=1e-12, max_iterations=case.iterations, inner_iterations=10, implicit_diff=how, use_danskin=danskin
    )


def _way(implicit: bool = True, danskin: bool | None = None, wrap: Callable[[Function], Function] | None = None) -> Way:
    def solve(case: Case, name: str) -> Tensor:
        import jax
        import jax.numpy as jnp
        from ott.geometry.geometry import Geometry
        from ott.geometry.pointcloud import PointCloud
        from ott.problems.linear.linear_problem import LinearProblem

        rhos = case.options(rho_a="a", rho_b="b", start="start")
        start = rhos.pop("start", None)
        tensors = {"a": case.a, "b": case.b}
        tensors |= {"cost": case.cost} if case.cost is not None else dict(zip("xy", case.points(), strict=True))
        tensors["eps"] = torch.as_tensor(case.eps, dtype=torch.float64).expand(len(case.a))
        if start is not None:
            tensors |= {"f": start[0], "g": start[1]}
        solver = _solver(case, implicit, danskin)

        def one(*arrays: Any) -> Any:
            given = dict(zip(tensors, arrays, strict=True))
            eps, a, b = given["eps"], given["a"], given["b"]
            strength = eps if isinstance(case.eps, Tensor) else case.eps  # a number says which side is balanced
            taus = {f"tau_{side}": rho / (rho + strength) for side, rho in rhos.items()}
            if "cost" in given:
                geometry = Geometry(cost_matrix=given["cost"], epsilon=eps)
            else:
                geometry = PointCloud(given["x"], given["y"], epsilon=eps)
            if rhos:  # its plan has the entropy relative to 1, not to ab', which is a change of the cost
                cost = geometry.cost_matrix
                shift = eps * (jnp.log(a)[:, None] + jnp.log(b)[None, :])
                plan = solver(LinearProblem(Geometry(cost_matrix=cost - shift, epsilon=eps), a, b, **taus)).matrix
                if name not in ("plan", "cost"):
                    raise Missing(f"returns no {name} of this entropy")
                return plan if name == "plan" else (plan * cost).sum()
            # Its potentials hold the masses: T = exp((f + g - C) / eps).
            init = (given["f"] + eps * jnp.log(a), given["g"] + eps * jnp.log(b)) if start is not None else None
            out = solver(LinearProblem(geometry, a, b, **taus), init)
            if name == "log_plan":
                return (out.f[:, None] + out.g[None, :] - geometry.cost_matrix) / eps
            if name == "n_iter":
                return jnp.asarray(out.n_iters, dtype=eps.dtype)
            return getattr(out, {"cost": "primal_cost", "value": "reg_ot_cost", "plan": "matrix"}[name])

        batch = jax.vmap(one)
        return _InJax.apply(batch if wrap is None else wrap(batch), *tensors.values())  # type: ignore[no-any-return]

    return solve


def _jitted(function: Function) -> Function:
    import jax

    return jax.jit(function)  # type: ignore[no-any-return]


def _divergence(case: Case) -> Tensor:
    from ott.geometry.pointcloud import PointCloud
    from ott.solvers.linear import implicit_differentiation
    from ott.tools.sinkhorn_divergence import sinkhorn_divergence

    case.one()
    rhos = case.options(rho_a="a", rho_b="b")
    taus = {f"tau_{side}": rho / (rho + float(case.eps)) for side, rho in rhos.items()}
    how = implicit_differentiation.ImplicitDiff(solver_kwargs={"ridge_kernel": RIDGE})
    options = {"threshold": 1e-10, "max_iterations": case.iterations, "implicit_diff": how, **taus}

    def divergence(x: Any, y: Any, a: Any, b: Any) -> Any:
        return sinkhorn_divergence(PointCloud, x, y, a=a, b=b, epsilon=float(case.eps), solve_kwargs=options)[0]

    x, y = case.points()
    return _InJax.apply(divergence, x[0], y[0], case.a[0], case.b[0])[None]  # type: ignore[no-any-return]


def _hessian(given: Case) -> Tensor:
    """The second derivatives of the value by the cost ``(n, m, n, m)``, by JAX's own transformation."""
    import jax
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem

    given.one()
    solver = _solver(given, implicit=True, danskin=False)

    def value(cost: Any, a: Any, b: Any) -> Any:
        return solver(LinearProblem(Geometry(cost_matrix=cost, epsilon=float(given.eps)), a, b)).reg_ot_cost

    return _InJax.apply(jax.hessian(value), given.matrix()[0], given.a[0], given.b[0])  # type: ignore[no-any-return]


def _ragged(x: list[Tensor], y: list[Tensor], eps: float) -> Tensor:
    from ott.tools.segment_sinkhorn import segment_sinkhorn

    sizes = [tuple(len(part) for part in side) for side in (x, y)]
    most = max(max(side) for side in sizes)

    def values(x: Any, y: Any) -> Any:
        return segment_sinkhorn(
            x, y, num_segments=len(sizes[0]), max_measure_size=most, num_per_segment_x=sizes[0],
            num_per_segment_y=sizes[1], epsilon=eps, sinkhorn_kwargs={"threshold": 1e-10, "max_iterations": 5000},
        )  # fmt: skip

    return _InJax.apply(values, torch.cat(x), torch.cat(y))  # type: ignore[no-any-return]


def _stream(x: Tensor, y: Tensor, eps: float, iterations: int) -> Tensor:
    from ott.geometry.pointcloud import PointCloud
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    solver = Sinkhorn(threshold=-1.0, min_iterations=iterations, max_iterations=iterations, inner_iterations=iterations)

    def value(x: Any, y: Any) -> Any:
        return solver(LinearProblem(PointCloud(x, y, epsilon=eps, batch_size=256))).reg_ot_cost

    return _InJax.apply(value, x[0], y[0])  # type: ignore[no-any-return]


OTT = Library(
    "OTT-JAX",
    {
        "implicit": _way(),
        "implicit, without Danskin": _way(danskin=False),
        "unrolled": _way(implicit=False),
    },
    {
        "divergence": {"sinkhorn_divergence": _divergence},
        "ragged": {"segment_sinkhorn": _ragged},
        "stream": {"PointCloud, batch_size": _stream},
        "twice": {"jax.hessian": _hessian},
        "compiled": {"jax.jit": _way(wrap=_jitted)},
        "vmapped": {"jax.vmap": _way()},
    },
    needs=("jax", "ott"),
    jax=True,
)
