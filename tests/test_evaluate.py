"""Evaluation and report of the OPTiML example: label fractions, protocols, and all stages in a row."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("segmentation_models_pytorch", reason="the example needs otloss[examples]")
pytest.importorskip("captum", reason="the example needs otloss[examples]")

from PIL import Image
from rich.console import Console
from torchvision.models import resnet18

from examples.optiml.__main__ import cli
from examples.optiml.data import ChestIndex, read_index
from examples.optiml.evaluate import EvaluateConfig, Evaluation, evaluate, source_record
from examples.optiml.evaluate import main as evaluate_command
from examples.optiml.finetune import finetune, predict
from examples.optiml.heatmap import HeatmapConfig, heatmap
from examples.optiml.layout import PhantomConfig, write_phantoms
from examples.optiml.model import Backbone, load_backbone, set_norm
from examples.optiml.paper import TABLE1, TABLE2, arm_of, paper_dataset
from examples.optiml.phantom import PHANTOM_CLASSES
from examples.optiml.report import build, report
from examples.optiml.scores import Scored, summarise
from examples.optiml.segment import SegmentConfig
from examples.optiml.start import StartConfig, resolve
from examples.optiml.subsets import label_fraction, write_ids
from examples.optiml.tables import markdown
from examples.optiml.training import TrainConfig, fit, jitter
from examples.optiml.xray import XrayConfig, xray

QUIET = Console(quiet=True)
SHORT = TrainConfig(lr=1e-3, epochs=1, batch_size=16, min_steps=2, max_steps=2, checks=1)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(PhantomConfig(tmp_path_factory.mktemp("data") / "phantoms", train=60, test=40, size=32))


def toy_index(patients: list[int], labels: list[list[int]] | None = None) -> ChestIndex:
    count = len(patients)
    marks = np.array(labels or [[0]] * count, dtype=np.uint8)
    names = np.array([f"{i}.png" for i in range(count)])
    return ChestIndex(
        Path(), names, [Path(name) for name in names], np.array(patients), np.array(["test"] * count), marks,
        classes=tuple(f"c{i}" for i in range(marks.shape[1])),
    )  # fmt: skip


# --- label fractions -----------------------------------------------------------------------------------------


def test_fractions_are_nested_seeded_and_by_patient(phantoms: Path, tmp_path: Path) -> None:
    train = read_index(phantoms).split("train")
    for seed in range(3):
        parts = [label_fraction(train, fraction, seed) for fraction in (0.02, 0.1, 0.5, 1.0)]
        for smaller, larger in itertools.pairwise(parts):
            assert set(smaller.names) < set(larger.names)
        for part, fraction in zip(parts, (0.02, 0.1, 0.5, 1.0), strict=True):
            rest = set(train.names) - set(part.names)
            assert not {name[:8] for name in part.names} & {name[:8] for name in rest}  # whole patients
            assert fraction * len(train) <= len(part) < fraction * len(train) + 2  # two films each
        assert list(parts[-1].names) == list(train.names)
        ids = write_ids(parts[1], tmp_path, 0.1, seed).read_text().split()
        assert ids == list(parts[1].names)
    assert set(label_fraction(train, 0.1, 0).names) != set(label_fraction(train, 0.1, 1).names)
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\], not 0"):
        label_fraction(train, 0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fractions", "0"], "fractions must be one or more different numbers in (0, 1], not 0"),
        (["--fractions", "0.1", "-0.5"], "not 0.1 -0.5"),
        (["--fractions", "1.5"], "not 1.5"),
        (["--fractions", "0.1", "0.1"], "not 0.1 0.1"),
        (["--fractions"], "not none"),
        (["--seeds"], "seeds must be one or more different whole numbers from 0 up, not none"),
        (["--seeds", "3", "3"], "not 3 3"),
        (["--seeds", "-1"], "not -1"),
    ],
)
def test_bad_fractions_and_seeds_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    for command in ("evaluate", "segment", "xray"):
        with pytest.raises(SystemExit):
            cli([command, "--data", str(tmp_path), *options])
        shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert message in shown, command
    with pytest.raises(ValueError, match="fraction must be one or more"):
        HeatmapConfig(tmp_path, fraction=2.0)


def test_small_fractions_get_more_seeds(phantoms: Path) -> None:
    untrained = Evaluation(EvaluateConfig(phantoms, untrained=True, fractions=(0.01, 0.1, 1.0)), QUIET)
    assert sorted(untrained.plan()) == [(f, s) for f, n in ((0.01, 5), (0.1, 3), (1.0, 3)) for s in range(n)]
    named = Evaluation(dataclasses.replace(untrained.config, seeds=(7, 2)), QUIET)
    assert named.plan() == [(f, s) for s in (7, 2) for f in (0.01, 0.1, 1.0)]
    frozen = dataclasses.replace(untrained.start, weights=Path("backbone.pth"))  # leaves nothing to chance
    untrained.start = named.start = frozen
    assert [s for f, s in untrained.plan() if f == 1.0] == [0] and [s for f, s in named.plan() if f == 1.0] == [7]


def test_a_patient_with_one_image_and_one_with_many() -> None:
    """The smallest share is one patient, whoever that is; images of one are never divided."""
    index = toy_index([1] + [2] * 9)
    sizes = {len(label_fraction(index, 0.01, seed)) for seed in range(20)}
    assert sizes == {1, 9}
    assert len(label_fraction(index, 0.95, 0)) == 10
    words = dataclasses.replace(index, patients=np.array(["a"] + ["b"] * 9))
    assert {len(label_fraction(words, 0.01, seed)) for seed in range(20)} == {1, 9}


# --- scores --------------------------------------------------------------------------------------------------


def test_classes_absent_from_train_or_test_are_masked() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((40, 4)) < 0.4).astype(np.uint8)
    labels[:, 3] = 0  # absent from test
    index = toy_index(list(range(40)), labels.tolist())
    scores = labels + 0.7 * rng.standard_normal((40, 4))
    usable = np.array([True, True, False, True])  # the third is absent from training
    figures = summarise(Scored(index, scores, usable), draws=200)
    assert list(figures["raw"]["per_class"]) == ["c0", "c1"] == list(figures["raw"]["intervals"])
    assert figures["macro_auc"] == pytest.approx(np.mean(list(figures["raw"]["per_class"].values())), abs=1e-4)
    for name, (low, high) in figures["raw"]["intervals"].items():
        assert low <= figures["raw"]["per_class"][name] <= high and low < high
    nothing = summarise(Scored(index, scores, np.zeros(4, bool)), draws=50)
    assert nothing["macro_auc"] is None and json.loads(json.dumps(nothing)) == nothing


def test_linear_protocol_writes_records_once(phantoms: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(
        phantoms, untrained=True, image_size=32, fractions=(0.1, 1.0), seeds=(0, 1), draws=50, out=tmp_path / "out",
        json=tmp_path / "figures.json",
    )  # fmt: skip
    evaluate_command(config)
    figures = json.loads((tmp_path / "figures.json").read_text())
    full = [run for run in figures["runs"] if run["fraction"] == 1.0]
    assert len(figures["runs"]) == 4 and len(full) == 2
    assert full[0]["macro_auc"] != full[1]["macro_auc"]  # two untrained networks
    assert figures["macro_auc"] == pytest.approx(np.mean([run["macro_auc"] for run in full]))
    assert set(figures["raw"]["per_class"]) <= set(PHANTOM_CLASSES) and figures["arm"] == "sup1"
    for name, value in figures["raw"]["per_class"].items():
        low, high = figures["raw"]["intervals"][name]
        assert low <= value <= high and low < high
    few = next(run for run in figures["runs"] if run["fraction"] == 0.1)
    listed = (tmp_path / "out" / "subsets" / "fraction-0.1-seed0.txt").read_text().split()
    assert few["train_images"] == len(listed) == 6
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.json")}
    assert len(evaluate(config, QUIET)) == 4
    assert before == {path: path.stat().st_mtime_ns for path in before}
    evaluate(dataclasses.replace(config, draws=60), QUIET)  # another question: answered anew
    assert all(path.stat().st_mtime_ns > time for path, time in before.items())


def test_the_source_alone_is_a_row_of_the_report(phantoms: Path, tmp_path: Path) -> None:
    index = read_index(phantoms)
    assert source_record(index, "set", tmp_path, draws=20) is None
    known = dataclasses.replace(index, sources=np.array(["ab"[int(name[7]) % 2] for name in index.names]))
    record = source_record(known, "set", tmp_path, draws=20)
    assert record is not None and record["within_source"]["macro"]["value"] == 0.5 != record["macro_auc"]
    assert source_record(known, "set", tmp_path, draws=20) == record
    assert f"| source alone, no pixels | {100 * record['macro_auc']:.1f} (1) | 50.0 (1) |" in markdown(
        build([record])[1]
    )


def test_a_start_is_one_of_three(phantoms: Path, tmp_path: Path) -> None:
    for wrong in (StartConfig(phantoms), StartConfig(phantoms, run=tmp_path, untrained=True)):
        with pytest.raises(SystemExit, match="give one of --run FOLDER, --untrained and --imagenet"):
            resolve(wrong)
    with pytest.raises(SystemExit, match=r"is no run folder: it holds no config\.json"):
        resolve(StartConfig(phantoms, run=tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"method": "vicreg", "image_size": 48, "val_fraction": 0.2}))
    with pytest.raises(SystemExit, match="has the run finished"):
        resolve(StartConfig(phantoms, run=tmp_path))
    torch.save(load_backbone(None, 7).state_dict(), tmp_path / "backbone.pth")
    start = resolve(StartConfig(phantoms, run=tmp_path))
    assert (start.arm, start.image_size, start.val_fraction) == ("vicreg", 48, 0.2)
    assert torch.equal(start.backbone(0).conv1.weight, load_backbone(None, 7).conv1.weight)


def test_what_is_wrong_with_the_data_is_one_line(phantoms: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"Data_Entry_2017_v2020\.csv is missing"):
        cli(["evaluate", "--data", str(tmp_path), "--untrained"])
    data = tmp_path / "data"
    shutil.copytree(phantoms, data)
    index = read_index(data)
    options = ["--data", str(data), "--untrained", "--image-size", "32", "--out", str(tmp_path / "out")]
    mask = next(path for path in sorted((data / "masks" / "Effusion").iterdir()))
    for victim, command in ((mask, ["segment", "--label", "Effusion"]), (index.split("test").paths[0], ["evaluate"])):
        victim.write_bytes(victim.read_bytes()[:60])
        with pytest.raises(SystemExit, match=f"^cannot read image {victim}"):
            cli([*command, *options])
    (data / "test_list.txt").write_text("")
    with pytest.warns(UserWarning, match="no split"), pytest.raises(SystemExit, match="no image in split 'test'"):
        cli(["heatmap", *options])


def test_weights_from_elsewhere(tmp_path: Path) -> None:
    path, theirs = tmp_path / "x.pth", resnet18(weights=None)
    torch.save(theirs.state_dict(), path)  # with its classifier
    assert torch.equal(load_backbone(path).conv1.weight, theirs.conv1.weight)
    frozen = Backbone()
    set_norm(frozen, "frozen")
    torch.save(frozen.state_dict(), path)
    thawed = load_backbone(path).train()  # fine-tuned as any other network
    thawed(torch.randn(2, 3, 32, 32))
    assert not torch.equal(thawed.bn1.running_mean, frozen.bn1.running_mean)
    torch.save({"state_dict": theirs.state_dict()}, path)
    with pytest.raises(SystemExit, match=r"x\.pth holds no ResNet18 weights under torchvision's names \(.*conv1"):
        load_backbone(path)
    path.write_text("no weights at all")
    with pytest.raises(SystemExit, match=r"x\.pth holds no ResNet18 weights"):
        load_backbone(path)


# --- fine-tuning ---------------------------------------------------------------------------------------------


def test_fine_tuning_learns_chooses_on_validation_and_goes_on_where_it_was(phantoms: Path, tmp_path: Path) -> None:
    index = read_index(phantoms)
    train, val, test = (index.split(name) for name in ("train", "val", "test"))
    config = TrainConfig(lr=2e-3, epochs=1, batch_size=16, min_steps=6, max_steps=6, checks=3)
    model, fitted = finetune(load_backbone(None), train, val, 32, config, seed=1)
    assert fitted.steps == 6 and fitted.best_step in (2, 4, 6)
    assert not torch.equal(model.backbone.conv1.weight, load_backbone(None).conv1.weight)  # not only the head
    again, _ = finetune(load_backbone(None), train, val, 32, config, seed=1)
    assert np.array_equal(predict(model, test, 32), predict(again, test, 32))


def test_the_loop_resumes_to_the_same_weights(tmp_path: Path) -> None:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    y = (x @ torch.tensor([[1.0], [2.0], [-1.0]])) + 0.1
    config = TrainConfig(lr=0.05, batch_size=8, epochs=8, min_steps=1, checks=8)

    def train(stop_at: int | None, checkpoint: Path | None) -> tuple[torch.Tensor, int]:
        torch.manual_seed(0)
        model, calls = torch.nn.Linear(3, 1), 0

        def loss_of(inputs: torch.Tensor, targets: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise KeyboardInterrupt
            noise = 0.01 * torch.randn(inputs.shape, generator=generator)
            return (model(inputs + noise) - targets).square().mean()

        def load(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
            return x[rows], y[rows]

        def score_of() -> float:
            return -float((model(x) - y).square().mean())

        fitted = fit(model, 40, load, loss_of, score_of, config, 3, checkpoint, {"a": 1}, every=0.0)
        assert fitted.steps == 40
        return model.weight.detach().clone(), calls

    whole, steps = train(None, None)
    path = tmp_path / "resume.ckpt"
    with pytest.raises(KeyboardInterrupt):
        train(23, path)
    assert path.exists()
    rest, fewer = train(None, path)
    assert torch.equal(whole, rest) and steps == 40 and fewer == 20 and not path.exists()


def test_jitter_moves_an_outline_with_its_image() -> None:
    x = torch.zeros(16, 2, 32, 32)
    x[:, :, 8:20, 4:14] = 1.0
    moved = jitter(x, torch.Generator().manual_seed(0))
    assert torch.equal(moved[:, 0], moved[:, 1])
    centre = (moved[:, 0].sum(1) @ torch.arange(32.0)) / moved[:, 0].sum((1, 2))
    assert (centre < 12).any() and (centre > 20).any()  # some are mirrored
    assert 0.8 < moved[:, 0].sum((1, 2)).mean() / 120 < 1.2


# --- the report ----------------------------------------------------------------------------------------------


def test_every_stage_ends_in_the_report_and_is_not_repeated(phantoms: Path, tmp_path: Path) -> None:
    config = XrayConfig(
        phantoms, tmp_path / "out", dataset="phantoms", results=tmp_path / "kept", epochs=1,
        batch_size=16, image_size=32, fractions=(0.1, 1.0), seeds=(), large_seeds=(0,), finetune=SHORT,
        heatmap_fractions=(0.1,), label="Effusion", segment_fractions=(1.0,), segment_seeds=(0,), unet=SHORT, draws=20,
    )  # fmt: skip
    path = xray(config, QUIET)
    records = json.loads((tmp_path / "kept" / "records.json").read_text())
    kinds = [(r["stage"], r["arm"], r.get("protocol"), r["fraction"]) for r in records]
    assert len(kinds) == len(set(kinds)) == 2 * (2 + 2 + 1 + 1)  # both arms: linear, finetune, segment, heatmap
    text = path.read_text()
    for picture in ("table1.png", "table2.png", "fig2-phantoms-0.1.png", "fig3.png"):
        with Image.open(tmp_path / "kept" / picture) as image:
            assert image.size[0] > 300 and np.ptp(np.asarray(image.convert("L"))) > 200
        assert f"({picture})" in text
    tuned = {r["arm"]: r for r in records if r.get("protocol") == "finetune" and r["fraction"] == 1.0}
    ours = 100 * tuned["optiml"]["macro_auc"]
    assert f"| {ours:.1f} (1) |" in text and "| Sup.1 (random) | 61.0 |  | 71.1 |" in text
    assert f"{ours:.5g}" in (path.parent / "table1.csv").read_text()
    assert tuned["optiml"]["pretraining"]["method"] == "optiml" and tuned["sup1"]["pretraining"] == {}
    maps = next(r for r in records if r["stage"] == "heatmap")
    assert maps["scored_findings"] <= maps["boxed_findings"] and 0 < maps["chance"]["pointing"] < 1

    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if "downstream" in p.parts and p.is_file()}
    assert xray(config, QUIET).read_text() == text
    run = tmp_path / "out" / "optiml-32px-1epochs-seed0"  # which knows its size
    assert xray(dataclasses.replace(config, run=(run,), image_size=None), QUIET).read_text() == text
    assert before == {p: p.stat().st_mtime_ns for p in before}

    with pytest.raises(SystemExit, match="are the same run of the same arm"):
        report([*records, records[0]], tmp_path / "twice", QUIET)
    with pytest.raises(SystemExit, match=r"is missing: run evaluate --protocol finetune --fractions 0\.5 first"):
        heatmap(HeatmapConfig(phantoms, untrained=True, image_size=32, fraction=0.5, out=tmp_path), QUIET)


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
        with pytest.raises(SystemExit, match=f"^--run: .*{message}"):
            xray(XrayConfig(phantoms, tmp_path / "out", run=(first, other)), QUIET)
    assert not (tmp_path / "out").exists()


def test_every_row_of_xray_has_the_runs_validation_patients(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[StartConfig] = []
    for stage in ("evaluate", "segment", "heatmap"):
        monkeypatch.setattr(f"examples.optiml.xray.{stage}", lambda config, console: asked.append(config) or [])
    xray(XrayConfig(phantoms, tmp_path / "out", run=(finished_run(tmp_path / "run"),)), QUIET)
    assert {type(config) for config in asked} == {EvaluateConfig, SegmentConfig, HeatmapConfig}
    assert sum(config.untrained for config in asked) == len(asked) / 2
    splits = [resolve(config).index().splits.tolist() for config in asked]
    assert all(split == read_index(phantoms, 0.3, 5).splits.tolist() for split in splits)


def made(arm: str, dataset: str, fraction: float, seed: int, auc: float | None, protocol: str = "finetune") -> dict:
    return {
        "stage": "evaluate", "arm": arm, "dataset": dataset, "protocol": protocol, "fraction": fraction, "seed": seed,
        "raw": {"macro": {"value": auc, "low": auc and auc - 0.1, "high": auc and auc + 0.1}}, "images": 9,
        "identity": {"image_size": 64}, "pretraining": {}, "train_images": 5, "file": f"{arm}{fraction}{seed}.json",
        "made": {"commit": "0" * 40, "time": "2026-11-23"},
    }  # fmt: skip


def test_the_report_leaves_blank_what_was_not_run() -> None:
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
