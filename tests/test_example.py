"""The OPTiML example: phantoms, the loader, the metrics, and a training run that survives interruption."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("pytorch_lightning", reason="the example needs otloss[examples]")
pytest.importorskip("tyro", reason="the example needs otloss[examples]")

from PIL import Image
from torchmetrics.functional.classification import multilabel_auroc
from torchvision.models import resnet18

from examples.optiml.augment import EpochSampler, seeded
from examples.optiml.callbacks import read_log
from examples.optiml.config import ExpanderConfig, MethodOptions, PretrainConfig
from examples.optiml.data import NIH_CLASSES, ImageStore, read_index
from examples.optiml.evaluate import probe_scores, score_metadata
from examples.optiml.layout import PhantomConfig, write_phantoms
from examples.optiml.metrics import class_aucs, macro, patient_draws
from examples.optiml.phantom import PHANTOM_CLASSES, draw
from examples.optiml.pretrain import pretrain
from examples.optiml.probe import fit_probe
from examples.optiml.study import StudyConfig
from examples.optiml.study import main as study
from examples.optiml.study_table import BEGIN, END, write_report

# --- phantoms ------------------------------------------------------------------------------------------------


def test_a_phantom_depends_on_its_three_numbers_alone() -> None:
    first = draw(3, 5, 1, 48)
    draw(9, 9, 0, 48)
    np.random.default_rng(0).random()
    again = draw(3, 5, 1, 48)
    assert np.array_equal(first.image, again.image) and first.labels == again.labels
    for other in (draw(4, 5, 1, 48), draw(3, 6, 1, 48), draw(3, 5, 0, 48)):
        assert not np.array_equal(first.image, other.image)


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


# --- the official layout -------------------------------------------------------------------------------------


def miniature(root: Path) -> Path:
    """Six films of four patients with what real copies of the data set do: CRLF, RGBA, nested folders."""
    rows = [
        ("00000001_000.png", "Cardiomegaly", 1), ("00000001_001.png", "Cardiomegaly|Emphysema", 1),
        ("00000002_000.png", "No Finding", 2), ("00000003_000.png", "Hernia", 3),
        ("00000004_000.png", "Mass|Nodule", 4), ("00000005_000.png", "Mass", 5),
    ]  # fmt: skip
    header = (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    )
    lines = [header] + [f"{name},{found},0,{patient},57,M,PA,2682,2749,0.143,0.143" for name, found, patient in rows]
    root.mkdir(parents=True)
    (root / "Data_Entry_2017_v2020.csv").write_bytes("\r\n".join(lines).encode())
    (root / "BBox_List_2017.csv").write_bytes(
        b"Image Index,Finding Label,Bbox [x,y,w,h],,,\r\n00000004_000.png,Infiltrate,256,512,128.0,64,,,\r\n"
    )
    (root / "train_val_list.txt").write_bytes("\r\n".join(name for name, _, p in rows if p < 4).encode())
    (root / "test_list.txt").write_bytes("\r\n".join(name for name, _, p in rows if p >= 4).encode())
    for number, (name, _, patient) in enumerate(rows[:5]):  # the sixth was not downloaded
        folder = root / ("images_001/images" if number < 3 else "images_002/images")
        folder.mkdir(parents=True, exist_ok=True)
        mode = "RGBA" if number == 0 else "L"
        colour = (10 * patient,) * 3 + (255,) if mode == "RGBA" else 10 * patient
        Image.new(mode, (40, 40), colour).save(folder / name)
    return root


def test_the_loader_reads_nih_as_users_have_it(tmp_path: Path) -> None:
    root = miniature(tmp_path / "nih")
    with pytest.warns(UserWarning, match="1 of 6 entries"):
        index = read_index(root, val_fraction=0.0)
    assert list(index.names) == [f"0000000{p}_00{v}.png" for p, v in ((1, 0), (1, 1), (2, 0), (3, 0), (4, 0))]
    assert list(index.patients) == ["1", "1", "2", "3", "4"]
    assert list(index.splits) == ["train"] * 4 + ["test"]
    found = [{NIH_CLASSES[c] for c in np.flatnonzero(row)} for row in index.labels]
    assert found == [{"Cardiomegaly"}, {"Cardiomegaly", "Emphysema"}, set(), {"Hernia"}, {"Mass", "Nodule"}]
    box = index.boxes["00000004_000.png"][0]
    assert (box.label, box.x, box.y, box.width, box.height) == ("Infiltration", 0.25, 0.5, 0.125, 0.0625)
    for limit in (0, 100):  # read each time, and kept in memory
        images = ImageStore(index.paths, size=16, limit_mb=limit)
        assert images[0].mode == "L" and images[0].size == (16, 16)
        assert [int(np.asarray(images[i]).max()) for i in range(5)] == [10, 10, 20, 30, 40]


def test_the_loader_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Data_Entry_2017_v2020\.csv is missing"):
        read_index(tmp_path)
    root = miniature(tmp_path / "nih")
    (root / "test_list.txt").write_text("00000001_001.png\n00000004_000.png\n")
    (root / "train_val_list.txt").write_text("00000001_000.png\n00000002_000.png\n")
    with pytest.warns(UserWarning, match="no split"), pytest.raises(ValueError, match="patients have images on both"):
        read_index(root)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(PhantomConfig(tmp_path_factory.mktemp("data") / "phantoms", train=60, test=40, size=48))


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


# --- metrics -------------------------------------------------------------------------------------------------


def test_macro_auc_leaves_absent_classes_out() -> None:
    labels = np.array([[0, 0, 1], [0, 0, 1], [1, 0, 1], [1, 0, 1]], dtype=np.uint8)
    scores = np.array([[0.1, 0.5, 0.3], [0.6, 0.1, 0.3], [0.6, 0.2, 0.1], [0.9, 0.3, 0.0]])
    aucs = class_aucs(scores, labels)
    # By hand: pairs (.6,.1) (.6,.6 tie) (.9,.1) (.9,.6) = 1 + .5 + 1 + 1 of 4. The others have no pair.
    assert aucs[0, 0] == 3.5 / 4 and np.isnan(aucs[0, 1:]).all()
    assert macro(aucs)[0] == 3.5 / 4
    assert np.isnan(macro(aucs, np.array([False, True, True])))[0]


def test_auc_equals_torchmetrics_where_that_is_defined() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.random((300, 5)).round(2), (rng.random((300, 5)) < 0.3).astype(np.uint8)
    peer = multilabel_auroc(torch.tensor(scores), torch.tensor(labels.astype(np.int64)), 5, average=None)
    assert np.allclose(class_aucs(scores, labels)[0], peer.numpy(), atol=1e-6)


def test_within_source_auc_is_blind_to_the_source() -> None:
    """A score that knows only the source is near-perfect on confounded data, and worth nothing within a source."""
    source = np.array(["a"] * 50 + ["b"] * 50 + ["c"] * 10)
    labels = np.array([1] * 45 + [0] * 5 + [0] * 45 + [1] * 5 + [1] * 10, dtype=np.uint8)[:, None]
    by_source = (source != "b").astype(float)[:, None]
    assert class_aucs(by_source, labels)[0, 0] > 0.85
    assert class_aucs(by_source, labels, source)[0, 0] == 0.5
    # Pairs weigh, not sources: a has 225 pairs all wrong, b as many all right; c has none.
    half = np.where(source == "a", 1.0 - labels[:, 0], labels[:, 0] * 1.0)[:, None]
    assert class_aucs(half, labels, source)[0, 0] == 0.5
    fewer = np.r_[0:20, 45:50, 50:110]  # a: 20 x 5 pairs wrong, b: 225 right
    assert class_aucs(half[fewer], labels[fewer], source[fewer])[0, 0] == 225 / 325


def test_bootstrap_draws_patients_and_weights_mean_copies() -> None:
    rng = np.random.default_rng(1)
    patients = np.repeat(np.arange(20), rng.integers(1, 5, 20))
    labels = (rng.random((len(patients), 2)) < 0.4).astype(np.uint8)
    scores = rng.random((len(patients), 2)).round(1)
    weights = patient_draws(patients, draws=5, seed=3)
    assert np.array_equal(weights, patient_draws(patients, draws=5, seed=3))
    for patient in range(20):
        assert (weights[:, patients == patient] == weights[:, patients == patient][:, :1]).all()
    for row in range(5):
        copies = np.repeat(np.arange(len(patients)), weights[row].astype(int))
        assert len(np.unique(patients)) == sum(weights[row, patients == p][0] for p in range(20))
        expected = class_aucs(scores[copies], labels[copies])[0]
        assert np.allclose(class_aucs(scores, labels, weights=weights)[row], expected, atol=1e-12)


def test_the_probe_finds_a_linear_rule_and_shrinks_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 20, generator=generator)
    x[:, 7] = 3.0  # a feature that never varies
    y = torch.stack([x[:, 0] + x[:, 1] > 0, torch.rand(600, generator=generator) < 0.3], 1)
    probe = fit_probe(x[:300], y[:300], x[300:400], y[300:400])
    aucs = class_aucs(probe.scores(x[400:]).numpy(), y[400:].numpy().astype(np.uint8))[0]
    assert aucs[0] > 0.97 and 0.3 < aucs[1] < 0.7
    assert torch.isfinite(probe.weight).all() and probe.weight[7].abs().max() == 0


# --- training ------------------------------------------------------------------------------------------------


def tiny(data: Path, out: Path, method: str = "vicreg", **changes: object) -> PretrainConfig:
    settings: dict[str, object] = {
        "epochs": 2, "batch_size": 16, "image_size": 40, "expander": ExpanderConfig(dim=32), "accelerator": "cpu",
    }  # fmt: skip
    return PretrainConfig(data, out, method, **{**settings, **changes})  # type: ignore[arg-type]


def test_order_and_views_follow_seed_epoch_and_image() -> None:
    sampler = EpochSampler(50, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert {row for _, row in first} == set(range(50)) and [r for _, r in first] != [r for _, r in second]
    assert {epoch for epoch, _ in second} == {1}
    state = torch.get_rng_state()
    with seeded(1, 2, 3):
        a = torch.rand(3), np.random.rand(3)  # noqa: NPY002
    with seeded(1, 2, 3):
        b = torch.rand(3), np.random.rand(3)  # noqa: NPY002
    assert torch.equal(a[0], b[0]) and np.array_equal(a[1], b[1])
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("method", ["vicreg", "optiml"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(phantoms: Path, tmp_path: Path, method: str) -> None:
    whole = pretrain(tiny(phantoms, tmp_path / "whole", method))
    torch.rand(7)  # the state of the global generator must not matter
    assert pretrain(tiny(phantoms, tmp_path / "parts", method, stop_after=1)) is None
    assert not (tmp_path / "parts" / "backbone.pth").exists()
    parts = pretrain(tiny(phantoms, tmp_path / "parts", method, workers=1))
    assert whole is not None and parts is not None
    a, b = torch.load(whole, weights_only=True), torch.load(parts, weights_only=True)
    assert all(torch.equal(a[name], b[name]) for name in a)

    logs = [read_log(tmp_path / run / "metrics.csv") for run in ("whole", "parts")]
    assert [row["epoch"] for row in logs[0]] == [row["epoch"] for row in logs[1]] == [1, 1, 1, 2, 2, 2]
    assert [row["loss"] for row in logs[0]] == [row["loss"] for row in logs[1]]
    if method == "optiml":
        for row in logs[0]:
            assert row["perplexity"] >= 0.25 * 512
            assert row["transport_cost"] < row["independent_cost"]
            assert row["grad_cvsim"] > 0 and row["grad_backbone"] > 0

    network = resnet18(weights=None)
    result = network.load_state_dict(a, strict=False)
    assert result.missing_keys == ["fc.weight", "fc.bias"] and not result.unexpected_keys
    torch.manual_seed(0)
    untouched = resnet18(weights=None).conv1.weight
    assert not torch.allclose(network.conv1.weight, untouched, atol=1e-4)  # it has been trained


def test_a_run_folder_of_another_config_is_refused(phantoms: Path, tmp_path: Path) -> None:
    pretrain(tiny(phantoms, tmp_path / "run", epochs=1))
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["method"] == "vicreg" and saved["options"] == {"invariance": 25.0, "variance": 25.0, "covariance": 1.0}
    assert saved["optim"]["lr"] is not None  # presets are written out
    with pytest.raises(SystemExit, match=r"holds a different run \(epochs: 1 there, 3 now\)"):
        pretrain(tiny(phantoms, tmp_path / "run", epochs=3))
    assert pretrain(tiny(phantoms, tmp_path / "run", epochs=1, workers=2)) == tmp_path / "run" / "backbone.pth"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(SystemExit, match=r"is not empty and holds no config\.json"):
        pretrain(tiny(phantoms, tmp_path / "other"))


def test_a_loss_that_is_no_number_stops_with_a_reason(phantoms: Path, tmp_path: Path) -> None:
    options = MethodOptions()
    options = dataclasses.replace(options, vicreg=dataclasses.replace(options.vicreg, covariance=float("inf")))
    with pytest.raises(SystemExit, match=r"the loss is (nan|inf) in epoch 1, step 1 \(.*invariance"):
        pretrain(tiny(phantoms, tmp_path / "run", options=options))


def test_a_study_fills_its_table_and_repeats_nothing(phantoms: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(phantoms, data)
    index = read_index(data)
    rows = [
        f"images/{name},{'ab'[int(patient) % 2]}" for name, patient in zip(index.names, index.patients, strict=True)
    ]
    (data / "labels.csv").write_text("\n".join(["image,source", *rows]) + "\n")
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n")
    config = StudyConfig(
        data, tmp_path / "runs", tmp_path / "results", readme, seeds=(0,), marginals=(), epochs=1, batch_size=16,
        image_size=32, draws=50,
    )  # fmt: skip
    study(config)
    result = json.loads((tmp_path / "results" / "vicreg-seed0.json").read_text())
    plain = json.loads((tmp_path / "results" / "untrained-seed0.json").read_text())
    gap = json.loads((tmp_path / "results" / "differences.json").read_text())["rows"]
    assert [(row["arm"], row["minus"]) for row in gap] == [("vicreg", "untrained")]
    for kind in ("raw", "within_source"):
        macro_auc = result[kind]["macro"]
        assert macro_auc["low"] <= macro_auc["value"] <= macro_auc["high"]
        assert gap[0][kind]["value"] == pytest.approx(macro_auc["value"] - plain[kind]["macro"]["value"], abs=1e-12)
    assert result["made"]["torch"] == torch.__version__ and "loss" in result["training"]["last_epoch"]
    text = readme.read_text()
    assert f"{result['within_source']['macro']['value']:.3f}" in text and "source alone" in text
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "results").glob("*-seed0.json")}
    study(config)
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "results").glob("*-seed0.json")}
    assert readme.read_text() == text


def test_the_report_is_written_between_its_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_report(tmp_path, readme)
    text = readme.read_text()
    assert "old" not in text and "No results yet" in text and text.startswith("before") and text.endswith("after\n")


# --- real films ----------------------------------------------------------------------------------------------

REAL = Path(os.environ.get("OTLOSS_DATA", Path(__file__).parents[2] / "shared" / "data")) / "cxr-dev"


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no {REAL}; set OTLOSS_DATA to the folder that holds cxr-dev")
def test_real_films_load_and_are_confounded_by_source() -> None:
    index = read_index(REAL)
    assert len(index) == 2476 and (index.splits == "test").sum() == 521
    assert 1600 < (index.splits == "train").sum() < 1760
    positives = index.split("test").labels.sum(axis=0)
    assert dict(zip(NIH_CLASSES, positives.tolist(), strict=True))["Pneumonia"] == 156
    assert index.sources is not None and len(np.unique(index.sources)) >= 5
    image = np.asarray(ImageStore(index.paths[:3], 64)[0])
    assert image.shape == (64, 64) and image.std() > 20

    metadata = score_metadata(index)
    assert metadata is not None
    assert metadata.macro(within=False)[0] > 0.55  # knows the source, has seen no pixel
    assert metadata.per_class(within=False)["Pneumonia"] > 0.95
    assert metadata.macro(within=True)[0] == 0.5


def test_a_probe_without_positives_is_masked(phantoms: Path) -> None:
    index = read_index(phantoms, val_fraction=0.3)
    generator = torch.Generator().manual_seed(0)
    x = {name: torch.randn(len(index.split(name)), 4, generator=generator) for name in ("train", "val", "test")}
    scored = probe_scores(index, x)
    assert sorted(np.array(NIH_CLASSES)[scored.usable]) == list(PHANTOM_CLASSES)
    assert set(scored.per_class(within=False)) <= set(PHANTOM_CLASSES)
