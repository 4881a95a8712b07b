"""Who is in which split, and what of RSNA and SIIM was already seen in pretraining on NIH."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..index import patient_share, read_index
from ..tables import read_rows, table_text
from .listing import Listing
from .settings import PrepareConfig

NIH_NAME = re.compile(r"(\d{8})_\d{3}\.png")
#: From so many patients on, each is drawn by himself: the standard deviation of a tenth is 1.3 points then.
MANY = 500
OVERLAP_NOTE = "These images come from NIH ChestX-ray14: a network pretrained there has seen them, without labels. "


def draw_splits(given: Mapping[str, Sequence[str]], config: PrepareConfig) -> dict[str, str]:
    """The split of every patient: the one given for his images, else drawn by a hash of patient and seed.

    Of many patients each is drawn by himself, so that his place does not depend on who else is there. Of few, that
    would miss the shares by far: there the first in the order of their hashes are the test set, by count.

    An error if his images were given different splits.
    """
    result, to_draw = {}, {}
    for patient, splits in given.items():
        known = {split for split in splits if split}
        if len(known) > 1:
            raise ValueError(f"patient {patient!r} has images in {' and '.join(sorted(known))}; only one is allowed")
        if known:
            result[patient] = known.pop()
        else:
            # A key of its own: the shares that cut validation on reading must not depend on this draw.
            to_draw[patient] = patient_share(f"split:{config.split_seed}:{patient}")
    if len(to_draw) < MANY:
        ends = _counts(len(to_draw), config)
        to_draw = {patient: place for place, patient in enumerate(sorted(to_draw, key=lambda p: (to_draw[p], p)))}
    else:
        ends = config.test_fraction, config.test_fraction + config.val_fraction
    for patient, place in to_draw.items():
        result[patient] = "test" if place < ends[0] else "val" if place < ends[1] else "train"
    return result


def _counts(patients: int, config: PrepareConfig) -> tuple[int, int]:
    """Of so few patients, how many are for testing, and how many for that and validation: one of each at least."""
    test, val = (
        max(round(share * patients), 1 if share and patients >= 3 else 0)
        for share in (config.test_fraction, config.val_fraction)
    )
    return test, min(test + val, max(patients - 1, test))


def match_to_nih(listing: Listing, config: PrepareConfig) -> Listing:
    """RSNA and SIIM: make patients NIH's, and deal with those seen in pretraining as ``overlap`` says."""
    listing.notes.append(OVERLAP_NOTE + _policy(config))
    if config.nih_match is None:
        return listing
    nih_name = read_match(config.nih_match)
    seen = pretrained_patients(config.pretrain_list) if config.pretrain_list else set()
    records, overlapping = [], 0
    for record in listing.records:
        stem = Path(record.name).stem
        film = NIH_NAME.fullmatch(nih_name.get(stem, ""))
        if film is None and config.overlap == "drop":
            listing.skipped.append((stem, "overlap: not in nih_match, so it may have been seen in pretraining"))
            continue
        patient = str(int(film[1])) if film else record.patient
        # What cannot be matched may have been seen, so it is never tested on.
        overlaps = film is None or patient in seen
        overlapping += patient in seen
        if overlaps and config.overlap == "drop":
            listing.skipped.append((stem, f"overlap: NIH patient {patient} is on the pretraining list"))
            continue
        split = ("train" if overlaps else "test") if config.overlap == "split" else record.split
        records.append(replace(record, patient=patient, split=split))
    if config.pretrain_list:
        total = len(listing.records)
        listing.notes.append(f"{overlapping} of the {total} images are of patients on the pretraining list.")
    listing.records = records
    listing.tables += [path for path in (config.nih_match, config.pretrain_list) if path and path.is_file()]
    return listing


def _policy(config: PrepareConfig) -> str:
    if config.overlap == "split":
        return "Patients on the pretraining list, and unmatched images, only train; the others are the test set."
    if config.overlap == "drop":
        return "Patients on the pretraining list, and unmatched images, were left out."
    if config.nih_match:
        return "Nothing was removed (--overlap split or drop does); splits go by NIH's patients."
    return "Nothing was removed, and splits go by this data set's own ids, not NIH's patients (--nih-match, --overlap)."


def read_match(path: Path) -> dict[str, str]:
    """Image id -> NIH film, from RSNA's public JSON (``subset_img_id``, ``img_id``) or a CSV with such columns."""
    if path.suffix.lower() == ".json":
        rows = json.loads(path.read_text())
        ids = ("subset_img_id", "SOPInstanceUID")
        return {row[key]: Path(row["img_id"]).name for row in rows for key in ids if row.get(key)}
    table = read_rows(path)
    films = [c for c in table if len(table) and table[c].map(lambda cell: NIH_NAME.fullmatch(cell) is not None).any()]
    others = [c for c in table if c not in films]
    if len(films) != 1 or not others:
        raise ValueError(f"{path} must have a column of image ids and one of NIH film names such as 00000001_000.png")
    return dict(zip(table[others[0]], table[films[0]], strict=True))


def pretrained_patients(path: Path) -> set[str]:
    """NIH's patients on a list of films, or on the training list of a folder in NIH's layout or prepared from it."""
    if path.is_dir():
        return set(read_index(path, val_fraction=0.0, quiet=True).split("train").patients.tolist())
    patients = {str(int(number)) for number in NIH_NAME.findall(table_text(path)[0])}
    if not patients:
        raise ValueError(f"{path} names no NIH film such as 00000001_000.png")
    return patients
