"""The overview of a file of rows: differences for other seeds and other patients, and the table that a page quotes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("pytorch_lightning", reason="the example needs otloss[examples]")

from PIL import Image

from examples.optiml.data.index import ChestIndex, read_index
from examples.optiml.data.nih_writer import PhantomConfig, write_phantoms
from examples.optiml.data.subsets import label_fraction
from examples.optiml.downstream.finetune import usable_classes
from examples.optiml.downstream.scores import Scored
from examples.optiml.reporting.figures import draw_effects
from examples.optiml.reporting.overview import BEGIN, END, Effect, OverviewRow, holm, overview
from examples.optiml.reporting.row_store import ranks

FRACTIONS = (0.5, 1.0)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ChestIndex:
    folder = tmp_path_factory.mktemp("data") / "phantoms"
    return read_index(write_phantoms(PhantomConfig(folder, train=60, test=40, size=40)))


def arrays(index: ChestIndex, noise: float, seeds: tuple[int, ...] = (0, 1, 2)) -> dict[int, dict[str, np.ndarray]]:
    """Ranks of scores that are the labels under noise, as the store of a row holds them."""
    labels, rng = index.split("test").labels, np.random.default_rng(0)
    names = ["linear-1-seed0", "linear-0.5-seed0", "linear-0.5-seed1", "neighbours-1-seed0"]
    return {
        seed: {f"set/{name}/ranks": ranks(labels + noise * rng.standard_normal(labels.shape)) for name in names}
        for seed in seeds
    }


def row(index: ChestIndex, arm: str, noise: float, seeds: tuple[int, ...] = (0, 1, 2)) -> OverviewRow:
    first = {"epoch": 1, "seconds": 0.5, "converged": 0.5}
    epochs = [first, {"epoch": 2, "seconds": 0.7, "converged": 1.0, "effective_rank": 20.0}]
    return OverviewRow(arm, arm, arrays(index, noise, seeds), [epochs for _ in seeds])


def table(text: str) -> dict[str, dict[str, str]]:
    """The cells by row and column."""
    head, _, *lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    names = [cell.strip() for cell in head]
    return {line[0].strip(): dict(zip(names[1:], map(str.strip, line[1:]), strict=True)) for line in lines}


def test_an_interval_is_for_other_seeds_and_other_patients() -> None:
    """By hand: three seeds differ by 0, 1 and 2 on the films as they are, and patients move all of them alike."""
    moves = np.array([0.0, -1.0, 1.0, -1.0, 1.0])  # the films as they are, then four resamples
    a = {seed: 5.0 + seed + moves for seed in (0, 1, 2, 7)}
    b = {seed: np.full(5, 5.0) for seed in (0, 1, 2, 8)}
    gap = Effect.between(a, b)
    assert gap is not None and (gap.value, gap.seeds) == (1.0, 3)
    assert gap.error == pytest.approx((1 / 3 + 1) ** 0.5)
    assert gap.freedom == pytest.approx(2 * 4**2)  # the seeds are a quarter of the variance
    low, high = gap.interval
    assert (1 - low, high - 1) == pytest.approx([2.0369 * gap.error] * 2, rel=1e-3)  # t at 32 degrees of freedom
    assert gap.detectable == pytest.approx((2.0369 + 0.8530) * gap.error, rel=1e-3) and not gap.beyond
    few = Effect.between({seed: 5.0 + 0.1 * seed + 0 * moves for seed in (1, 2)}, b)
    assert few is not None and few.freedom == pytest.approx(1) and not few.beyond  # 12.7 standard errors


def test_one_seed_has_no_interval_and_rows_without_a_common_one_no_difference() -> None:
    one = Effect.between({3: np.array([2.0, 1.0])}, {3: np.array([1.0, 1.0])})
    assert one is not None and one.text() == "+1.0" and not one.beyond and np.isnan(one.detectable)
    assert Effect.between({0: np.zeros(3)}, {1: np.zeros(3)}) is None


def test_the_correction_for_many_intervals() -> None:
    """Student's t at 10 degrees of freedom leaves 5 % beyond 2.2281 and 1 % beyond 3.1693 (any table has them)."""
    at = [Effect(t, 3, 1.0, 10.0) for t in (2.2281, -3.1693)]
    assert [gap.probability for gap in at] == pytest.approx([0.05, 0.01], rel=1e-3)
    # Three intervals: the least probability must be below 0.05/3, the next below 0.05/2, the last below 0.05.
    strong, middle, weak = (Effect(t, 3, 1.0, 10.0) for t in (3.2, 2.7, 2.1))
    assert [gap.beyond for gap in (strong, middle, weak)] == [True, True, False]
    assert holm([weak, middle, strong]) == [strong, middle]
    assert holm([Effect(2.4, 3, 1.0, 10.0), weak, weak]) == []  # beyond by itself, not among three
    assert holm([Effect(9.0, 1)]) == []  # one seed
    assert holm([Effect(0.0, 3, 0.0, np.inf), Effect(1.0, 3, 0.0, np.inf)]) == [Effect(1.0, 3, 0.0, np.inf)]


