"""All stages in a row, and the report that they end in."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("segmentation_models_pytorch", reason="the example needs otloss[examples]")
pytest.importorskip("captum", reason="the example needs otloss[examples]")

from PIL import Image
from rich.console import Console
from xray_runs import QUIET, SHORT

from examples.optiml.commands.settings import XrayConfig
from examples.optiml.commands.sizes import Sizes
from examples.optiml.commands.xray import _learnable, xray
from examples.optiml.data.index import read_index
from examples.optiml.data.masks import mask_set
from examples.optiml.downstream.arms import arm_of, paper_dataset
from examples.optiml.downstream.heatmap import heatmap
from examples.optiml.downstream.settings import HeatmapConfig
from examples.optiml.downstream.starting_weights import Start
from examples.optiml.errors import CommandError
from examples.optiml.pretraining.network import load_backbone
from examples.optiml.reporting.paper import TABLE1, TABLE2
from examples.optiml.reporting.report import _made, _mixed, build, report
from examples.optiml.reporting.summary import gains
from examples.optiml.reporting.tables import heatmap_table, markdown, only_ran


def test_every_stage_ends_in_the_report_and_is_not_repeated(phantoms: Path, tmp_path: Path) -> None:
    config = XrayConfig(
        phantoms, tmp_path / "out", dataset="phantoms", results=tmp_path / "kept", label="Effusion",
        sizes=Sizes(
            epochs=1, batch_size=16, image_size=32, fractions=(0.1, 1.0), small_seeds=(), large_seeds=(0,),
            finetune=SHORT, heatmap_fractions=(0.1,), segment_fractions=(1.0,), segment_seeds=(0,), unet=SHORT,
            draws=20,
        ),
    )  # fmt: skip
    outcome = xray(config, QUIET)
    path = outcome.report
    records = json.loads((tmp_path / "kept" / "records.json").read_text())
    kinds = [(r["stage"], r["arm"], r.get("protocol"), r["fraction"]) for r in records]
    assert len(kinds) == len(set(kinds)) == 2 * (2 + 1 + 2 + 1 + 1)  # linear, neighbours, finetune, segment, heatmap
    text = path.read_text()
    for picture in ("table1.png", "table2.png", "fig2-phantoms-0.1.png", "fig3.png"):
        with Image.open(tmp_path / "kept" / picture) as image:
            assert image.size[0] > 300 and np.ptp(np.asarray(image.convert("L"))) > 200
        assert f"({picture})" in text
    tuned = {r["arm"]: r for r in records if r.get("protocol") == "finetune" and r["fraction"] == 1.0}
    ours = 100 * tuned["optiml"]["macro_auc"]
    assert f"| {ours:.1f} (1) |" in text and "61.0" not in text and "Not run" not in text
    appendix = (path.parent / "paper-tables.md").read_text()
    assert "(paper-tables.md)" in text and "| Sup.1 (random) | 61.0 |  | 71.1 |" in appendix
    assert f"{ours:.5g}" in (path.parent / "table1.csv").read_text()
    assert tuned["optiml"]["pretraining"]["method"] == "optiml" and tuned["sup1"]["pretraining"] == {}
    index = read_index(phantoms)
    found = {gain.name: gain for gain in gains(records, index, "optiml", 20, mask_set(index, "Effusion"))}
    assert list(found.values()) == outcome.gains
    names = ["frozen AUC, 10 %", "frozen AUC, all", "fine-tuned AUC, 10 %", "fine-tuned AUC, all", "neighbours' AUC"]
    assert set(found) <= {*names, "Dice, Effusion"} and "frozen AUC, 10 %" in found
    gained = found["frozen AUC, 10 %"].cells()
    assert f"| frozen AUC, 10 % | {' | '.join(gained)} |" in text
    few = {r["arm"]: r for r in records if r.get("protocol") == "linear" and r["fraction"] == 0.1}
    dice = {r["arm"]: r["positives"]["value"] for r in records if r["stage"] == "segment"}
    for gain, sides in (
        (found["frozen AUC, 10 %"], {arm: r["macro_auc"] for arm, r in few.items()}),
        (found["Dice, Effusion"], dice),
    ):
        assert gain.untrained.value == pytest.approx(100 * sides["sup1"], abs=1e-4)
        assert gain.pretrained.value == pytest.approx(100 * sides["optiml"], abs=1e-4)
        assert gain.difference.value == pytest.approx(gain.pretrained.value - gain.untrained.value)
        assert gain.difference.low <= gain.difference.value <= gain.difference.high
    lines = outcome.lines
    assert len(lines) <= 20 and max(map(len, lines)) <= 80 and "1 epochs of" in lines[0]
    assert len([line for line in lines if line.startswith("Grad-CAM points at")]) == 1
    maps = next(r for r in records if r["stage"] == "heatmap")
    assert maps["scored_findings"] <= maps["boxed_findings"] and 0 < maps["chance"]["pointing"] < 1

    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if "downstream" in p.parts and p.is_file()}
    assert xray(config, QUIET).report.read_text() == text
    run = tmp_path / "out" / "optiml-32px-1epochs-seed0"  # which knows its size
    sizes = dataclasses.replace(config.sizes, image_size=None)
    assert xray(dataclasses.replace(config, run=(run,), sizes=sizes), QUIET).report.read_text() == text
    assert before == {p: p.stat().st_mtime_ns for p in before}

    with pytest.raises(CommandError, match="are the same run of the same arm"):
        report([*records, records[0]], tmp_path / "twice", QUIET)
    with pytest.raises(CommandError, match=r"is missing: run evaluate --protocol finetune --fractions 0\.5 first"):
        heatmap(HeatmapConfig(phantoms, untrained=True, image_size=32, fraction=0.5, out=tmp_path), QUIET)


def test_labels_that_teach_nothing_are_left_out(phantoms: Path) -> None:
    train, told = read_index(phantoms).split("train"), io.StringIO()
    train = train.take(np.unique(train.patients, return_index=True)[1])  # a film of each patient
    sizes = Sizes(fractions=(1 / len(train), 1.0))
    assert _learnable(sizes, train, Console(file=told)).fractions == (1.0,)
    assert "which is 1 film and teaches nothing" in told.getvalue()
    with pytest.raises(CommandError, match="have no finding that some have and others have not"):
        _learnable(sizes, train.take(np.arange(1)), Console(file=told))


def finished_run(folder: Path, seed: int = 0, **changes: float) -> Path:
    """What ``xray --run`` looks at."""
    folder.mkdir(parents=True)
    config = {"method": "optiml", "seed": seed, "image_size": 32, "val_fraction": 0.3, "split_seed": 5, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(load_backbone(None).state_dict(), folder / "backbone.pth")
    return folder


def test_runs_of_one_name_or_row_or_other_patients_are_refused(phantoms: Path, tmp_path: Path) -> None:
    first = finished_run(tmp_path / "a" / "run")
    for other, message in (
        (finished_run(tmp_path / "b" / "run", seed=1), "two networks have the name 'run'"),
        (finished_run(tmp_path / "untrained", seed=1), "two networks have the name 'untrained'"),
        (finished_run(tmp_path / "c"), "two networks have the row of the report 'optiml, seed 0'"),
        (finished_run(tmp_path / "d", seed=1, val_fraction=0.2), "val_fraction 0.2, split_seed 5 and val_fraction 0.3"),
    ):
        with pytest.raises(CommandError, match=f"^--run: .*{message}"):
            xray(XrayConfig(phantoms, tmp_path / "out", run=(first, other)), QUIET)
    assert not (tmp_path / "out").exists()


def test_every_row_of_xray_has_the_runs_validation_patients(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Start] = []
    monkeypatch.setattr("examples.optiml.commands.xray.stages", lambda sizes, start, *rest: asked.append(start) or [])
    xray(XrayConfig(phantoms, tmp_path / "out", run=(finished_run(tmp_path / "run"),)), QUIET)
    assert [start.random for start in asked] == [True, False]
    splits = [start.index().splits.tolist() for start in asked]
    assert all(split == read_index(phantoms, 0.3, 5).splits.tolist() for split in splits)


def made(arm: str, dataset: str, fraction: float, seed: int, auc: float | None, protocol: str = "finetune") -> dict:
    return {
        "stage": "evaluate", "arm": arm, "dataset": dataset, "protocol": protocol, "fraction": fraction, "seed": seed,
        "raw": {"macro": {"value": auc, "low": auc and auc - 0.1, "high": auc and auc + 0.1}}, "images": 9,
        "identity": {"image_size": 64}, "pretraining": {}, "train_images": 5, "file": f"{arm}{fraction}{seed}.json",
        "made": {"commit": "0" * 40, "time": "2026-11-23"},
    }  # fmt: skip


def test_the_page_shows_what_was_run_and_the_paper_beside_it_only() -> None:
    records = [made("optiml", "nih-small", 0.01, seed, auc) for seed, auc in enumerate((0.6, 0.7))]
    records += [made("sup1", "nih-small", 0.1, 0, 0.5), made("own", "nih-small", 0.1, 0, 0.4)]
    table1, *others = map(only_ran, build(records))
    assert not any(table.sections for table in others) and [s.title for s in table1.sections] == ["NIH (ours: small)"]
    assert markdown(table1).endswith(
        "| | 1 % paper | 1 % ours | 10 % paper | 10 % ours |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| Sup.1 (random) |  |  | 71.1 | 50.0 (1) |\n"
        "| OPTiML | 68.8 | 65.0 ± 7.1 (2) |  |  |\n"
        "| own |  |  |  | 40.0 (1) |\n"
    )


def test_the_paper_tables_leave_blank_what_was_not_run() -> None:
    records = [made("optiml", "nih-small", 0.01, seed, auc) for seed, auc in enumerate((0.6, 0.7, None))]
    records += [made("optiml-no-cvsim", "nih-small", 0.1, 0, 0.66)]
    table1, table2, table3, _, fig3 = map(markdown, build(records))
    assert "### NIH (ours: small)" in table1 and "### VinBig-CXR" in table1
    assert "| OPTiML | 68.8 | 65.0 ± 7.1 (2) | 77.6 |  | 82.5 |  |" in table1  # a run without a class has no value
    assert "| VICReg | 67.4 |  | 75.5 |  | 80.2 |  |" in table1
    assert "| OPTiML | 63.8 | 70.3 | 73.9 |" not in table1 and "| OPTiML | 63.8 |  | 70.3 |  | 73.9 |  |" in table2
    assert "| var+cov ✓, CV-SIM ✗ | 0.678 |  | 0.769 | 0.660 (1) |" in table3
    assert "| var+cov ✗, CV-SIM ✗ | 0.673 |  | 0.762 |  |" in table3
    assert "| OPTiML | 0.586 |  |  |  |" in fig3 and "| SimCLR |  |  |  |  |" in fig3


def test_rows_that_average_over_different_settings_say_so() -> None:
    records = [made("vicreg", "set", 0.1, seed, 0.6) for seed in range(3)]
    options = {"method": "vicreg", "epochs": 3}
    for seed, record in enumerate(records):
        ordered = options if seed else dict(reversed(options.items()))  # which says nothing
        record["pretraining"] = {**ordered, "seed": seed, "precision": "bf16-mixed" if seed else "32-true"}
    assert _mixed(records) == [] and _made(records).count("epochs of vicreg") == 3
    records[0]["identity"] = {**records[0]["identity"], "train": {"epochs": 5}}
    assert _mixed(records) == ["**Row vicreg on set evaluate finetune 10% mixes 2 versions of data or sizes.**\n"]
    records[1]["pretraining"]["epochs"] = 4
    assert _mixed(records)[0] == "**Row vicreg on set mixes 2 pretraining settings.**\n"


def test_rows_and_columns_of_the_paper() -> None:
    assert len(TABLE1) == len(TABLE2) == 10 * 9
    assert (TABLE1["optiml", "rsna", 1.0], TABLE2["sup2", "rsna", 0.01]) == ("84.0", "85.7")
    assert [paper_dataset(name) for name in ("nih", "nih-cxr-dev", "siim", "phantoms", "nihilism")] == [
        "nih", "nih", "siim", None, None,
    ]  # fmt: skip
    options = {"beta": 25.0, "eta": 1.0, "marginals": "perplexity"}
    assert arm_of({"method": "optiml", "options": options}) == "optiml"
    assert arm_of({"method": "optiml", "options": {**options, "marginals": "uniform"}}) == "optiml-no-cvsim"
    assert arm_of({"method": "optiml", "options": {**options, "beta": 0, "eta": 0}}) == "optiml-no-varcov"
    assert arm_of({"method": "byol"}) == "byol"


def test_maps_that_show_little_say_so() -> None:
    def maps(arm: str, hits: float) -> dict:
        figures = {"pointing": hits, "iou": 0.1, "empty": 0.5}
        return {
            **made(arm, "set", 0.1, 0, None), "stage": "heatmap", "scored_findings": 3, "boxed_findings": 3,
            "chance": {"pointing": 0.1, "iou": 0.03},
            **{key: {"value": x, "low": x, "high": x} for key, x in figures.items()},
        }  # fmt: skip

    (section,) = heatmap_table([maps("sup1", 0.3), maps("optiml", 0.15)]).sections
    assert "OPTiML points at 15 % of the findings (chance: 10 %), 50 % of its maps are empty" in section.note
    assert "Sup.1" not in section.note and "not as evidence" in section.note
    (section,) = heatmap_table([maps("sup1", 0.3)]).sections
    assert "evidence" not in section.note
