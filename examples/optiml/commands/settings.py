"""Options of the commands above the single stages. This module imports nothing that takes long."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ..data.fractions import check_seeds
from ..pretraining.methods import METHODS
from ..pretraining.settings import Precision, PretrainConfig, Stem
from ..reporting.comparison_rows import BUILT_IN
from ..reporting.row_files import comparison_rows
from .sizes import BUDGETS, Budget, SizeFlags, Sizes

#: The committed results of comparisons, inside the package.
RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class ExampleConfig:
    """Draw phantoms and run every stage on them: pretrain, evaluate, segment, heatmap, report."""

    out: Path = Path("runs/example")
    """Working folder; a second call goes on where the first was stopped."""
    method: str = "optiml"
    """Of the pretraining; a name of the methods that the pages compare, such as simclr."""
    epochs: int = 8
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
    """Of the pretraining; a name of the methods that the pages compare, such as simclr."""
    pretrain_seeds: tuple[int, ...] = (0,)
    """A network is pretrained from each."""
    precision: Precision = "32-true"
    """Of the pretraining; bf16-mixed is faster on processors that multiply in it."""
    workers: int = 0
    """Processes that read and augment films beside the training; 0: the training does it itself."""
    label: str = "Pneumothorax"
    """What to segment: a finding, or whatever else there are masks of, such as Lung."""
    sizes: Annotated[Sizes, tyro.conf.arg(name="")] = field(default_factory=Sizes)

    def __post_init__(self) -> None:
        self.sizes.check()
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
    rows: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(BUILT_IN) + ",FILE}")] = "methods"
    """methods: Tables I and II, Figs 2 and 3. ablation: Table III, one factor at a time, VICReg. Or a file with a line
    for each row: its name, then flags of pretrain (study.rows is one)."""
    only: tuple[str, ...] = ()
    """Make these rows and no others. All that are complete are reported."""
    report_only: bool = False
    """Make nothing, only report what is complete."""
    budget: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(BUDGETS) + "}")] = "small"
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the pretraining, or of random weights: those to make. All that are complete are reported."""
    size_flags: Annotated[SizeFlags, tyro.conf.arg(name="")] = field(default_factory=SizeFlags)
    imagenet_weights: Path | None = None
    """File with torchvision's ImageNet weights of a ResNet18, for the row sup2. Unset: they are downloaded."""
    monitored: int = 5
    """How often a pretraining is measured with labels, as the report's curves show; 1: at its end."""
    workers: int = 0
    """Processes that read and augment films beside the training; 0: the training does it itself."""

    def __post_init__(self) -> None:
        if self.monitored < 1:
            raise ValueError(f"monitored must be 1 or more, not {self.monitored}")
        if self.budget not in BUDGETS:
            raise ValueError(f"budget must be one of {', '.join(BUDGETS)}, not {self.budget!r}")
        arms = [row.arm for row in comparison_rows(self.rows)]
        if unknown := sorted(set(self.only) - set(arms)):
            raise ValueError(f"only must be among {', '.join(arms)}, not {', '.join(unknown)}")
        check_seeds("seeds", self.seeds)
        self.budgeted().sizes.check()

    @property
    def rows_name(self) -> str:
        """What the report's folder is called: the comparison, or the file of rows without its ending."""
        return Path(self.rows).stem

    def options(self) -> dict[str, Any]:
        """What the report repeats of the command line."""
        named = ("data", "dataset", "rsna_data", "segment_data", "label", "rows", "budget", "seeds", "imagenet_weights")
        return {**{name: getattr(self, name) for name in named}, **vars(self.size_flags)}

    def budgeted(self) -> Budget:
        """The named budget with the sizes that flags replace."""
        return self.size_flags.applied_to(BUDGETS[self.budget])


@dataclass(frozen=True)
class ReckonConfig:
    """Count what a step of pretraining takes, and reckon the hours of a run; no film is read. See PAPER-RUN.md."""

    out: Path | None = None
    """Also write all figures here, as JSON."""
    films: tuple[int, ...] = (74_400, 112_120)
    """Numbers of training films. Of NIH's 112,120 about 74,400 are neither test films nor of validation patients."""
    method: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(METHODS) + "}")] = "optiml"
    preset: Literal["recommended", "paper", "official"] = "recommended"
    epochs: int = 300
    batch_size: int = 64
    image_size: int = 224
    stem: Stem = "standard"
    precision: Precision = "bf16-mixed"
    steps: int = 0
    """Also take so many steps here, on noise in place of films, and measure their time."""

    def pretraining(self) -> PretrainConfig:
        """The run, without folders."""
        return PretrainConfig(
            Path(), Path(), self.method, self.preset, self.epochs, self.batch_size, self.image_size, stem=self.stem,
            precision=self.precision,
        )  # fmt: skip

    def __post_init__(self) -> None:
        self.pretraining()
        if not self.films or min(self.films) < self.batch_size:
            raise ValueError(f"films must be numbers from the batch size ({self.batch_size}) up, not {self.films}")
        if self.steps < 0:
            raise ValueError(f"steps must be 0 or more, not {self.steps}")
