"""``MODEL_CARD.md`` says what is true of the run."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("pydicom", reason="the example needs otloss[examples]")
pytest.importorskip("tyro", reason="the example needs otloss[examples]")

from xray_layouts import nih, run, write_png, write_text

from examples.optiml.data.index import read_index
from examples.optiml.pretraining.distributed import World
from examples.optiml.pretraining.model_card import write_model_card
from examples.optiml.pretraining.run_folder import claim_run_folder
from examples.optiml.pretraining.settings import PretrainConfig
from examples.optiml.pretraining.trainer import CARD


def card(config: PretrainConfig) -> str:
    index = read_index(config.data, config.val_fraction, config.split_seed)
    claim_run_folder(config, index.fingerprint())
    write_model_card(config.resolve(), index, index.split("train"), World(), config.out / CARD)
    return (config.out / CARD).read_text()


def test_where_the_validation_patients_come_from(tmp_path: Path) -> None:
    run("nih", nih(tmp_path / "nih"), tmp_path / "official")
    cut = card(PretrainConfig(tmp_path / "official", tmp_path / "a", val_fraction=0.3, split_seed=4))
    assert "(validation share 0.3, split seed 4)." in cut and "thaws" not in cut

    splits = ("train", "val", "test")
    for seed, split in enumerate(splits):
        write_png(tmp_path / "films" / f"{split}.png", seed)
    table = write_text(tmp_path / "films" / "T.csv", ["image,part", *(f"{split}.png,{split}" for split in splits)])
    run("csv", table.parent, tmp_path / "own", table=table, split_column="part")
    own = card(PretrainConfig(tmp_path / "own", tmp_path / "b", norm="frozen"))
    assert "train 1, val 1, test 1 (the validation set is the data set's own)." in own
    assert "validation share" not in own and "thaws" in own
