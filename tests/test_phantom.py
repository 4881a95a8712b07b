"""Phantoms: what is drawn, and that it comes back as drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="the example needs otloss[examples]")
pytest.importorskip("pandas", reason="the example needs otloss[examples]")

from examples.optiml.data.images import ImageStore
from examples.optiml.data.index import NIH_CLASSES, read_index
from examples.optiml.data.nih_format import ENTRY_FILE
from examples.optiml.data.nih_writer import PhantomConfig, write_phantoms
from examples.optiml.data.phantom import PHANTOM_CLASSES, draw


def test_a_phantom_depends_on_its_three_numbers_alone() -> None:
    first = draw(3, 5, 1, 48)
    draw(9, 9, 0, 48)
    np.random.default_rng(0).random()
    again = draw(3, 5, 1, 48)
    assert np.array_equal(first.image, again.image) and first.labels == again.labels
    for other in (draw(4, 5, 1, 48), draw(3, 6, 1, 48), draw(3, 5, 0, 48)):
        assert not np.array_equal(first.image, other.image)


def test_half_a_table_is_not_taken_for_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table comes last, and its presence says that all films are there."""
    write = Path.write_text

    def cut_off(self: Path, text: str) -> None:
        write(self, text[: len(text) // 2])
        if self.name.startswith(ENTRY_FILE):
            raise KeyboardInterrupt

    config = PhantomConfig(tmp_path / "data", 4, 2, 32)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", cut_off)
        with pytest.raises(KeyboardInterrupt):
            write_phantoms(config)
    assert len(read_index(write_phantoms(config))) == 6


def test_phantom_labels_masks_and_boxes_agree() -> None:
    films = [draw(0, patient, 0, 64) for patient in range(80)]
    counts = dict.fromkeys(PHANTOM_CLASSES, 0)
    for film in films:
        assert film.image.shape == (64, 64) and film.image.dtype == np.uint8
        assert np.ptp(film.image) > 60  # something is to be seen
        for label in film.labels:
            counts[label] += 1
            x, y, w, h = film.box(label)
            inside = film.masks[label][y : y + h, x : x + w]
            assert inside.sum() == film.masks[label].sum() > 0  # the box holds the whole mask ...
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.any()  # ... and nothing more
    assert all(5 <= count <= 35 for count in counts.values()), counts  # prevalence 0.22 of 80


def test_a_nodule_is_brighter_than_the_lung_around_it() -> None:
    contrasts = []
    for patient in range(150):
        film = draw(1, patient, 0, 96)
        if film.labels == ["Nodule"]:
            x, y, w, h = film.box("Nodule")
            mask = film.masks["Nodule"]
            ring = np.zeros_like(mask)
            ring[max(y - 4, 0) : y + h + 4, max(x - 4, 0) : x + w + 4] = True
            contrasts.append(film.image[mask].mean() - film.image[ring & ~mask].mean())
    assert len(contrasts) >= 5
    assert np.median(contrasts) > 5, contrasts


def test_written_phantoms_come_back_as_drawn(phantoms: Path) -> None:
    index = read_index(phantoms)
    images = ImageStore(index.paths, size=48)
    for row in (0, 17, 99):
        film = draw(0, int(index.patients[row]), int(str(index.names[row])[-5]), 48)
        assert np.array_equal(np.asarray(images[row]), film.image)
        assert [name for name, on in zip(NIH_CLASSES, index.labels[row], strict=True) if on] == sorted(
            film.labels, key=NIH_CLASSES.index
        )
        for label in film.labels:
            mask = index.mask(row, label)
            assert mask is not None and np.array_equal(mask, film.masks[label])
            box = next(b for b in index.boxes[str(index.names[row])] if b.label == label)
            assert np.allclose(np.array([box.x, box.y, box.width, box.height]) * 48, film.box(label), atol=1e-3)
    with pytest.raises(FileExistsError, match="already holds"):
        write_phantoms(PhantomConfig(phantoms))


def test_no_patient_is_in_two_splits(phantoms: Path) -> None:
    for seed in range(3):
        index = read_index(phantoms, val_fraction=0.3, split_seed=seed)
        groups = {name: set(index.split(name).patients) for name in ("train", "val", "test")}
        assert all(groups.values())
        assert sum(map(len, groups.values())) == len(set.union(*groups.values())) == 50
    other = read_index(phantoms, val_fraction=0.3, split_seed=7)
    assert other.fingerprint() != index.fingerprint()
    assert np.array_equal(read_index(phantoms, 0.3, 2).splits, index.splits)
