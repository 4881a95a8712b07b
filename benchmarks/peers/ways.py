"""The libraries that work on PyTorch tensors as solvers of a `Case`, in each mode that differs in what it can do."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import otloss
from benchmarks.peers.cases import Case, Missing, NoDevice

NO_CUDA = "needs a CUDA device"
Way = Callable[[Case, str], Tensor]
"""From problems and the name of an output to that output, with its gradient."""


@dataclass(frozen=True)
class Library:
    """A column of the table of capabilities.

    Attributes:
        ways: modes that solve a `Case`, by name.
        special: functions of other signatures, by the row that asks for them and by name.
        needs: modules that must import.
        cuda: whether it needs a CUDA device. Without one, what it refuses before it asks for one still shows.
        jax: whether it computes in JAX, which has transformations of its own.
    """

    name: str
    ways: dict[str, Way]
    special: dict[str, dict[str, Callable[..., Any]]] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    cuda: bool = False
    jax: bool = False

    def missing(self) -> str | None:
        """Why it cannot be called here, or None."""
        try:
            for module in self.needs:
                importlib.import_module(module)
        except Exception as error:  # a broken install must not stop the others
            return f"does not import: {type(error).__name__}: {error}"
        return None

    def lacking(self) -> str | None:
        """What it needs that is not here, or None."""
        return self.missing() or (NO_CUDA if self.cuda and not torch.cuda.is_available() else None)


# --- otloss ----------------------------------------------------------------------------------------------------------

OURS = {name: name for name in ("rho_a", "rho_b", "mask_x", "mask_y")} | {"start": "init", "share": "partial"}


def _ours(backend: str | None) -> Way:
    def solve(case: Case, name: str) -> Tensor:
        options = {"eps": case.eps, "tol": 1e-13, "max_iter": case.iterations, "backend": backend}
        options |= case.options(**OURS)
        if case.cost is None:
            out = otloss.feature_sinkhorn(*case.points(), case.a, case.b, cost="sqeuclidean", **options)
        else:
            out = otloss.sinkhorn(case.cost, case.a, case.b, **options)
        return getattr(out, {"cost": "transport_cost"}.get(name, name))  # type: ignore[no-any-return]

    return solve


def _our_ragged(x: list[Tensor], y: list[Tensor], eps: float) -> Tensor:
    given: Any = (x, y)
    return otloss.feature_sinkhorn(*given, cost="sqeuclidean", eps=eps, tol=1e-13, max_iter=5000).value


def _our_stream(x: Tensor, y: Tensor, eps: float, iterations: int) -> Tensor:
    return otloss.feature_sinkhorn(x, y, cost="sqeuclidean", eps=eps, tol=0.0, max_iter=iterations).value


# --- POT -------------------------------------------------------------------------------------------------------------


def _field(result: Any, name: str) -> Tensor:
    """An output of POT or geomloss by the name that it has there."""
    there = {"cost": "value_linear"}.get(name, name)
    found = getattr(result, there, None) if name in ("cost", "value", "plan") else None
    if found is None:
        raise Missing(f"returns no {name}")
    return found  # type: ignore[no-any-return]


def _pot_solve(grad: str) -> Way:
    def solve(case: Case, name: str) -> Tensor:
        import ot

        case.one()
        rhos = case.options(rho_a="a", rho_b="b")
        options: dict[str, Any] = {"reg": case.eps, "reg_type": "KL", "grad": grad, "tol": 1e-13}
        options["max_iter"] = case.iterations
        if rhos:
            options["unbalanced"] = tuple(rhos.get(side, float("inf")) for side in "ab")
        if case.cost is None:
            x, y = case.points()
            result = ot.solve_sample(x[0], y[0], case.a[0], case.b[0], **options)
        else:
            result = ot.solve(case.cost[0], case.a[0], case.b[0], **options)
        if name == "log_plan":
            u, v = result.potentials
            return (u.unsqueeze(-1) + v - case.matrix()[0] / case.eps)[None]
        return _field(result, name)[None]

    return solve


def _pot_batch(grad: str) -> Way:
    def solve(case: Case, name: str) -> Tensor:
        import ot.batch

        case.options()
        result = ot.batch.solve_batch(
            case.matrix(), case.eps, case.a, case.b, method="log_sinkhorn", reg_type="kl", grad=grad,
            max_iter=case.iterations, tol=1e-13,
        )  # fmt: skip
        return _field(result, name)

    return solve


def _pot_started(case: Case, name: str) -> Tensor:
    import ot

    case.one()
    case.options(start="warmstart")
    start = None
    if case.start is not None:  # POT's potentials hold the masses
        start = tuple((p / case.eps + mass.log())[0] for p, mass in zip(case.start, (case.a, case.b), strict=True))
    plan, log = ot.sinkhorn(
        case.a[0], case.b[0], case.matrix()[0], case.eps, method="sinkhorn_log", warmstart=start, log=True,
        numItermax=case.iterations, stopThr=1e-12,
    )  # fmt: skip
    if name not in ("plan", "n_iter"):
        raise Missing(f"returns no {name}")
    return plan[None] if name == "plan" else torch.tensor([log["niter"]])


def _pot_partial(case: Case, name: str) -> Tensor:
    import ot

    case.one()
    case.options(share="m")
    if name != "plan" or case.share is None:
        raise Missing("is for shares alone, and returns a plan")
    share = torch.tensor(case.share, dtype=torch.float64)
    options = {"m": share, "numItermax": case.iterations, "stopThr": 1e-13}
    solve = ot.partial.entropic_partial_wasserstein_logscale
    return solve(case.a[0], case.b[0], case.matrix()[0], case.eps, **options)[None]  # type: ignore[no-any-return]


def _pot_stream(x: Tensor, y: Tensor, eps: float, iterations: int) -> Tensor:
    import ot

    return ot.solve_sample(x[0], y[0], reg=eps, lazy=True, batch_size=256, max_iter=iterations, tol=0.0).value_linear


# --- geomloss --------------------------------------------------------------------------------------------------------


def _geomloss_samples(case: Case, name: str) -> Tensor:
    """Its cost is half the square, and its value counts eps (m_a + m_b) / 2 where a `Case` has eps m_a m_b."""
    from geomloss import SamplesLoss

    if name != "value":
        raise Missing(f"returns no {name}")
    x, y = case.points()
    rhos = case.options(rho_a="a", rho_b="b")
    if len(set(rhos.values())) + (len(rhos) == 1) > 1:
        raise Missing("has one reach for both sides")
    reach = (rhos["a"] / 2) ** 0.5 if rhos else None
    scaling = 0.999 if case.iterations > 1000 else 0.5
    loss = SamplesLoss(
        "sinkhorn", p=2, blur=(case.eps / 2) ** 0.5, reach=reach, scaling=scaling, debias=False, backend="tensorized"
    )
    value = 2 * loss(case.a, x, case.b, y)
    if rhos:
        totals = case.a.sum(-1), case.b.sum(-1)
        value = value + case.eps * (totals[0] * totals[1] - (totals[0] + totals[1]) / 2)
    return value


def _geomloss_batch(case: Case, name: str) -> Tensor:
    import geomloss.ot

    rhos = case.options(rho_a="a", rho_b="b")
    if len(set(rhos.values())) + (len(rhos) == 1) > 1:
        raise Missing("has one penalty for both sides")
    result = geomloss.ot.solve_batch(
        case.matrix(), reg=case.eps, a=case.a, b=case.b, unbalanced=rhos.get("a"), max_iter=min(case.iterations, 2000)
    )
    if name not in ("value", "plan"):
        raise Missing(f"returns no {name}")
    return _field(result, name)


def _geomloss_stream(x: Tensor, y: Tensor, eps: float, iterations: int) -> Tensor:
    from geomloss import SamplesLoss

    loss = SamplesLoss("sinkhorn", p=2, blur=(eps / 2) ** 0.5, scaling=0.5, debias=False, backend="online")
    return 2 * loss(x[0], y[0])


# --- flash-sinkhorn --------------------------------------------------------------------------------------------------


def _flash_loss(eps: float | Tensor, iterations: int, **reaches: float) -> Callable[..., Tensor]:
    """flash-sinkhorn has geomloss's interface, with reaches of their own for both sides, and the whole square.

    Raises:
        NoDevice: it takes the tensors, but there is no CUDA device.
    """
    from flash_sinkhorn import SamplesLoss

    loss = SamplesLoss(
        "sinkhorn", debias=False, eps=eps, n_iters=iterations, use_epsilon_scaling=False, allow_tf32=False, **reaches
    )
    if isinstance(eps, Tensor) and eps.requires_grad and not isinstance(loss.eps, Tensor):
        raise Missing("keeps eps as a plain number, without gradient")

    def value(*tensors: Tensor) -> Tensor:
        if torch.cuda.is_available():
            return loss(*(t.float().cuda() for t in tensors)).double().cpu()  # type: ignore[no-any-return]
        try:
            return loss(*tensors)  # type: ignore[no-any-return]
        except ValueError as error:
            if "requires CUDA" in str(error):
                raise NoDevice(NO_CUDA) from error
            raise

    return value


def _flash(case: Case, name: str) -> Tensor:
    if name != "value":
        raise Missing(f"returns no {name}")
    reaches = {side: rho**0.5 for side, rho in case.options(rho_a="reach_x", rho_b="reach_y").items()}
    loss = _flash_loss(case.eps, case.iterations, **reaches)
    x, y = case.points()
    return loss(case.a, x, case.b, y)


def _flash_ragged(x: list[Tensor], y: list[Tensor], eps: float) -> Tensor:
    given: Any = (x, y)
    return _flash_loss(eps, 5000)(*given)


def _flash_stream(x: Tensor, y: Tensor, eps: float, iterations: int) -> Tensor:
    return _flash_loss(eps, iterations)(x, y)


LIBRARIES = (
    Library(
        "otloss",
        {"sinkhorn": _ours(None), 'backend="reference"': _ours("reference")},
        {
            "ragged": {"feature_sinkhorn of lists": _our_ragged},
            "stream": {"feature_sinkhorn": _our_stream},
        },
    ),
    Library(
        "POT",
        {
            "ot.batch, autodiff": _pot_batch("autodiff"),
            "ot.batch, last_step": _pot_batch("last_step"),
            "ot.batch, envelope": _pot_batch("envelope"),
            "ot.solve, autodiff": _pot_solve("autodiff"),
            "ot.solve, envelope": _pot_solve("envelope"),
            "ot.sinkhorn": _pot_started,
            "ot.partial": _pot_partial,
        },
        {"stream": {"ot.solve_sample, lazy": _pot_stream}},
        needs=("ot", "ot.batch"),
    ),
    Library(
        "geomloss",
        {"ot.solve_batch": _geomloss_batch, "SamplesLoss": _geomloss_samples},
        {
            "stream": {"SamplesLoss on KeOps": _geomloss_stream},
        },
        needs=("geomloss", "geomloss.ot"),
    ),
    Library(
        "flash-sinkhorn",
        {"SamplesLoss": _flash},
        {"ragged": {"SamplesLoss of lists": _flash_ragged}, "stream": {"SamplesLoss": _flash_stream}},
        needs=("flash_sinkhorn",),
        cuda=True,
    ),
)
