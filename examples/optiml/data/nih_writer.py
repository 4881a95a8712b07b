"""Write images in ChestX-ray14's official layout, so that phantoms are read by the very loader real films use.

The official files: ``Data_Entry_2017_v2020.csv`` (labels; its header holds unquoted commas),
``BBox_List_2017.csv`` (boxes in the pixels of the 1024-pixel films), ``train_val_list.txt``,
``test_list.txt`` and ``images/``. One addition: ``masks/<Class>/<image>`` for findings whose outline is known.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from ..atomic import atomic_path
from .nih_format import BOX_FILE, BOX_HEADER, BOX_SPACE, ENTRY_FILE, ENTRY_HEADER, ORIGIN_FILE, TEST_FILE, TRAIN_FILE
from .phantom import Phantom, draw

VISITS = 2


@dataclass(frozen=True)
class PhantomConfig:
    """Which phantoms to draw, and where to."""

    out: Path
    """Folder to write; must not hold another data set."""
    train: int = 2000
    """Number of films on the train/validation list."""
    test: int = 600
    """Number of films on the test list, of other patients."""
    size: int = 96
    """Width and height in pixels."""
    seed: int = 0
    """The same seed gives the same films, pixel for pixel."""

    def origin(self) -> str:
        """What the films follow from, wherever they lie."""
        return f"{replace(self, out=Path())}\n"


def write_phantoms(config: PhantomConfig) -> Path:
    """Draw ``config.train + config.test`` films, ``VISITS`` per patient, and write them; returns the folder."""
    for count, name in ((config.train, "train"), (config.test, "test")):
        if count < VISITS or count % VISITS:
            raise ValueError(f"{name} must be a positive multiple of {VISITS} (visits per patient), not {count}")

    def films() -> Iterable[tuple[str, int, int, Phantom]]:
        for index in range(config.train + config.test):
            patient, visit = index // VISITS + 1, index % VISITS
            yield f"{patient:08d}_{visit:03d}.png", patient, visit, draw(config.seed, patient, visit, config.size)

    return write_layout(config.out, films(), config.train, config.origin())


def write_layout(root: Path, films: Iterable[tuple[str, int, int, Phantom]], train: int, origin: str) -> Path:
    """Write films (name, patient, visit, phantom) in order; the first ``train`` go on the train/validation list."""
    if (root / ENTRY_FILE).exists():
        raise FileExistsError(f"{root} already holds a data set; choose another folder or delete it first")
    (root / "images").mkdir(parents=True, exist_ok=True)
    entries, boxes, names = [ENTRY_HEADER], [BOX_HEADER], []
    for name, patient, visit, film in films:
        size = film.image.shape[0]
        Image.fromarray(film.image).save(root / "images" / name)
        findings = "|".join(film.labels) or "No Finding"
        entries.append(f"{name},{findings},{visit},{patient},50,F,PA,{size},{size},1.0,1.0")
        for label in film.labels:
            folder = root / "masks" / label
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(film.masks[label].astype("uint8") * 255).save(folder / name)
            x, y, w, h = (value * BOX_SPACE / size for value in film.box(label))
            boxes.append(f"{name},{label},{x:.3f},{y:.3f},{w:.3f},{h:.3f}")
        names.append(name)
    (root / BOX_FILE).write_text("\n".join(boxes) + "\n")
    (root / TRAIN_FILE).write_text("\n".join(names[:train]) + "\n")
    (root / TEST_FILE).write_text("\n".join(names[train:]) + "\n")
    (root / ORIGIN_FILE).write_text(origin)
    # Written last: its presence says that the folder is complete.
    with atomic_path(root / ENTRY_FILE) as part:
        part.write_text("\n".join(entries) + "\n")
    return root
