"""The settings of the soak test: which arguments a group of random problems has, and how large its problems are.

Problems of one setting come in groups, which are solved in one call. A setting depends on the seed and on the number of
its group alone, so that a problem can be made again from the seed and its own number.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.solver import KINDS, PEAKED_KINDS

# Around the lanes (2 to 16), the row blocks (8), the tiles and panels (32), and where single problems get kernels.
SIZES = (
    (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 15, 16, 17, 20, 24, 25, 31, 32, 33),
    (40, 47, 48, 49, 56, 63, 64, 65),
    (79, 96, 97, 127, 128, 129, 160, 191, 192, 193, 200),
)
SIZE_SHARES = (0.74, 0.23, 0.03)
"""Of sides. One problem of the last sizes takes as long as a whole group of the first."""
DIMENSIONS = (1, 2, 3, 5, 8, 16, 17, 33, 64)
MOST_PROBLEMS, MOST_ENTRIES = 24, 12_000
"""Of a group: its problems, and the entries of their costs."""
VERBS = ("sinkhorn", "feature_sinkhorn", "cosine_sinkhorn", "SinkhornLoss", "FeatureSinkhornLoss")
MATRICES = (*dict.fromkeys((*KINDS, *PEAKED_KINDS)), "constant", "far rows", "negative")
POINTS = {
    "cosine": ("normal", "relu", "equal", "same", "repeated", "tiny"),
    "sqeuclidean": ("normal", "equal", "same", "repeated", "far"),
    "dot": ("normal", "relu", "equal", "same"),
}
SLOW_RELAXED = ("far rows", "offsets")
"""Costs whose constants penalties see: their masses would vanish or overflow."""


@dataclass(frozen=True)
class Setting:
    """What the problems of a group have in common."""

    seed: int
    group: int
    first: int
    """The number of its first problem."""
    count: int
    verb: str
    kind: str
    """Of the cost: "dense" or a kind of features."""
    content: str
    n: int
    m: int
    d: int
    dtype: str
    scale: float
    eps: float
    spread: float
    """Of the logarithms of the masses."""
    zeros: bool
    masses: tuple[str, str]
    """For a and b: "uniform", "masses" or "logs"."""
    masked: str
    forbidden: bool
    rho: tuple[str, str]
    """For a and b: "" is a constraint, else "float" or "tensor"."""
    rho_size: float
    partial: str
    tensor_eps: bool
    init: str
    shared: bool
    strided: bool
    gradient: str
    solver: str
    tol: float
    max_iter: int
    output: str
    """What is differentiated."""

    @property
    def relaxed(self) -> bool:
        return any(self.rho)

    @property
    def divergence(self) -> bool:
        return self.output == "divergence"

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "float32" else torch.float64

    def alone(self, place: int) -> Setting:
        """The same for one problem of the group."""
        return replace(self, first=self.first + place, count=1)

    def tags(self) -> dict[str, str]:
        """What the report counts problems by."""
        return {
            "verb": self.verb,
            "cost": self.kind if self.kind != "dense" else f"matrix: {self.content}",
            "dtype": self.dtype,
            "gradient": self.gradient,
            "solver": self.solver,
            "differentiated": self.output,
            "masses": " and ".join(sorted(set(self.masses))),
            "points left out": self.masked or "none",
            "forbidden pairs": "yes" if self.forbidden else "no",
            "penalties": "no" if not self.relaxed else "both sides" if all(self.rho) else "one side",
            "partial": self.partial or "no",
            "eps": "tensor" if self.tensor_eps else "float",
            "start": self.init or "none",
            "largest side": next(f"up to {sizes[-1]}" for sizes in SIZES if max(self.n, self.m) <= sizes[-1]),
        }


def settings(seed: int, problems: int, group: int = 0, first: int = 0) -> Iterator[Setting]:
    """Settings until so many problems are made; the groups before ``group`` hold ``first`` of them."""
    while first < problems:
        setting = random_setting(seed, group, first)
        yield replace(setting, count=min(setting.count, problems - first))
        group, first = group + 1, first + setting.count


def setting_of(seed: int, index: int) -> Setting:
    """The setting of the group that the problem is in."""
    return next(s for s in settings(seed, index + MOST_PROBLEMS) if s.first <= index < s.first + s.count)


def random_setting(seed: int, group: int, first: int) -> Setting:
    rng = random.Random(f"{seed}:{group}")

    def power(low: float, high: float) -> float:
        return float(low * (high / low) ** rng.random())

    def chance(share: float) -> bool:
        return rng.random() < share

    verb = rng.choices(VERBS, (45, 30, 12, 5, 8))[0]
    features, divergence = not verb.lower().startswith("sinkhorn"), verb.endswith("Loss")
    kind = "cosine" if verb == "cosine_sinkhorn" else rng.choice(tuple(POINTS)) if features else "dense"
    content = rng.choice(POINTS[kind] if features else ("points",) if divergence else MATRICES)
    n, m = (rng.choice(rng.choices(SIZES, (3, 1, 0) if divergence else SIZE_SHARES)[0]) for _ in range(2))
    n, m = (max(n, m), max(n, m)) if content.endswith("permutation") or chance(0.1) else (n, m)
    gradient = "implicit" if divergence else rng.choices(("implicit", "unroll", "none"), (75, 15, 10))[0]
    relaxed = gradient != "unroll" and content not in SLOW_RELAXED and chance(0.25)
    partial = "" if relaxed or divergence or gradient == "unroll" or chance(0.85) else rng.choice(("float", "tensor"))
    lists = "ragged" if features and not partial else "mask"
    masked = rng.choices(("", "mask", lists), (75, 15, 10))[0]
    starts = not partial and masked != "ragged" and gradient != "unroll"
    forbidden = kind == "dense" and not divergence and chance(0.15)
    how = rng.choice(("float", "tensor"))
    rho = rng.choice(((how, how), (how, ""), ("", how))) if relaxed else ("", "")
    rho = ("float", "float") if relaxed and divergence else rho
    dtype = rng.choices(("float32", "float64"), (65, 35))[0]
    tol = rng.choice((1e-4, 1e-5, 1e-5, 1e-6, 1e-7) if dtype == "float32" else (1e-5, 1e-8, 1e-10, 1e-12))
    unrolled_tol = rng.choice((0.0, 0.0, 1e-3))
    scale = 1.0 if kind == "cosine" else rng.choice((1.0, 1.0, 1.0, 1e-3, 1e3))
    masses = tuple(rng.choice(("masses", "logs") if forbidden else ("uniform", "masses", "logs")) for _ in range(2))
    output = {"unroll": ("transport_cost", "value"), "none": ("transport_cost", "barycentric")}.get(
        gradient, ("transport_cost", "transport_cost", "value", "plan", "log_plan", "potentials", "barycentric")
    )
    return Setting(
        seed, group, first,
        count=max(1, min(MOST_PROBLEMS, MOST_ENTRIES // (n * m if not divergence else n * m + n * n + m * m))),
        verb=verb, kind=kind, content=content, n=n, m=m, d=rng.choice(DIMENSIONS) if features else 0, dtype=dtype,
        scale=scale,
        eps=scale * (power(0.05, 1.0) if relaxed else power(0.005, 0.02) if chance(0.1) else power(0.02, 1.0)),
        spread=rng.choice((0.0, 1.0, 1.0, 3.0, 12.0)),
        zeros=not forbidden and chance(0.25),
        masses=masses, masked=masked, forbidden=forbidden, rho=rho, rho_size=scale * power(0.2, 2.0), partial=partial,
        tensor_eps=chance(0.2),
        init=rng.choices(("", "near", "far"), (85, 10, 5))[0] if starts else "",
        shared=not divergence and chance(0.1),
        strided=chance(0.1),
        gradient=gradient, solver=rng.choice(("auto", "auto", "plain")),
        tol=unrolled_tol if gradient == "unroll" else tol,
        max_iter=rng.randint(1, 30) if gradient == "unroll" else 1000,
        output="divergence" if divergence else rng.choice(output),
    )  # fmt: skip
