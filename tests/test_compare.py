"""The comparison of methods: what is kept of it, going on from that alone, and paired differences."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock
from urllib.error import URLError

import numpy as np
import pytest
import torch

from examples.optiml.reporting.comparison_page import missing_rows_text, pretraining_table

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("segmentation_models_pytorch", reason="the example needs otloss[examples]")
pytest.importorskip("captum", reason="the example needs otloss[examples]")

from rich.console import Console
from torchvision.models import resnet18

from examples.optiml.commands.compare import compare
from examples.optiml.commands.settings import CompareConfig
from examples.optiml.commands.sizes import SizeFlags
from examples.optiml.data.index import read_index
from examples.optiml.data.nih_writer import PhantomConfig, write_phantoms
from examples.optiml.downstream.arms import ABLATION, arm_of
from examples.optiml.downstream.finetune import usable_classes
from examples.optiml.downstream.scores import Scored
from examples.optiml.errors import CommandError, DiskError
from examples.optiml.metrics import comparable_patients
from examples.optiml.pretraining.log import read_log
from examples.optiml.pretraining.methods import METHODS
from examples.optiml.pretraining.precision import fast_precision
from examples.optiml.pretraining.settings import PretrainConfig
from examples.optiml.pretraining.trainer import pretrain
from examples.optiml.reporting.comparison_page import (
    precisions,
    seeds_of,
    uncommitted,
    without_scores,
)
from examples.optiml.reporting.comparison_rows import rows
from examples.optiml.reporting.differences import (
    Difference,
    auc_measures,
    beyond_zero,
    difference_table,
    replicated,
    verdicts,
)
from examples.optiml.reporting.row_store import RowStore, curves_of, ranks

QUIET = Console(quiet=True)
TINY = SizeFlags(
    image_size=32, epochs=1, batch_size=16, fractions=(0.1, 1.0), large_seeds=(0,),
    heatmap_fractions=(0.1,), draws=30, finetune_epochs=1, finetune_steps=2, finetune_max_steps=2, unet_epochs=1,
    unet_steps=2, unet_max_steps=2, checks=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_phantoms(PhantomConfig(tmp_path_factory.mktemp("data") / "phantoms", train=60, test=40, size=40))
    lines = [f"{name},{'ab'[int(name[7]) % 2]}" for name in read_index(root).names]
    (root / "labels.csv").write_text("\n".join(["image,source", *lines]) + "\n")
    return root


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> CompareConfig:
    """Three rows under one seed, from nothing to the report."""
    folder = tmp_path_factory.mktemp("compare")
    config = CompareConfig(
        data, folder / "out", folder / "results", "nih-phantoms", segment_data=data, label="Effusion",
        only=("sup1", "vicreg", "optiml"), seeds=(0,), size_flags=TINY,
    )  # fmt: skip
    compare(config, QUIET)
    return config


def kept(config: CompareConfig, name: str) -> dict[str, Any]:
    return dict(json.loads((config.results / "runs" / f"{name}-seed0.json").read_text())["records"])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_comparison_is_kept_in_small_files(done: CompareConfig) -> None:
    files = contents(done.results)
    for name in ("sup1", "vicreg", "optiml"):
        assert {key.partition("/")[2] for key in kept(done, name)} == {
            "linear-0.1-seed0", "linear-1-seed0", "finetune-0.1-seed0", "finetune-1-seed0", "heatmap-0.1-seed0",
            "segment-Effusion-1-seed0",
        }  # fmt: skip
        assert len(files[f"runs/{name}-seed0.npz"]) < 30_000
        arrays = np.load(done.results / "runs" / f"{name}-seed0.npz")
        assert "nih-phantoms/linear-0.1-seed0/ranks" in arrays  # of every share, as there are few test films
    saved = json.loads(files["runs/vicreg-seed0.json"])["pretraining"]
    assert (saved["precision"], saved["epochs"]) == (fast_precision(), 1)
    (epoch,) = csv.DictReader(files["runs/vicreg-seed0.csv"].decode().splitlines())
    assert float(epoch["std_q"]) > 0 and float(epoch["effective_rank"]) > 1 and 0 < float(epoch["knn_auc_within"]) < 1
    (before,) = csv.DictReader(files["runs/sup1-seed0.csv"].decode().splitlines())
    assert before["epoch"] == "0" and float(before["effective_rank"]) > 1 and "loss" not in before
    assert {f"methods/{n}.png" for n in ("curves", "differences", "fig2-nih-phantoms-0.1", "fig3")} <= files.keys()
    assert not any(name.endswith((".pth", ".ckpt", "records.json")) for name in files)
    text = files["methods/report.md"].decode()
    for row in ("− Sup.1 (random)", "− VICReg", "| VICReg | ", "| OPTiML | "):
        assert row in text
    assert "VinBig" not in text and "(curves.png)" in text and "methods/paper-tables.md" in files

    cells = list(csv.DictReader(files["methods/differences.csv"].decode().splitlines()))
    assert len(cells) == 2 * 7
    firm = [cell["column"] for cell in cells if "firm classes" in cell["column"]]
    assert len(firm) == 2 * 2 and all(int(re.findall(r"\((\d+)\)", name)[0]) < 14 for name in firm)
    key, dice = "nih-phantoms/linear-1-seed0", "nih-phantoms/segment-Effusion-1-seed0"
    tuned = "nih-phantoms/finetune-1-seed0"
    both = [
        [
            *(x for k in (key, tuned) for x in (r[k]["within_source"]["macro"]["value"], r[k]["macro_auc"])),
            r[dice]["positives"]["value"],
        ]
        for r in (kept(done, "optiml"), kept(done, "vicreg"))
    ]
    found = [float(c["value"]) for c in cells if c["row"] == "− VICReg" and c["column"] not in firm]
    assert found == pytest.approx(np.subtract(both[0], both[1]), abs=2e-4)  # Dice is kept in half precision


def test_what_is_kept_is_not_made_again(done: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrained: list[str] = []

    def counted(run: PretrainConfig, console: Console) -> Path | None:
        pretrained.append(run.method)
        return pretrain(run, console)

    monkeypatch.setattr("examples.optiml.commands.comparison.pretrain", counted)
    config = dataclasses.replace(done, results=tmp_path / "results", out=tmp_path / "out")
    shutil.copytree(done.results, config.results)
    before = contents(config.results)
    compare(config, QUIET)  # on a machine that has nothing but the results
    compare(dataclasses.replace(config, report_only=True), QUIET)
    for precision in ("32-true", "bf16-mixed"):  # machines that compute in one and the other
        compare(dataclasses.replace(config, size_flags=dataclasses.replace(TINY, precision=precision)), QUIET)
    assert not pretrained and contents(config.results) == before
    fewer = dataclasses.replace(TINY, fractions=(1.0,), heatmap_fractions=())
    smaller = dataclasses.replace(config, size_flags=fewer, report_only=True, segment_data=None)
    assert ", Effusion" not in compare(smaller, QUIET).read_text()
    runs = {name: x for name, x in before.items() if name.startswith("runs/")}
    assert contents(config.results).items() >= runs.items()  # what is not asked for stays
    compare(dataclasses.replace(config, rows="ablation", only=(), report_only=True), QUIET)
    assert "− Sup.1 (random)" in (config.results / "ablation" / "report.md").read_text()  # what both share

    longer = dataclasses.replace(TINY, finetune_max_steps=3, finetune_steps=3)
    changed = dataclasses.replace(config, size_flags=longer, only=("vicreg",))
    old = kept(config, "vicreg")
    shutil.rmtree(config.out)
    text = compare(changed, QUIET).read_text()
    assert pretrained == ["vicreg"] and "mixes" not in text and text.count("epochs of vicreg") == 1
    again = {key for key, record in kept(config, "vicreg").items() if record != old[key]}
    assert again == {key for key in old if "finetune" in key or "heatmap" in key}
    assert "runs/optiml-seed0.json" in contents(config.results)  # which is not of these sizes, so:
    cells = csv.DictReader((config.results / "methods" / "differences.csv").read_text().splitlines())
    assert not any(cell["value"] for cell in cells)


def test_records_of_another_pretraining_make_room(tmp_path: Path) -> None:
    def record(start: str, stem: str) -> dict[str, Any]:
        path = tmp_path / "work" / "set" / "row-seed0" / f"{stem}.json"
        facts = {"stage": "evaluate", "dataset": "set", "protocol": "linear", "fraction": 0.01, "file": str(path)}
        return {**facts, "identity": {"start": start, "image_size": 32}, "pretraining": {"of": start}}

    files = RowStore(tmp_path, "row-seed0")
    for stem in ("linear-0.01-seed0", "linear-0.01-seed1"):
        files.add(record("a", stem))
    files.spend(5.0)
    assert files.arrays_of([record("a", "linear-0.01-seed0")]) == {}
    files = RowStore(tmp_path, "row-seed0")  # known again, although it has no arrays
    assert len(files.records) == 2 and files.seconds == 5.0
    files.add(record("b", "linear-0.01-seed1"))
    files = RowStore(tmp_path, "row-seed0")
    assert files.records.keys() == {"set/linear-0.01-seed1"} and files.pretraining == {"of": "b"}
    assert files.seconds == 0.0


def test_curves_have_what_was_measured_where_it_was(tmp_path: Path) -> None:
    steps = [f"{epoch},{2 * epoch + i},{epoch + i}" for epoch in (1, 2, 3) for i in (0, 1)]
    (tmp_path / "log.csv").write_text("\n".join(["epoch,step,loss", *steps]) + "\n")
    (tmp_path / "monitor.csv").write_text("epoch,step,knn_auc,std,loss\n2,5,0.7,1.5,9\n3,7,0.8,1.5,9\n")
    files = RowStore(tmp_path, "row-seed0")
    files.keep_curves(curves_of(tmp_path / "log.csv", tmp_path / "monitor.csv"))
    assert files.curves == [
        {"epoch": 1, "step": 2.5, "loss": 1.5},
        {"epoch": 2, "step": 4.5, "loss": 2.5, "knn_auc": 0.7},
        {"epoch": 3, "step": 6.5, "loss": 3.5, "knn_auc": 0.8},
    ]
    text = pretraining_table(
        {"A": [files.curves, files.curves], "B": [[{"loss": 0.25}]], "C": [[{"loss": 0.5}], files.curves]}
    )
    table = "| | seeds | loss | kNN AUC |\n| --- | ---: | ---: | ---: |\n| A | 2 | 3.5 | 0.8 |\n| B | 1 | 0.25 |  |\n"
    assert table + "| C | 2 | 2 | 0.8 (1) |\n" in text


def test_the_page_says_what_was_pretrained_in_which_precision(tmp_path: Path) -> None:
    def row(name: str, precision: str | None) -> RowStore:
        files = RowStore(tmp_path, name)
        files.pretraining = {"precision": precision} if precision else {"seed": 0}
        return files

    half, single = "bf16-mixed", "32-true"
    rows_of = {"sup1": {0: row("sup1-seed0", None)}, "a": {0: row("a-seed0", half), 1: row("a-seed1", single)}}
    assert precisions({"sup1": rows_of["sup1"]}) == ""
    assert precisions(rows_of | {"b": {0: row("b-seed0", half)}}) == " Pretrained in bf16-mixed, in 32-true a-seed1."
    assert seeds_of(rows_of) == " Seeds 0: sup1; 0, 1: a." and seeds_of({"a": rows_of["a"]}) == ""


def test_the_page_says_what_is_not_in_it_and_what_was_not_committed(tmp_path: Path) -> None:
    there = {name: {0: RowStore(tmp_path, f"{name}-seed0")} for name in ("sup1", "simclr", "moco", "byol", "optiml")}
    left = "densecl, simsiam, vicreg, pcrlv2, optiml-printed"
    assert (
        missing_rows_text("methods", there) == f" Not in this report: sup2 (its weights have to be downloaded), {left}."
    )
    made = [("a-seed0", False), ("b-seed1", True), ("b-seed1", False), ("a-seed1", True)]
    records = [{"file": f"work/set/{name}/x.json", "made": {"uncommitted_changes": dirty}} for name, dirty in made]
    assert uncommitted(records) == " With uncommitted changes: a-seed1, b-seed1."
    assert uncommitted(records[:1]) == ""


def test_the_page_says_which_figures_are_not_in_the_paired_differences(done: CompareConfig, tmp_path: Path) -> None:
    shutil.copytree(done.results / "runs", tmp_path / "runs")
    files = {name: RowStore(tmp_path / "runs", f"{name}-seed0") for name in ("sup1", "vicreg", "optiml")}
    there = {name: {0: x} for name, x in files.items()}
    assert without_scores(there) == ""
    for name, stem in (("sup1", "finetune"), ("sup1", "linear"), ("optiml", "finetune")):
        del files[name].arrays[f"nih-phantoms/{stem}-1-seed0/ranks"]
    said = "as test scores were not kept: finetune: sup1-seed0, optiml-seed0; linear: sup1-seed0."
    assert without_scores(there) == f" Not in the paired differences, {said}"


def test_this_machine_computes_in_its_own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for known in ("avx512_bf16", "amx_bf16", "avx2"):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda known=known: {known: True}, raising=False)
        assert fast_precision() == ("32-true" if known == "avx2" else "bf16-mixed")


def test_ranks_of_many_films() -> None:
    scores = np.random.default_rng(0).permutation(70_000)[:, None]
    assert np.array_equal(ranks(scores / 7), scores)


def test_a_lone_row_is_reported(done: CompareConfig, tmp_path: Path) -> None:
    """Nothing is there that it could be compared with."""
    config = dataclasses.replace(done, results=tmp_path / "results", out=tmp_path / "out", report_only=True)
    for path in (done.results / "runs").glob("optiml-*"):
        (config.results / "runs").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, config.results / "runs")
    text = compare(config, QUIET).read_text()
    assert "| OPTiML | " in text and "minus each row" not in text and "differences.png" not in text


def test_a_command_for_one_seed_reports_them_all(done: CompareConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(
        done, results=tmp_path / "results", out=tmp_path / "out", only=("sup1",), seeds=(2,),
    )  # fmt: skip
    shutil.copytree(done.results, config.results)
    compare(config, QUIET)
    runs = {path.stem for path in (config.results / "runs").glob("*.json")}
    assert runs == {"sup1-seed0", "vicreg-seed0", "optiml-seed0", "sup1-seed2"}
    text = (config.results / "methods" / "report.md").read_text()
    assert "--seeds 0 2 " in text and "− VICReg" in text and "Not in this report: sup2" in text
    pictures = [path for path in re.findall(r"\]\((.*?)\)", text) if path.endswith(".png")]
    assert "table2.png" in pictures and all((config.results / "methods" / path).exists() for path in pictures)
    cells = csv.DictReader((config.results / "methods" / "table2.csv").read_text().splitlines())
    assert {c["seeds"] for c in cells if c["row"].startswith("Sup.1") and c["seeds"]} == {"2"}


def test_what_is_kept_can_be_committed() -> None:
    root = Path(__file__).parents[1]
    path = CompareConfig(Path()).results / "runs" / "optiml-seed0.json"
    if not (root / ".git").exists():
        pytest.skip("no git repository")
    assert subprocess.run(["git", "check-ignore", "--quiet", path], cwd=root).returncode != 0


def test_an_interruption_loses_nothing(done: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(done, results=tmp_path / "results", out=tmp_path / "out", only=("sup1",))

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("examples.optiml.commands.xray.segment", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(config, QUIET)
    early = kept(config, "sup1")
    assert len(early) == 5
    shutil.rmtree(config.out)
    compare(config, QUIET)
    late = kept(config, "sup1")
    assert len(late) == 6 and all(late[key] == record for key, record in early.items())
    assert (config.results / "methods" / "fig2-nih-phantoms-0.1.png").exists()


def test_no_row_is_tried_after_one_that_the_disk_has_no_room_for(
    done: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def full(run: PretrainConfig, console: Console) -> None:
        tried.append(run.method)
        raise DiskError("Stopped: no space left")

    monkeypatch.setattr("examples.optiml.commands.comparison.pretrain", full)
    config = dataclasses.replace(done, results=tmp_path / "results", out=tmp_path / "out", only=("vicreg", "optiml"))
    with pytest.raises(CommandError, match=r"^Stopped: no space left$"):
        compare(config, QUIET)
    assert len(tried) == 1


def test_the_time_before_an_interruption_counts(
    done: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(
        done, results=tmp_path / "results", out=tmp_path / "out", only=("vicreg",), segment_data=None,
        size_flags=dataclasses.replace(TINY, epochs=2, fractions=(0.1,), heatmap_fractions=()),
    )  # fmt: skip

    def stopped(run: PretrainConfig, console: Console) -> Path | None:
        return pretrain(dataclasses.replace(run, stop_after=1), console)

    with monkeypatch.context() as patch:
        patch.setattr("examples.optiml.commands.comparison.pretrain", stopped)
        with pytest.raises(CommandError, match="nothing to report"):
            compare(config, QUIET)
    (log,) = (tmp_path / "out").glob("vicreg-seed0-*/metrics.csv")
    before = sum(row["seconds"] for row in read_log(log))
    clock = iter(range(0, 10**6, 100))
    monkeypatch.setattr("examples.optiml.commands.comparison.time", MagicMock(monotonic=lambda: next(clock)))
    compare(config, QUIET)
    files = RowStore(config.results / "runs", "vicreg-seed0")
    assert len(files.records) == 2 and before > 0 and files.seconds == pytest.approx(100 + before, abs=0.06)


@pytest.mark.parametrize("change", [{"image_size": 24}, {"stem": "no-pool"}])
def test_the_untrained_networks_curve_follows_another_start(
    done: CompareConfig, tmp_path: Path, change: dict[str, Any]
) -> None:
    shutil.copytree(done.results, tmp_path / "results")
    config = dataclasses.replace(
        done, results=tmp_path / "results", out=tmp_path / "out", only=("sup1",),
        size_flags=dataclasses.replace(TINY, **change), segment_data=None,
    )  # fmt: skip
    curve = config.results / "runs" / "sup1-seed0.csv"
    before = curve.read_text()
    compare(config, QUIET)
    assert curve.read_text() != before
    assert {record["identity"].get("stem") for record in kept(config, "sup1").values()} == {change.get("stem")}


def test_imagenet_weights_from_a_file_have_their_row(
    done: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    torch.save(resnet18(weights=None).state_dict(), tmp_path / "w.pth")
    shutil.copytree(done.results, tmp_path / "results")
    config = dataclasses.replace(
        done, results=tmp_path / "results", out=tmp_path / "out", only=("sup2",), imagenet_weights=tmp_path / "w.pth"
    )
    text = compare(config, QUIET).read_text()
    assert "− Sup.2 (ImageNet)" in text and f"--imagenet-weights {tmp_path / 'w.pth'}" in text
    digest = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    assert {r["identity"]["start"] for r in kept(config, "sup2").values()} == {f"imagenet, sha256 {digest}"}
    assert "− Sup.2" not in compare(dataclasses.replace(config, imagenet_weights=None), QUIET).read_text()
    small = dataclasses.replace(config, size_flags=dataclasses.replace(TINY, stem="small"))
    console = Console(record=True, file=io.StringIO(), width=200)
    with pytest.raises(CommandError, match="nothing to report"):
        compare(small, console)
    assert "sup2-seed0 is left out: sup2, --stem small: ImageNet's first convolution is 7 x 7" in console.export_text()
    with pytest.raises(CommandError, match=r"--imagenet-weights .*gone: there is no such file"):
        compare(dataclasses.replace(config, imagenet_weights=tmp_path / "gone"), QUIET)


def test_imagenet_is_left_blank_without_its_weights(
    done: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    shutil.copytree(done.results, tmp_path / "results")
    console = Console(record=True, quiet=False, file=(tmp_path / "log").open("w"), width=200)
    config = dataclasses.replace(done, results=tmp_path / "results", out=tmp_path / "out", only=("sup2",))
    text = compare(config, console).read_text()
    assert "sup2-seed0 is left out: cannot download ImageNet weights (<urlopen error no route to host>)" in (
        console.export_text()
    )
    assert "− Sup.2" not in text and "− VICReg" in text


def test_paired_differences_find_the_better_row_and_nothing_in_a_row_itself(data: Path) -> None:
    index, rng = read_index(data), np.random.default_rng(0)
    test = index.split("test")
    good = test.labels + 0.6 * rng.standard_normal(test.labels.shape)
    bad = test.labels + 3.0 * rng.standard_normal(test.labels.shape)
    arrays = [{seed: {"set/linear-1-seed0/ranks": ranks(x)} for seed in (0, 1)} for x in (good, bad, good)]
    nothing = {seed: np.full(3, np.nan) for seed in (0, 1)}
    assert Difference.between(nothing, nothing) is None
    found = replicated(auc_measures(index, "set", 200), dict(zip(("good", "bad", "same"), arrays, strict=True)))
    columns = [measure.column for measure in found]  # not fine-tuned
    assert columns == [f"frozen AUC, {x}" for x in ("within source", "within source, firm classes (1)", "raw")]
    table = difference_table("good", found)
    assert beyond_zero(table).startswith("Of the 6 intervals of good minus each row, 2 leave out 0. ")
    (section,) = table.sections
    (bad_within, _, bad_raw), same = ([c.ours for c in row.cells] for row in section.rows)
    for cell in same:
        assert cell is not None and cell.value == cell.low == cell.high == cell.deviation == 0 and cell.seeds == 2
    scored = [Scored(test, x, usable_classes(index.split("train"))) for x in (good, bad)]
    for cell, within in ((bad_within, True), (bad_raw, False)):
        assert cell is not None and cell.low > 0
        assert cell.value == pytest.approx(float(np.subtract(*(s.macro(within)[0] for s in scored))), abs=1e-12)
    lines = verdicts("bad", found)
    assert "| good | **above +" in lines and "| same | **above +" in lines
    assert "| bad | **below -" in verdicts("good", found)


def test_a_difference_is_in_bold_only_where_the_seeds_agree() -> None:
    nothing = dict.fromkeys((0, 1), np.zeros(100))
    above, mixed = ({0: np.full(100, first), 1: np.full(100, 0.3)} for first in (0.1, -0.1))
    gaps = [Difference.between(row, nothing) for row in (above, mixed)]
    assert [gap.verdict if gap else None for gap in gaps] == [
        "**above +0.200 ± 0.141 [+0.200, +0.200] (2)**", "+0.100 ± 0.283 [+0.100, +0.100] (2)",
    ]  # fmt: skip


def test_classes_of_few_patients_are_left_out_of_the_firm_average() -> None:
    index = MagicMock(labels=np.array([[1, 0], [0, 1]] * 12 + [[1, 1]], np.uint8), sources=np.array(["a"] * 24 + ["b"]))
    index.patients = np.array([*map(str, range(3)), *["one of many films"] * 9, *map(str, range(12, 25))])
    index.split.return_value, index.__len__.return_value = index, 25
    assert comparable_patients(index.labels, index.sources, index.patients).tolist() == [9, 8]
    assert len(auc_measures(index, "set", 10)) == 2 * 2  # no class is firm
    index.sources[-1] = "a"
    assert comparable_patients(index.labels, index.sources, index.patients).tolist() == [10, 9]
    firm = auc_measures(index, "set", 10)[1]
    assert firm.column == "frozen AUC, within source, firm classes (1)"
    assert firm.of(index.labels * np.array([1, -1]))[0] == 1


def test_rows_are_named_as_in_the_paper_and_differ() -> None:
    assert {row.method for row in rows("methods")} == {None, *METHODS}
    arms = {row.arm: row.apply(PretrainConfig(Path(), Path(), row.method or "optiml")) for row in rows("ablation")[1:]}
    assert list(arms)[: len(ABLATION)] == list(ABLATION)
    assert all(arm_of(arms[name].identity()) == name for name in ABLATION)
    alone = arms["optiml-neither"].options.optiml
    assert (alone.beta, alone.eta, alone.invariance, alone.marginals) == (0.0, 0.0, 0.0, "uniform")
    identities = [str(run.identity()) for run in arms.values()]
    assert len(set(identities)) == len(arms) == len(rows("ablation")) - 1
    factors = "invariance dense stage match tokens marginals gradient objective eps alpha last-act"
    for factor in factors.split():
        assert any(name.startswith(f"optiml-{factor}-") for name in arms)
    with pytest.raises(ValueError, match=r"only must be among sup1, .*, not byol2"):
        CompareConfig(Path(), only=("byol2",))
    with pytest.raises(ValueError, match=r"^seeds must be one or more different"):
        CompareConfig(Path(), seeds=(0, 0))
    with pytest.raises(ValueError, match=r"^fractions must be .* not 2$"):
        CompareConfig(Path(), size_flags=SizeFlags(fractions=(2.0,)))


def test_two_data_sets_of_one_name_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="--data and --rsna-data have the same name 'phantoms'; give --dataset"):
        compare(CompareConfig(data, tmp_path / "out", tmp_path / "results", rsna_data=data), QUIET)
