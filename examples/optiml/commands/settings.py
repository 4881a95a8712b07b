"""Options of the commands that run several stages. This module imports nothing that takes long."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..data.fractions import LARGE_SEEDS, SMALL, SMALL_SEEDS, check_fractions, check_seeds
from ..downstream.settings import TrainConfig
from ..pretraining.settings import Precision
from ..reporting.comparison_rows import Kind, rows
from .sizes import BUDGETS, Budget

#: The committed results of comparisons, inside the package.
RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class ExampleConfig:
    """Draw phantoms and run every stage on them: pretrain, evaluate, segment, heatmap, report."""

    out: Path = Path("runs/example")
    """Working folder; a second call goes on where the first was stopped."""
    method: str = "optiml"
    epochs: int = 10
    """Epochs of pretraining."""
    seed: int = 0
    """Of the phantoms and of the pretraining."""
    results: Path | None = None
    """Also write the figures of the last screen here, as JSON."""


@dataclass(frozen=True)
class XrayConfig:
    """Pretrain, evaluate frozen and fine-tuned, segment, draw heatmaps, report. Stop and repeat at will."""

    data: Path
    """Prepared data set, or a folder in the layout of NIH ChestX-ray14."""
    out: Path = Path("runs/xray")
    """Working folder: runs, records, and the report in ``report``."""
    dataset: str | None = None
    """Column of the report (``nih-cxr-dev`` stands beside the paper's NIH); unset: the data folder's name."""
    segment_data: Path | None = None
    """Data set to segment. Unset: ``data``, if it has outlines of ``label``."""
    results: Path | None = None
    """Also copy the report here (Markdown, CSV, PNG and JSON, without weights or images of the size of a data set)."""

    run: tuple[Path, ...] = ()
    """Pretrained run folders to take instead of pretraining; all rows get the first one's validation patients."""
    method: str = "optiml"
    epochs: int = 10
    batch_size: int = 64
    image_size: int | None = None
    """Unset: that of the first ``run``, or 64."""
    min_scale: float | None = None
    """Smallest share of the film that a crop of the pretraining shows. Unset: the method's."""
    pretrain_seeds: tuple[int, ...] = (0,)
    precision: Precision = "32-true"
    """Of the pretraining; bf16-mixed is faster on processors that multiply in it."""
    workers: int = 0

    fractions: tuple[float, ...] = (0.01, 0.1, 1.0)
    seeds: tuple[int, ...] = SMALL_SEEDS
    """Of fractions below a tenth, where few patients decide."""
    large_seeds: tuple[int, ...] = LARGE_SEEDS
    """Of the other fractions."""
    finetune: TrainConfig = field(default_factory=lambda: TrainConfig(lr=1e-3, epochs=5, min_steps=60, checks=5))
    """How to fine-tune; short runs want a larger learning rate than the 1e-4 of long ones."""
    neighbours: bool = True
    """Also score frozen features by a vote of the nearest training films, with all labels."""
    heatmap_fractions: tuple[float, ...] = (0.01, 1.0)
    """Of ``fractions``, those whose networks' heatmaps are drawn; the paper's are of 1 %."""
    label: str = "Pneumothorax"
    """What to segment: a finding, or whatever else there are masks of, such as Lung."""
    segment_fractions: tuple[float, ...] = (0.1, 1.0)
    segment_seeds: tuple[int, ...] = (0, 1, 2)
    segment_size: int | None = None
    """Unset: ``image_size``."""
    unet: TrainConfig = field(
        default_factory=lambda: TrainConfig(lr=1e-3, batch_size=16, epochs=3, min_steps=60, checks=5)
    )
    """How to train the U-Net."""
    figure_images: int = 6
    draws: int = 1000

    def __post_init__(self) -> None:
        check_fractions("fractions", self.fractions)
        check_fractions("segment_fractions", self.segment_fractions)
        check_seeds("segment_seeds", self.segment_seeds)
        if any(f < SMALL for f in self.fractions):
            check_seeds("seeds", self.seeds)
        if any(f >= SMALL for f in self.fractions):
            check_seeds("large_seeds", self.large_seeds)
        if not self.run:
            check_seeds("pretrain_seeds", self.pretrain_seeds)


@dataclass(frozen=True)
class CompareConfig:
    """Pretrain, evaluate, segment and draw heatmaps by every method, or for every row of the ablation; then report."""

    data: Path
    """Prepared data set, or a folder in the layout of NIH ChestX-ray14."""
    out: Path = Path("runs/compare")
    """Run folders and all else that is large; not needed to go on."""
    results: Path = RESULTS / "compare"
    """Small files that are: of each row and seed in ``runs``; the report in ``methods`` or ``ablation``."""
    dataset: str | None = None
    """Column of the report (``nih-cxr-dev`` stands beside the paper's NIH); unset: the data folder's name."""
    rsna_data: Path | None = None
    """Also evaluate on this data set, a column named as its folder."""
    segment_data: Path | None = None
    """Data set to segment; unset: none."""
    label: str = "Pneumothorax"
    """What to segment: a finding, or whatever else there are masks of, such as Lung."""
    rows: Kind = "methods"
    """methods: Tables I and II, Figs 2 and 3. ablation: Table III, one factor at a time, VICReg."""
    only: tuple[str, ...] = ()
    """Make these rows and no others. All that are complete are reported."""
    report_only: bool = False
    """Make nothing, only report what is complete."""
    budget: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(BUDGETS) + "}")] = "small"
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the pretraining, or of random weights: those to make. All that are complete are reported."""
    sizes: Annotated[Budget, tyro.conf.arg(name="")] = field(default_factory=Budget)
    readme: Path | None = None
    """Write the tables between this file's markers. Unset: the package's, if ``results`` lie inside the package."""
    workers: int = 0

    def __post_init__(self) -> None:
        if self.budget not in BUDGETS:
            raise ValueError(f"budget must be one of {', '.join(BUDGETS)}, not {self.budget!r}")
        names = [row.name for row in rows(self.rows)]
        if unknown := sorted(set(self.only) - set(names)):
            raise ValueError(f"only must be among {', '.join(names)}, not {', '.join(unknown)}")
        check_seeds("seeds", self.seeds)
        self.stages()  # which has checks of its own

    def options(self) -> dict[str, Any]:
        """What the report repeats of the command line."""
        named = ("data", "dataset", "rsna_data", "segment_data", "label", "rows", "budget", "seeds")
        return {**{name: getattr(self, name) for name in named}, **vars(self.sizes)}

    def budgeted(self) -> Any:
        """The named budget, with what was set beside it."""
        return replace(
            BUDGETS[self.budget], **{name: value for name, value in vars(self.sizes).items() if value is not None}
        )

    def stages(self) -> XrayConfig:
        """The sizes, as all stages take them."""
        b = self.budgeted()
        return XrayConfig(
            self.data, self.out, epochs=b.epochs, batch_size=b.batch_size, image_size=b.image_size,
            min_scale=b.min_scale, workers=self.workers, fractions=b.fractions,
            seeds=b.small_seeds, large_seeds=b.large_seeds, heatmap_fractions=b.heatmap_fractions,
            segment_data=self.segment_data, label=self.label, segment_fractions=b.segment_fractions,
            segment_seeds=b.segment_seeds, figure_images=b.figure_images, draws=b.draws,
            neighbours=False, finetune=TrainConfig(b.finetune_lr, epochs=b.finetune_epochs, min_steps=b.finetune_steps,
                                 max_steps=b.finetune_max_steps, checks=b.checks),
            unet=TrainConfig(b.unet_lr, batch_size=16, epochs=b.unet_epochs, min_steps=b.unet_steps,
                             max_steps=b.unet_max_steps, checks=b.checks),
        )  # fmt: skip
