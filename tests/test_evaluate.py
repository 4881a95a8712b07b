"""Evaluation: label fractions, seeds, scores, records, and where a task starts from."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("segmentation_models_pytorch", reason="the example needs otloss[examples]")
pytest.importorskip("captum", reason="the example needs otloss[examples]")

from torchvision.models import resnet18
from xray_runs import QUIET, SHORT

from examples.optiml.__main__ import cli
from examples.optiml.data.index import ChestIndex, read_index
from examples.optiml.data.phantom import PHANTOM_CLASSES
from examples.optiml.data.subsets import label_fraction, write_ids
from examples.optiml.downstream.evaluate import Evaluation, evaluate, source_record
from examples.optiml.downstream.evaluate import main as evaluate_command
from examples.optiml.downstream.scores import Scored, summarise
from examples.optiml.downstream.settings import EvaluateConfig, HeatmapConfig, StartConfig
from examples.optiml.downstream.starting_weights import default_out, resolve
from examples.optiml.downstream.training import fit
from examples.optiml.errors import CommandError
from examples.optiml.pretraining.network import Backbone, load_backbone, set_norm
from examples.optiml.provenance import provenance
from examples.optiml.reporting.report import build
from examples.optiml.reporting.tables import markdown


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


# --- scores and records --------------------------------------------------------------------------------------


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


def test_a_trained_network_outlives_what_goes_wrong_after(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EvaluateConfig(
        phantoms, untrained=True, image_size=32, protocol="finetune", fractions=(0.1,), seeds=(0,), train=SHORT,
        draws=20, out=tmp_path / "out",
    )  # fmt: skip

    def damaged(*_: object) -> None:
        raise SystemExit("cannot read image")

    always = functools.partial(fit, every=0.0)  # as if it had taken long
    monkeypatch.setattr("examples.optiml.downstream.finetune.fit", always)
    with monkeypatch.context() as patch:
        patch.setattr("examples.optiml.downstream.evaluate.predict", damaged)
        with pytest.raises(SystemExit, match="cannot read image"):
            evaluate(config, QUIET)
    resume = tmp_path / "out" / "finetune-0.1-seed0.ckpt"
    assert resume.exists()
    with monkeypatch.context() as patch:
        patch.setattr("torch.optim.AdamW.step", damaged)  # which nothing calls again
        (record,) = evaluate(config, QUIET)
    assert record["steps"] == SHORT.max_steps and not resume.exists()


def test_a_kept_network_is_of_the_record_beside_it(phantoms: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(
        phantoms, untrained=True, image_size=32, protocol="finetune", fractions=(0.1,), seeds=(0,), train=SHORT,
        keep=(0.1,), draws=20, out=tmp_path / "out",
    )  # fmt: skip
    network = tmp_path / "out" / "finetune-0.1-seed0.pth"
    evaluate(config, QUIET)
    first = network.read_bytes()
    other = dataclasses.replace(config, train=dataclasses.replace(SHORT, lr=1e-2))
    evaluate(dataclasses.replace(other, keep=()), QUIET)
    assert not network.exists()
    evaluate(other, QUIET)
    assert network.read_bytes() != first


def test_a_record_is_written_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    made = provenance()["made"]
    assert made["commit"] is None and made["uncommitted_changes"] is False and made["processor"]


@pytest.mark.parametrize("protocol", ["linear", "finetune"])
def test_labels_without_a_class_leave_a_record_without_a_figure(phantoms: Path, tmp_path: Path, protocol: Any) -> None:
    """A few films may all be healthy, as they are at 1 % of a small set with one finding."""
    data = tmp_path / "data"
    shutil.copytree(phantoms, data)
    healthy = set((data / "train_val_list.txt").read_text().split())
    rows = [line.split(",", 2) for line in (data / "Data_Entry_2017_v2020.csv").read_text().splitlines()]
    rows = [[name, "No Finding" if name in healthy else found, rest] for name, found, rest in rows]
    (data / "Data_Entry_2017_v2020.csv").write_text("\n".join(map(",".join, rows)) + "\n")
    config = EvaluateConfig(
        data, untrained=True, image_size=32, protocol=protocol, fractions=(0.1,), seeds=(0,), train=SHORT, draws=20,
        out=tmp_path / "out", json=tmp_path / "figures.json",
    )  # fmt: skip
    evaluate_command(config)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["macro_auc"] is None and figures["runs"][0]["macro_auc"] is None
    assert figures["runs"][0]["train_images"] == 6
    assert "| Sup.1 (random) |  |" in "".join(map(markdown, build(figures["runs"])))


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
        with pytest.raises(CommandError, match="give one of --run FOLDER, --untrained and --imagenet"):
            resolve(wrong)
    with pytest.raises(CommandError, match=r"is no run folder: it holds no config\.json"):
        resolve(StartConfig(phantoms, run=tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"method": "vicreg", "image_size": 48, "val_fraction": 0.2}))
    with pytest.raises(CommandError, match="has the run finished"):
        resolve(StartConfig(phantoms, run=tmp_path))
    torch.save(load_backbone(None, 7).state_dict(), tmp_path / "backbone.pth")
    start = resolve(StartConfig(phantoms, run=tmp_path))
    assert (start.arm, start.image_size, start.val_fraction) == ("vicreg", 48, 0.2)
    assert torch.equal(start.backbone(0).conv1.weight, load_backbone(None, 7).conv1.weight)
    assert resolve(StartConfig(phantoms, run=tmp_path / "backbone.pth")) == start  # the same run
    outs = {default_out(run, start) for run in (tmp_path, tmp_path / "backbone.pth")}
    assert outs == {tmp_path / "evaluate" / start.dataset}
    (tmp_path / "config.json").write_text(json.dumps({"method": "vicreg", "val_fraction": 0.0}))  # held nobody out
    assert {"train", "val", "test"} == set(resolve(StartConfig(phantoms, run=tmp_path)).index().splits)


def test_files_of_one_name_do_not_share_a_folder(phantoms: Path, tmp_path: Path) -> None:
    folders = set()
    for seed in (0, 1):
        path = tmp_path / str(seed) / "weights.pth"
        path.parent.mkdir()
        torch.save(load_backbone(None, seed).state_dict(), path)
        folders.add(default_out(path, resolve(StartConfig(phantoms, run=path))))
    assert len(folders) == 2 and all(folder.name.startswith("weights-") for folder in folders)


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
    path.write_text("no weights at all")
    with pytest.raises(CommandError, match=r"x\.pth holds no ResNet18 weights"):
        load_backbone(path)


def test_networks_are_kept_where_heatmaps_can_use_them(phantoms: Path, tmp_path: Path) -> None:
    """45 MB for each seed, and heatmaps need boxes."""
    boxless = tmp_path / "boxless"
    boxless.mkdir()
    for entry in phantoms.iterdir():
        if not entry.name.startswith("BBox"):
            (boxless / entry.name).symlink_to(entry)
    for data, kept in ((phantoms, (0.01,)), (boxless, ())):
        config = EvaluateConfig(data, untrained=True, protocol="finetune", out=tmp_path / "out")
        assert Evaluation(config, QUIET).kept_fractions == kept
    named = EvaluateConfig(boxless, untrained=True, protocol="finetune", keep=(0.1,), out=tmp_path / "out")
    assert Evaluation(named, QUIET).kept_fractions == (0.1,)
