"""The rows of a comparison: each one's arm, its method, and the settings in which it differs from the others."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..downstream.arms import ABLATION, ROWS, SUP1, SUP2
from ..pretraining.methods import METHODS
from ..pretraining.settings import PRESETS, PretrainConfig

#: Comparisons whose rows are listed here.
BUILT_IN = ("methods", "ablation")
#: Arms that are not pretrained here: random weights and ImageNet's.
NOT_TRAINED = (SUP1, SUP2)
RECOMMENDED = "optiml"
#: OPTiML's objective as the paper prints it. The optimiser is that of all rows, as the printed learning rate of 3e-4
#: would hardly move the weights in so few steps.
PRINTED = {path: value for path, value in PRESETS["paper"].items() if path.startswith(("options.optiml.", "expander."))}
#: One factor at a time: each of these values has a row, except the recommended one. Uniform marginals are missing here:
#: they are OPTiML without CV-SIM, a row of Table III.
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
    """One row of the report."""

    arm: str
    """How records and files call the row."""
    method: str | None = None
    """An entry of ``METHODS``; None if the weights are not pretrained here."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """The settings of ``PretrainConfig``, by dotted path, in which the row differs from the others."""
    title: str = ""
    """How the report prints the row. Unset: the paper's name for the arm, or else the arm."""
    flags: tuple[str, ...] = field(default=(), compare=False)
    """The flags of ``pretrain`` that a file of rows gives it."""

    def __post_init__(self) -> None:
        if not self.title:
            object.__setattr__(self, "title", ROWS.get(self.arm, self.arm))

    def apply(self, config: PretrainConfig) -> PretrainConfig:
        """``config`` with the row's overrides, and with every unset field filled from the preset."""
        for path, value in self.overrides.items():
            config = _changed(config, path, value)
        return config.resolve()


def rows(kind: str) -> list[ComparisonRow]:
    """All rows of a built-in comparison, in the report's order."""
    return methods() if kind == "methods" else ablation()


def methods() -> list[ComparisonRow]:
    """Tables I and II: random and ImageNet's weights, every method, and OPTiML's objective as printed."""
    arms = [arm for arm in ROWS if arm in METHODS] + sorted(METHODS.keys() - ROWS.keys())
    printed = ComparisonRow("optiml-printed", "optiml", PRINTED, "OPTiML, objective as printed")
    return [ComparisonRow(SUP1), ComparisonRow(SUP2), *(ComparisonRow(arm, arm) for arm in arms), printed]


def ablation() -> list[ComparisonRow]:
    """Table III, and one factor at a time around the recommended settings; Sup.1 and VICReg for scale."""
    result = [ComparisonRow(SUP1)]
    for arm, (var_cov, cvsim) in ABLATION.items():
        # Invariance goes with variance and covariance: without these, a constant embedding would minimise it.
        weights = ("beta", "eta", "invariance")
        off: dict[str, Any] = {} if var_cov else {f"options.optiml.{weight}": 0.0 for weight in weights}
        off |= {} if cvsim else {"options.optiml.marginals": "uniform"}
        missing = " and ".join(part for part, on in (("var+cov", var_cov), ("CV-SIM", cvsim)) if not on)
        result.append(ComparisonRow(arm, "optiml", off, f"OPTiML without {missing}" if missing else ""))
    usual = PretrainConfig(Path(), Path(), RECOMMENDED).resolve()
    for path, values in FACTORS.items():
        factor = path.rpartition(".")[2].replace("_", "-")
        for value in values:
            if _value(usual, path) != value:
                arm = f"optiml-{factor}-{value}".lower()
                result.append(ComparisonRow(arm, "optiml", {path: value}, f"OPTiML, {factor} {value}"))
    # Three settings that make sense only together: local features, matched by position, and a larger weight of their
    # transport.
    local = {"options.optiml.dense": 256, "options.optiml.match": "position", "options.optiml.alpha": 25.0}
    result.append(ComparisonRow("optiml-local", "optiml", local, "OPTiML, dense 256, match position, alpha 25.0"))
    # VICReg for scale. Its last two rows are what the optimiser and the crops of all methods were chosen by.
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
