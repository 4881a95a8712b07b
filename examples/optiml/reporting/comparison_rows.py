"""What is compared: each row of the report by its name, its method, and the settings in which it differs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..downstream.arms import ABLATION, ROWS, SUP1, SUP2
from ..pretraining.methods import METHODS
from ..pretraining.settings import PRESETS, PretrainConfig

Kind = Literal["methods", "ablation"]
#: Weights that are not pretrained here: drawn at random, or ImageNet's.
NOT_TRAINED = (SUP1, SUP2)
RECOMMENDED = "optiml"
#: The objective as printed, under everybody's optimiser: the printed rate of 3e-4 would hardly move the weights.
PRINTED = {path: value for path, value in PRESETS["paper"].items() if path.startswith(("options.optiml.", "expander."))}
#: One factor at a time: a row for each of these values that is not the recommended one. Marginals without CV-SIM
#: (uniform) are a row of Table III.
FACTORS: dict[str, tuple[Any, ...]] = {
    "options.optiml.invariance": (0.0, 25.0),
    "options.optiml.dense": (0, 256),
    "options.optiml.stage": (3, 4),
    "options.optiml.match": ("channel", "position"),
    "options.optiml.tokens": ("channel", "batch"),
    "options.optiml.marginals": ("perplexity", "hardest", "learned", "detached"),
    "options.optiml.gradient": ("implicit", "unroll", "none"),
    "options.optiml.objective": ("transport_cost", "value", "divergence"),
    "options.optiml.eps": (0.01, 0.05, 0.2),
    "options.optiml.alpha": (0.0, 0.6, 6.0, 25.0),
    "expander.last_act": (False, True),
}


@dataclass(frozen=True)
class ComparisonRow:
    """One row; ``method`` is an entry of ``METHODS``, or None for weights that are not pretrained here."""

    name: str
    """The arm in its records."""
    method: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    """Settings of ``PretrainConfig`` by dotted path, where they are not everybody's."""
    title: str = ""
    """Its name in the report, where that is none of the paper's."""

    @property
    def shown(self) -> str:
        return self.title or ROWS.get(self.name, self.name)

    def apply(self, config: PretrainConfig) -> PretrainConfig:
        """``config`` with the overrides, and every unset field filled from the preset."""
        for path, value in self.overrides.items():
            config = _changed(config, path, value)
        return config.resolve()


def rows(kind: Kind) -> list[ComparisonRow]:
    """All rows of a comparison, in the order of the report."""
    return methods() if kind == "methods" else ablation()


def methods() -> list[ComparisonRow]:
    """Tables I and II: the two yardsticks, every method there is, and OPTiML's objective as printed."""
    known = [name for name in ROWS if name in METHODS] + sorted(METHODS.keys() - ROWS.keys())
    printed = ComparisonRow("optiml-printed", "optiml", PRINTED, "OPTiML, objective as printed")
    return [ComparisonRow(SUP1), ComparisonRow(SUP2), *(ComparisonRow(name, name) for name in known), printed]


def ablation() -> list[ComparisonRow]:
    """Table III, and one factor at a time around the recommended settings; Sup.1 and VICReg for scale."""
    result = [ComparisonRow(SUP1)]
    for name, (var_cov, cvsim) in ABLATION.items():
        # Invariance with nothing beside it has the constant embedding as its minimum.
        alone = ("beta", "eta", "invariance")
        off: dict[str, Any] = {} if var_cov else {f"options.optiml.{name}": 0.0 for name in alone}
        off |= {} if cvsim else {"options.optiml.marginals": "uniform"}
        missing = " and ".join(part for part, on in (("var+cov", var_cov), ("CV-SIM", cvsim)) if not on)
        result.append(ComparisonRow(name, "optiml", off, f"OPTiML without {missing}" if missing else ""))
    usual = PretrainConfig(Path(), Path(), RECOMMENDED).resolve()
    for path, values in FACTORS.items():
        factor = path.rpartition(".")[2].replace("_", "-")
        for value in values:
            if _value(usual, path) != value:
                name = f"optiml-{factor}-{value}".lower()
                result.append(ComparisonRow(name, "optiml", {path: value}, f"OPTiML, {factor} {value}"))
    # Three at once, which make sense together only: local features, and a weight of their transport that counts.
    local = {"options.optiml.dense": 256, "options.optiml.match": "position", "options.optiml.alpha": 25.0}
    result.append(ComparisonRow("optiml-local", "optiml", local, "OPTiML, dense 256, match position, alpha 25.0"))
    # For scale, and what the optimiser and the views of all methods were chosen by.
    lars = {"optim.optimizer": "lars", "optim.lr": 0.3, "optim.trust": 0.02}
    return [
        *result,
        ComparisonRow("vicreg", "vicreg"),
        ComparisonRow("vicreg-lars", "vicreg", lars, "VICReg under LARS, lr 0.3, trust 0.02"),
        ComparisonRow("vicreg-crops", "vicreg", {"augment.min_scale": 0.08}, "VICReg, crops from 8 %"),
    ]


def _value(node: Any, path: str) -> Any:
    for name in path.split("."):
        node = getattr(node, name)
    return node


def _changed(node: Any, path: str, value: Any) -> Any:
    """A copy of ``node`` with the field at ``path`` set."""
    name, _, rest = path.partition(".")
    return dataclasses.replace(node, **{name: _changed(getattr(node, name), rest, value) if rest else value})
