"""What is kept of a row and seed: small files from which it is known, without its weights, that nothing is to be done.

``NAME.json`` holds the records of all stages, ``NAME.npz`` what the records do not say and paired comparisons and the
figure of heatmaps need, ``NAME.csv`` the pretraining's log as means over epochs, and what its monitor measured.
``films.npz`` has the films of the figure, once for all rows.
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


def ranks(scores: NDArray[Any]) -> NDArray[Any]:
    """Each column's values by their place among its different values: all that an AUC depends on, in few bytes."""
    columns = [np.unique(column, return_inverse=True)[1] for column in scores.T]
    return np.stack(columns, 1).astype(np.uint16 if len(scores) <= 2**16 else np.uint32)


class RowStore:
    """Files of one row and seed in the folder of results; arrays go by DATASET/RECORD/ARRAY.

    All records are of one start. Sizes that a command does not ask for stay; another start's records take their place.
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
        """A row per epoch of the pretraining; of the untrained network, one."""
        return read_log(self.path.with_suffix(".csv"))

    def restore(self, folder: Path) -> None:
        """Put the records back where the stages look for them: ``folder`` / DATASET / NAME."""
        for key, record in self.records.items():
            dataset, _, stem = key.partition("/")
            path = folder / dataset / self.name / f"{stem}.json"
            write_json(path, {**record, "pretraining": self.pretraining})
            films = {name.rpartition("/")[2]: x for name, x in self.films.items() if name.startswith(f"{key}/")}
            if films and f"{key}/maps" in self.arrays:
                _save(path.with_suffix(".npz"), {"maps": self.arrays[f"{key}/maps"], **films})

    def add(self, record: Record) -> None:
        """Keep a record, and what is needed of the arrays beside it."""
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
        """Records with all labels of which the test scores are not there: a stage keeps more than it once did."""
        return [key for key, r in self.records.items() if _with_scores(r) and f"{key}/ranks" not in self.arrays]

    def _store_arrays(self, key: str, record: Record, arrays: dict[str, NDArray[Any]]) -> None:
        if _with_scores(record):
            self.arrays[f"{key}/ranks"] = ranks(arrays["scores"])
        elif record["stage"] == "segment":
            self.arrays[f"{key}/dice"] = arrays["dice"].astype(np.float16)
        elif record["stage"] == "heatmap":
            of_fraction = key.rpartition("-seed")[0]
            if any(name.startswith(f"{of_fraction}-seed") and name != f"{key}/maps" for name in self.arrays):
                return  # the figure shows one seed
            self.arrays[f"{key}/maps"] = arrays["maps"]
            films = {f"{key}/{name}": x for name, x in arrays.items() if name != "maps"}
            self.films = _load(self.folder / f"{FILMS}.npz")  # to which another command may have added
            if any(name not in self.films or not np.array_equal(x, self.films[name]) for name, x in films.items()):
                self.films |= films
                _save(self.folder / f"{FILMS}.npz", self.films)

    def _forget(self, keys: list[str]) -> None:
        """Drop records with their arrays; and the time it took, if none is left."""
        self.records = {key: record for key, record in self.records.items() if key not in keys}
        self.arrays = {name: x for name, x in self.arrays.items() if name.rpartition("/")[0] not in keys}
        self.seconds = self.seconds if self.records else 0.0

    def arrays_of(self, records: list[Record]) -> dict[str, NDArray[Any]]:
        """The arrays that belong to those of these records that are of this row and seed."""
        mine = {_key(record) for record in records if Path(record["file"]).parent.name == self.name}
        return {name: x for name, x in self.arrays.items() if name.rpartition("/")[0] in mine}

    def spend(self, seconds: float) -> None:
        """Count the time that making it took."""
        self.seconds = round(self.seconds + seconds, 1)
        if self.records:
            self.write()

    def write(self) -> None:
        """A record is a line, so that a difference between two versions shows which were made again."""
        head = json.dumps({"name": self.name, "seconds": self.seconds, "pretraining": self.pretraining})
        lines = [f"{json.dumps(key)}: {json.dumps(self.records[key], sort_keys=True)}" for key in sorted(self.records)]
        text = head[:-1] + ', "records": {\n' + ",\n".join(lines) + "\n}}\n"
        if not self.path.exists() or self.path.read_text() != text:
            _save(self.path.with_suffix(".npz"), self.arrays)  # first: records without their arrays are not complete
            with atomic_path(self.path) as part:
                part.write_text(text)

    def keep_curves(self, rows: list[dict[str, float]]) -> None:
        """A row per epoch; a column is blank where a row lacks it."""
        names = list(dict.fromkeys(name for row in rows for name in row))
        with atomic_path(self.path.with_suffix(".csv")) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows({name: f"{x:.5g}" for name, x in row.items()} for row in rows)


def curves_of(log: Path, monitor: Path) -> list[dict[str, float]]:
    """Means over epochs of a run's log, with what was measured after an epoch, where it was."""
    measured = {row["epoch"]: row for row in read_log(monitor)}
    return [
        {name: mean for name, mean in row.items() if mean == mean} | monitor_columns(measured.get(row["epoch"], {}))
        for row in epoch_means(log_frame(log)).to_dict("records")
    ]


def monitor_columns(measured: dict[str, float]) -> dict[str, float]:
    """What is kept of the monitor's figures."""
    return {name: x for name, x in measured.items() if name in ("knn_auc", "knn_auc_within", "effective_rank")}


def _with_scores(record: Record) -> bool:
    """Whether its test scores are kept, by their ranks."""
    return bool(record["stage"] == "evaluate" and record["fraction"] == 1.0)


def _key(record: Record) -> str:
    return f"{record['dataset']}/{Path(record['file']).stem}"


def _start_of(record: Record) -> tuple[Any, Any]:
    """Whose features its figures are of."""
    return record["identity"]["start"], record["identity"]["image_size"]


def _load(path: Path) -> dict[str, NDArray[Any]]:
    if not path.exists():
        return {}
    with np.load(path) as arrays:
        return dict(arrays)


def _save(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    named: Any = arrays
    with atomic_path(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **named)
