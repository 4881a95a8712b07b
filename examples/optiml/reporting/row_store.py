"""The small files of one row under one seed. They show that nothing is left to do, even when the weights are gone.

* ``NAME.json``: the records of all stages;
* ``NAME.npz``: arrays that the records do not hold: for paired differences and for the figure of heatmaps;
* ``NAME.csv``: the pretraining's log as means over each epoch, with what the monitor measured;
* ``films.npz``: the films of the figure of heatmaps, once for all rows.

NAME is the arm with the seed, such as ``vicreg-seed0``.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..atomic import atomic_path, write_json
from ..downstream.result_files import Record
from ..pretraining.log import epoch_means, log_frame, read_log

FILMS = "films"
#: With so many test films at most, test scores are kept for every share of the labels, else with all labels only.
SMALL_SET = 1000


def ranks(scores: NDArray[Any]) -> NDArray[Any]:
    """Each column's scores as ranks, equal ones sharing a rank. An AUC depends on nothing else, and they are small."""
    columns = [np.unique(column, return_inverse=True)[1] for column in scores.T]
    return np.stack(columns, 1).astype(np.uint16 if len(scores) <= 2**16 else np.uint32)


class RowStore:
    """The files of one row and seed in the folder of results. The keys of arrays are DATASET/RECORD/ARRAY.

    All records are of one start: a record of another start removes those that are there. Records of the same start
    stay, also those of sizes that a command does not ask for.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.path = folder / f"{name}.json"
        self.seconds, self.records, self.pretraining = 0.0, dict[str, Record](), dict[str, Any]()
        self.arrays, self.films = dict[str, NDArray[Any]](), _load(folder / f"{FILMS}.npz")
        if self.path.exists() and self.path.with_suffix(".npz").exists():
            content = json.loads(self.path.read_text())
            self.seconds, self.records, self.pretraining = (content[k] for k in ("seconds", "records", "pretraining"))
            self.arrays = _load(self.path.with_suffix(".npz"))

    @property
    def curves(self) -> list[dict[str, float]]:
        """One dictionary per epoch of the pretraining; a single one for the untrained network."""
        return read_log(self.path.with_suffix(".csv"))

    def restore(self, folder: Path) -> None:
        """Write the records to where the stages look for them: ``folder`` / DATASET / NAME."""
        for key, record in self.records.items():
            dataset, _, stem = key.partition("/")
            path = folder / dataset / self.name / f"{stem}.json"
            write_json(path, {**record, "pretraining": self.pretraining})
            films = {name.rpartition("/")[2]: x for name, x in self.films.items() if name.startswith(f"{key}/")}
            if films and f"{key}/maps" in self.arrays:
                _save(path.with_suffix(".npz"), {"maps": self.arrays[f"{key}/maps"], **films})

    def add(self, record: Record) -> None:
        """Store a record, and those arrays beside its file that the report needs."""
        key, path = _key(record), Path(record["file"])
        stripped = {name: value for name, value in record.items() if name not in ("file", "pretraining")}
        if self.records.get(key) == stripped:
            return
        self._forget([name for name, known in self.records.items() if _start_of(known) != _start_of(record)])
        self.records[key], self.pretraining = stripped, record["pretraining"]
        if path.with_suffix(".npz").exists():
            self._store_arrays(key, record, _load(path.with_suffix(".npz")))
        self.write()

    def records_without_scores(self) -> list[str]:
        """The keys of records with all labels whose test scores are missing, as earlier versions did not store them."""
        return [key for key, r in self.records.items() if _with_scores(r) and f"{key}/ranks" not in self.arrays]

    def _store_arrays(self, key: str, record: Record, arrays: dict[str, NDArray[Any]]) -> None:
        if _with_scores(record) or (record["stage"] == "evaluate" and len(arrays["scores"]) <= SMALL_SET):
            self.arrays[f"{key}/ranks"] = ranks(arrays["scores"])
        elif record["stage"] == "segment":
            self.arrays[f"{key}/dice"] = arrays["dice"].astype(np.float16)
        elif record["stage"] == "heatmap":
            of_fraction = key.rpartition("-seed")[0]
            if any(name.startswith(f"{of_fraction}-seed") and name != f"{key}/maps" for name in self.arrays):
                return  # the figure shows one seed, and has it
            self.arrays[f"{key}/maps"] = arrays["maps"]
            films = {f"{key}/{name}": x for name, x in arrays.items() if name != "maps"}
            self.films = _load(self.folder / f"{FILMS}.npz")  # another command may have added films
            if any(name not in self.films or not np.array_equal(x, self.films[name]) for name, x in films.items()):
                self.films |= films
                _save(self.folder / f"{FILMS}.npz", self.films)

    def _forget(self, keys: list[str]) -> None:
        """Remove records with their arrays. If no record is left, the time that was spent is 0 again."""
        self.records = {key: record for key, record in self.records.items() if key not in keys}
        self.arrays = {name: x for name, x in self.arrays.items() if name.rpartition("/")[0] not in keys}
        self.seconds = self.seconds if self.records else 0.0

    def arrays_of(self, records: list[Record]) -> dict[str, NDArray[Any]]:
        """The arrays of those among ``records`` that are of this row and seed."""
        keys = {_key(record) for record in records if Path(record["file"]).parent.name == self.name}
        return {name: x for name, x in self.arrays.items() if name.rpartition("/")[0] in keys}

    def spend(self, seconds: float) -> None:
        """Add to the time that making the row took."""
        self.seconds = round(self.seconds + seconds, 1)
        if self.records:
            self.write()

    def write(self) -> None:
        """Write the files if a record has changed. Each record is one line, so that ``git diff`` shows which did."""
        head = json.dumps({"name": self.name, "seconds": self.seconds, "pretraining": self.pretraining})
        lines = [f"{json.dumps(key)}: {json.dumps(self.records[key], sort_keys=True)}" for key in sorted(self.records)]
        text = head[:-1] + ', "records": {\n' + ",\n".join(lines) + "\n}}\n"
        if not self.path.exists() or self.path.read_text() != text:
            # Arrays before records: a stop between the two must not leave records without their arrays.
            _save(self.path.with_suffix(".npz"), self.arrays)
            with atomic_path(self.path) as part:
                part.write_text(text)

    def keep_curves(self, epochs: list[dict[str, float]]) -> None:
        """Write one line per epoch. A cell is blank where the epoch lacks the figure."""
        columns = list(dict.fromkeys(column for epoch in epochs for column in epoch))
        with atomic_path(self.path.with_suffix(".csv")) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows({column: f"{x:.5g}" for column, x in epoch.items()} for epoch in epochs)


#: The files of all rows that are in the report: by arm, then by seed.
Stores = dict[str, dict[int, RowStore]]


def curves_of(log: Path, monitor: Path) -> list[dict[str, float]]:
    """A run's log as means over each epoch, with what the monitor measured after it, if it did."""
    measured = {row["epoch"]: row for row in read_log(monitor)}
    return [
        {name: mean for name, mean in row.items() if mean == mean} | monitor_columns(measured.get(row["epoch"], {}))
        for row in epoch_means(log_frame(log)).to_dict("records")
    ]


def monitor_columns(measured: dict[str, float]) -> dict[str, float]:
    """Those of the monitor's figures that are stored."""
    return {name: x for name, x in measured.items() if name in ("knn_auc", "knn_auc_within", "effective_rank")}


def _with_scores(record: Record) -> bool:
    """Whether the ranks of the record's test scores are stored however many films there are."""
    return bool(record["stage"] == "evaluate" and record["fraction"] == 1.0)


def _key(record: Record) -> str:
    return f"{record['dataset']}/{Path(record['file']).stem}"


def _start_of(record: Record) -> tuple[Any, ...]:
    """What identifies the start that a record is of."""
    return tuple(record["identity"].get(name) for name in ("start", "image_size", "stem"))


def _load(path: Path) -> dict[str, NDArray[Any]]:
    if not path.exists():
        return {}
    with np.load(path) as arrays:
        return dict(arrays)


def _save(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    named: Any = arrays
    with atomic_path(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **named)
