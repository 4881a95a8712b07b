"""OTT-JAX: jitted, vmapped over the batch, forward and backward both inside JAX, on JAX's own arrays.

Implicit differentiation solves a singular system. OTT's default solver gives up on it for small problems ("non-finite
output"), so the ridge that OTT's documentation offers for balanced problems is on. It acts on the null space only.
"""

from __future__ import annotations

from typing import Any

from benchmarks.peers.base import Peer, Step
from benchmarks.workloads import Leaves, Workload

RIDGE = 1e-2


def _scope(workload: Workload) -> Any:
    import jax

    return jax.enable_x64(workload.dtype == "float64")


def _native(workload: Workload, leaves: Leaves) -> Any:
    import jax.numpy as jnp

    with _scope(workload):
        return tuple(jnp.asarray(t.detach().numpy()) for t in leaves)


def _problem(w: Workload, leaves: Any) -> tuple[Any, Any, Any]:
    """Cost and masses of one problem."""
    import jax.numpy as jnp
    from jax.nn import softmax

    if w.inputs == "samples":
        x, y = leaves
        cost = (x**2).sum(-1)[:, None] + (y**2).sum(-1)[None, :] - 2 * x @ y.T
        return cost, None, None
    *points, logits_a, logits_b = leaves
    if w.inputs == "dense":
        cost = points[0]
    else:
        x, y = (p / jnp.maximum(jnp.linalg.norm(p, axis=-1, keepdims=True), 1e-12) for p in points)
        cost = 1 - x @ y.T
    return cost, softmax(logits_a), softmax(logits_b)


def _build(w: Workload, lse: bool, differentiation: str) -> Step:
    import jax
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear import implicit_differentiation
    from ott.solvers.linear.sinkhorn import Sinkhorn

    implicit = implicit_differentiation.ImplicitDiff(solver_kwargs={"ridge_kernel": RIDGE})
    solver = Sinkhorn(
        lse_mode=lse,
        threshold=w.tol or -1.0,
        min_iterations=0 if w.tol else w.iterations,
        max_iterations=w.iterations,
        use_danskin=differentiation == "danskin",
        implicit_diff=None if differentiation == "unrolled" else implicit,
    )

    def number(*leaves: Any) -> Any:
        cost, a, b = _problem(w, leaves)
        out = solver(LinearProblem(Geometry(cost_matrix=cost, epsilon=w.eps), a, b))
        return out.reg_ot_cost if differentiation == "danskin" else out.primal_cost

    def total(leaves: Any) -> Any:
        numbers = jax.vmap(number)(*leaves)
        return numbers.sum(), numbers

    def both(leaves: Any) -> Any:
        (_, numbers), grads = jax.value_and_grad(total, has_aux=True)(leaves)
        return numbers, grads

    run = jax.jit(both if w.backward else lambda leaves: (total(leaves)[1], None))

    def step(leaves: Any) -> tuple[Any, Any]:
        with _scope(w):
            return jax.block_until_ready(run(leaves))

    return step


def _peer(mode: str, differentiation: str, **options: Any) -> Peer:
    name = f"OTT-JAX {mode}" if differentiation == "none" else f"OTT-JAX {mode}, {differentiation}"
    return Peer(
        name,
        "OTT-JAX",
        lambda w: _build(w, mode == "lse", differentiation),
        exact=differentiation in ("implicit", "unrolled"),
        number="value" if differentiation == "danskin" else "cost",
        passes="forward" if differentiation == "none" else "backward",
        stops=True,
        needs=("jax", "ott"),
        native=_native,
        warm_in_full=True,
        **options,
    )


PEERS = (
    _peer("lse", "implicit"),
    _peer("kernel", "implicit", quick=True),
    _peer("kernel", "unrolled", main_only=True),
    _peer("kernel", "danskin", main_only=True),
    _peer("lse", "none"),
    _peer("kernel", "none"),
)
