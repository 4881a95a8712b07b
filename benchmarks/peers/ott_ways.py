"""OTT-JAX as a solver of a `Case`: PyTorch's autograd asks JAX for the products with its Jacobians, of any order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
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
        pulls = [_pull(ctx.function, k) if need else None for k, need in enumerate(needed)]
        return (None, *(None if pull is None else _InJax.apply(pull, *tensors, *upstream) for pull in pulls))


@functools.cache  # JAX compiles a function once, and each new one anew
def _pull(function: Function, k: int) -> Function:
    """From inputs and a cotangent to the gradient by the k-th input."""
    import jax

    def pulled(*arrays: Any) -> Any:
        *inputs, cotangent = arrays
        out, pull = jax.vjp(function, *inputs)
        return pull(cotangent.astype(out.dtype))[k]

    return jax.jit(pulled)  # type: ignore[no-any-return]


def _solver(iterations: int, implicit: bool, danskin: bool | None) -> Any:
    from ott.solvers.linear import implicit_differentiation
    from ott.solvers.linear.sinkhorn import Sinkhorn

    how = implicit_differentiation.ImplicitDiff(solver_kwargs={"ridge_kernel": RIDGE}) if implicit else None
    return Sinkhorn(
        threshold=1e-12, max_iterations=iterations, inner_iterations=10, implicit_diff=how, use_danskin=danskin
    )


@dataclass(frozen=True)
class _Asked:
    """What a compiled function is made for: names of its inputs and output, options, and how it is differentiated."""

    inputs: tuple[str, ...]
    output: str
    eps: float | None
    rhos: tuple[tuple[str, float], ...]
    iterations: int
    implicit: bool
    danskin: bool | None


@functools.cache
def _batched(asked: _Asked) -> Function:
    """One call for all problems."""
    import jax
    import jax.numpy as jnp
    from ott.geometry.geometry import Geometry
    from ott.geometry.pointcloud import PointCloud
    from ott.problems.linear.linear_problem import LinearProblem

    solver, name = _solver(asked.iterations, asked.implicit, asked.danskin), asked.output

    def one(*arrays: Any) -> Any:
        given = dict(zip(asked.inputs, arrays, strict=True))
        eps, a, b = given["eps"], given["a"], given["b"]
        strength = eps if asked.eps is None else asked.eps  # a number says which side is balanced
        taus = {f"tau_{side}": rho / (rho + strength) for side, rho in asked.rhos}
        if "cost" in given:
            geometry = Geometry(cost_matrix=given["cost"], epsilon=eps)
        else:
            geometry = PointCloud(given["x"], given["y"], epsilon=eps)
        if asked.rhos:  # its plan has the entropy relative to 1, not to ab', which is a change of the cost
            cost = geometry.cost_matrix
            shift = eps * (jnp.log(a)[:, None] + jnp.log(b)[None, :])
            plan = solver(LinearProblem(Geometry(cost_matrix=cost - shift, epsilon=eps), a, b, **taus)).matrix
            return plan if name == "plan" else (plan * cost).sum()
        # Its potentials hold the masses: T = exp((f + g - C) / eps).
        init = (given["f"] + eps * jnp.log(a), given["g"] + eps * jnp.log(b)) if "f" in given else None
        out = solver(LinearProblem(geometry, a, b), init)
        if name == "log_plan":
            return (out.f[:, None] + out.g[None, :] - geometry.cost_matrix) / eps
        if name == "n_iter":
            return jnp.asarray(out.n_iters, dtype=eps.dtype)
        return getattr(out, {"cost": "primal_cost", "value": "reg_ot_cost", "plan": "matrix"}[name])

    return jax.jit(jax.vmap(one))  # type: ignore[no-any-return]


def _way(implicit: bool = True, danskin: bool | None = None) -> Way:
    def solve(case: Case, name: str) -> Tensor:
        rhos = case.options(rho_a="a", rho_b="b", start="start")
        start = rhos.pop("start", None)
        if rhos and name not in ("plan", "cost"):
            raise Missing(f"returns no {name} of the entropy relative to the masses")
        tensors = {"a": case.a, "b": case.b}
        tensors |= {"cost": case.cost} if case.cost is not None else dict(zip("xy", case.points(), strict=True))
        tensors["eps"] = torch.as_tensor(case.eps, dtype=torch.float64).expand(len(case.a))
        if start is not None:
            tensors |= {"f": start[0], "g": start[1]}
        eps = None if isinstance(case.eps, Tensor) else case.eps
        asked = _Asked(tuple(tensors), name, eps, tuple(rhos.items()), case.iterations, implicit, danskin)
        return _InJax.apply(_batched(asked), *tensors.values())  # type: ignore[no-any-return]

    return solve


def _hessian(given: Case) -> Tensor:
    """The second derivatives of the value by the cost ``(n, m, n, m)``, by JAX's own transformation."""
    import jax
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem

    given.one()
    solver = _solver(given.iterations, implicit=True, danskin=False)

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


@functools.cache
def _streamed(eps: float, iterations: int, implicit: bool) -> Function:
    """The value of a problem whose cost is made again for each use, 256 rows at a time.

    Without implicit differentiation nothing of the iterations is differentiated: the value needs the potentials alone.
    """
    import jax
    from jax.interpreters import batching
    from ott.geometry.pointcloud import PointCloud
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear import implicit_differentiation
    from ott.solvers.linear.sinkhorn import Sinkhorn

    if not hasattr(batching, "is_vmappable"):  # where ott-jax 0.6.0 looks for it, and JAX 0.10 has it no more
        from jax._src.interpreters.batching import is_vmappable

        batching.is_vmappable = is_vmappable
    how = implicit_differentiation.ImplicitDiff() if implicit else None
    solver = Sinkhorn(
        threshold=-1.0, min_iterations=iterations, max_iterations=iterations, inner_iterations=iterations,
        implicit_diff=how, use_danskin=True,
    )  # fmt: skip

    def value(x: Any, y: Any) -> Any:
        return solver(LinearProblem(PointCloud(x, y, epsilon=eps, batch_size=256))).reg_ot_cost

    return jax.jit(value)  # type: ignore[no-any-return]


def _stream(implicit: bool) -> Callable[..., Tensor]:
    def value(x: Tensor, y: Tensor, eps: float, iterations: int) -> Tensor:
        return _InJax.apply(_streamed(eps, iterations, implicit), x[0], y[0])  # type: ignore[no-any-return]

    return value


OTT = Library(
    "OTT-JAX",
    {
        "implicit": _way(),
        "implicit, without Danskin": _way(danskin=False),
        "unrolled": _way(implicit=False),
    },
    {
        "ragged": {"segment_sinkhorn": _ragged},
        "stream": {
            "PointCloud, batch_size": _stream(implicit=True),
            "PointCloud, batch_size, Danskin alone": _stream(implicit=False),
        },
        "twice": {"jax.hessian": _hessian},
        "compiled": {"jax.jit": _way()},
        "vmapped": {"jax.vmap": _way()},
    },
    needs=("jax", "ott"),
    jax=True,
)
