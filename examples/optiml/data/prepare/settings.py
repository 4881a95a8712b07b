"""What a preparation depends on: the options of the ``prepare`` command."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from . import READERS

#: What CheXpert's authors call the usual readings of -1.
PRESETS = {"u-zeros": "negative", "u-ones": "positive", "u-ignore": "skip"}


@dataclass(frozen=True)
class PrepareConfig:
    """Read a data set in its official layout; write grey PNGs and one index that every later stage reads."""

    dataset: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(READERS) + "}")]
    """Which layout to read."""
    out: Path
    """Folder to write. The same command goes on where it stopped; another one's folder is refused."""
    root: Path | None = None
    """The folder as downloaded and unpacked (medmnist: the .npz file; phantom: where they are, or will be, drawn)."""
    size: int = 256
    """Pixels of the shorter side; smaller films stay as they are. 0 keeps every film's own size."""
    workers: int = 0
    """Processes; 0 takes one per CPU."""

    val_fraction: float = 0.1
    """Share of patients for validation, where there is no official split."""
    test_fraction: float = 0.2
    """Share of patients for testing, where there is no official split."""
    split_seed: int = 0
    """Which patients those are."""

    votes: Literal[1, 2, 3] = 2
    """vinbig: how many of an image's three readers must name a finding for the image to have it."""
    vinbig_classes: Literal["paper", "all"] = "paper"
    """vinbig: Kaggle's 14 findings, or (PhysioNet only) all 27."""

    nih_match: Path | None = None
    """rsna, siim: table of which NIH film each image is (RSNA's public JSON, or a CSV); patients become NIH's."""
    pretrain_list: Path | None = None
    """rsna, siim: NIH's train_val_list.txt, or the prepared NIH folder, that pretraining sees."""
    overlap: Literal["keep", "split", "drop"] = "keep"
    """rsna, siim: images of pretraining's patients stay (keep), only train (split), or are left out (drop)."""

    table: Path | None = None
    """csv: the table, one row per image."""
    where: tuple[str, ...] = ()
    """csv: take only rows of which this holds, COLUMN=VALUE or COLUMN!=VALUE; of several, all."""
    image_column: str = "image"
    """csv: the image's path, relative to the root."""
    patient_column: str | None = None
    """csv: who it is of; without it every image counts as its own patient."""
    split_column: str | None = None
    """csv: train, val or test; without it patients are drawn."""
    source_column: str | None = None
    """csv: which collection or hospital it is from."""
    mask_column: str | None = None
    """csv: path of a mask image, relative to the root."""
    mask_label: str = "Mask"
    """csv: what the mask outlines."""
    box_table: Path | None = None
    """csv: a second table, one row per box: the image column again, label, x, y, w, h (or width, height)."""
    box_space: int | None = None
    """csv: width and height that the boxes refer to, such as 1024; unset: the file's own pixels."""
    box_labels: tuple[str, ...] = ()
    """csv: labels of that table to take (LABEL=NAME renames); unset: those that are findings."""
    label_columns: tuple[str, ...] = ()
    """csv: columns of 0 and 1, one finding each (COLUMN=NAME renames), or of text such as Mass|Nodule."""
    separator: str | None = None
    """csv: what stands between findings in a column of text; unset: | or ;, and a comma where that is plain."""
    nothing: tuple[str, ...] = ()
    """csv: words in a column of text for no finding; unset: No Finding, Normal, Healthy, Negative and the like."""
    uncertain: Literal["refuse", "negative", "positive", "skip", "u-zeros", "u-ones", "u-ignore"] = "refuse"
    """csv: what -1 in a column of 0 and 1 means; skip leaves the film out. CheXpert's u-zeros, u-ones and u-ignore are
    negative, positive and skip, with a blank for negative."""
    blank: Literal["refuse", "negative", "positive", "skip"] | None = None
    """csv: what a blank (or nan, N/A) means; unset: asked in a column of 0 and 1, no finding in a column of text."""

    phantom_train: int = 2000
    """phantom: films on the train/validation list."""
    phantom_test: int = 600
    """phantom: films on the test list."""
    phantom_size: int = 96
    """phantom: width and height in pixels."""
    phantom_seed: int = 0
    """phantom: the same seed gives the same films."""

    def __post_init__(self) -> None:
        if self.dataset not in READERS:
            raise ValueError(f"dataset must be one of {', '.join(READERS)}, not {self.dataset!r}")
        if self.size < 0:
            raise ValueError(f"size must be 0 or a number of pixels, not {self.size}")
        if self.workers < 0:
            raise ValueError(f"workers must be 0 or more, not {self.workers}")
        shares = self.val_fraction, self.test_fraction
        if min(shares) < 0 or sum(shares) >= 1:
            raise ValueError(f"val_fraction and test_fraction must be positive and add up to less than 1, not {shares}")
        if self.overlap != "keep" and not (self.nih_match and self.pretrain_list):
            raise ValueError(f"overlap={self.overlap!r} needs nih_match and pretrain_list")
        if self.overlap != "keep" and self.dataset not in ("rsna", "siim"):
            raise ValueError(f"overlap is for rsna and siim, whose images come from NIH, not for {self.dataset}")
        if self.dataset == "csv" and self.table is None:
            raise ValueError("dataset csv needs --table")
        if bad := next((condition for condition in self.where if "=" not in condition), None):
            raise ValueError(f"where must be COLUMN=VALUE or COLUMN!=VALUE, not {bad!r}")
        if self.where and self.dataset != "csv":
            raise ValueError(f"where is for csv, not for {self.dataset}")
        if self.separator == "":
            raise ValueError("separator must be what stands between findings, such as ',', not nothing")
        if self.box_space is not None and self.box_space < 1:
            raise ValueError(f"box_space must be a number of pixels, not {self.box_space}")
        if self.root is None and self.dataset != "phantom":
            raise ValueError(f"dataset {self.dataset} needs --root")

    @property
    def folder(self) -> Path:
        """Where the data set lies."""
        return self.root if self.root is not None else self.out / "drawn"

    @property
    def meaning_of_uncertain(self) -> str:
        """``refuse``, ``negative``, ``positive`` or ``skip``."""
        return PRESETS.get(self.uncertain, self.uncertain)

    @property
    def meaning_of_blank(self) -> str | None:
        """The same; ``None`` where nobody said."""
        return self.blank or ("negative" if self.uncertain in PRESETS else None)

    def identity(self) -> dict[str, Any]:
        """The options that the result depends on; the tables' contents are compared by digest."""
        options = {k: v.name if isinstance(v, Path) else v for k, v in asdict(self).items()}
        for name in ("label_columns", "box_labels", "where", "nothing"):
            options[name] = list(options[name])
        return {k: v for k, v in options.items() if k not in ("out", "root", "workers")}