def test_equal_rows_differ_by_nothing(index: ChestIndex) -> None:
    cells = table(overview(index, "set", FRACTIONS, 50, [row(index, "a", 0.5), row(index, "b", 0.5)]).text)
    assert cells["b"]["frozen, all"].endswith("(+0.0 [+0.0, +0.0])")


def test_the_table_has_the_figures_of_the_records(index: ChestIndex, tmp_path: Path) -> None:
    rows = [row(index, "first", 1.0), row(index, "better", 0.1), row(index, "sup1", 3.0, (1,))]
    text, effects = overview(index, "set", FRACTIONS, 200, rows)
    assert text.startswith(BEGIN) and text.rstrip().endswith(END)
    cells = table(text)
    assert list(cells) == ["first", "better", "untrained"] and cells["untrained"]["seeds"] == "1"
    assert list(cells["first"]) == ["seeds", "frozen 50 %", "frozen, all", "neighbours", "rank", "converged", "seconds"]
    train, test = index.split("train"), index.split("test")
    for fraction, column, label_seeds in ((0.5, "frozen 50 %", (0, 1)), (1.0, "frozen, all", (0,))):
        levels = {}
        for each in rows:
            of_seeds = [
                np.mean([
                    100 * Scored(test, kept[f"set/linear-{fraction:g}-seed{s}/ranks"].astype(float),
                                 usable_classes(label_fraction(train, fraction, s))).macro(False)[0]
                    for s in label_seeds
                ])
                for kept in each.arrays.values()
            ]  # fmt: skip
            levels[each.title] = np.mean(of_seeds)
        assert cells["first"][column].startswith(f"{levels['first']:.1f} ± ") and "(" not in cells["first"][column]
        gap = cells["better"][column].partition("(")[2].strip("*")
        assert cells["better"][column].startswith(f"{levels['better']:.1f} ± ")
        assert gap.startswith(f"{levels['better'] - levels['first']:+.1f} [")
        assert "[" not in cells["untrained"][column]  # one seed
    assert [cells["first"][name] for name in ("rank", "converged", "seconds")] == ["20.0", "75.0 %", "0.60"]
    gap = effects["frozen, all"]["better"]
    assert gap.text() in cells["better"]["frozen, all"] and list(effects["neighbours"]) == ["better", "untrained"]
    draw_effects(effects, tmp_path / "effects.png")
    with Image.open(tmp_path / "effects.png") as picture:
        assert picture.width > picture.height > 100
    assert "Of the 3 intervals of pretrained rows " in text and "truly 0, 0.15 would" in text


def test_imagenets_weights_are_compared_under_every_seed(index: ChestIndex) -> None:
    """They were scored under one, which the column of seeds says."""
    found = overview(index, "set", FRACTIONS, 50, [row(index, "first", 1.0), row(index, "sup2", 0.1, (1,))])
    gap = found.effects["neighbours"]["sup2"]
    assert table(found.text)["sup2"]["seeds"] == "1" and gap.seeds == 3 and gap.interval[0] > 0


def test_without_a_second_seed_it_says_so(index: ChestIndex) -> None:
    rows = [row(index, name, noise, (0,)) for name, noise in (("first", 1.0), ("better", 0.1))]
    text, _ = overview(index, "set", FRACTIONS, 20, rows)
    assert "there is no interval yet" in text and "±" not in table(text)["better"]["frozen, all"]
