"""What scores features: AUCs and their intervals, the linear probe, neighbours, the rank of a spectrum."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightly", reason="the example needs otloss[examples]")
pytest.importorskip("pytorch_lightning", reason="the example needs otloss[examples]")
pytest.importorskip("tyro", reason="the example needs otloss[examples]")

from torchmetrics.functional.classification import multilabel_auroc

from examples.optiml.data.index import NIH_CLASSES, read_index
from examples.optiml.data.phantom import PHANTOM_CLASSES
from examples.optiml.downstream.evaluate import probe_scores
from examples.optiml.downstream.probe import fit_probe
from examples.optiml.metrics import class_aucs, macro, patient_draws, student_quantile
from examples.optiml.pretraining.monitor import effective_rank, knn_scores


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


@pytest.mark.parametrize(
    ("share", "freedom", "expected"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 4, 2.77645), (0.8, 2, 1.06066), (0.975, 1e9, 1.95996)],
)
def test_students_quantiles_are_those_of_tables(share: float, freedom: float, expected: float) -> None:
    assert student_quantile(share, freedom) == pytest.approx(expected, rel=1e-4)
    assert student_quantile(1 - share, freedom) == pytest.approx(-expected, rel=1e-4)
    assert student_quantile(0.5, freedom) == 0


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


def test_a_probe_without_positives_is_masked(phantoms: Path) -> None:
    index = read_index(phantoms, val_fraction=0.3)
    generator = torch.Generator().manual_seed(0)
    x = {name: torch.randn(len(index.split(name)), 4, generator=generator) for name in ("train", "val", "test")}
    scored = probe_scores(index, x)
    assert sorted(np.array(NIH_CLASSES)[scored.usable]) == list(PHANTOM_CLASSES)
    assert set(scored.per_class(within=False)) <= set(PHANTOM_CLASSES)


def test_knn_equals_a_loop_over_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(n, 5, generator=generator) for n in (30, 7))
    labels = (torch.rand(30, 3, generator=generator) < 0.4).to(torch.uint8)
    scores = knn_scores(bank, labels, queries, neighbours=4, temperature=0.1)
    for q in range(7):
        cosines = [
            float(queries[q].double() @ row.double() / (queries[q].double().norm() * row.double().norm()))
            for row in bank
        ]
        nearest = sorted(range(30), key=lambda i: -cosines[i])[:4]
        weights = {i: np.exp(cosines[i] / 0.1) for i in nearest}
        for c in range(3):
            expected = sum(weights[i] * int(labels[i, c]) for i in nearest) / sum(weights.values())
            assert float(scores[q, c]) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert knn_scores(bank[:2], labels[:2], queries, 20, 0.1).shape == (7, 3)  # fewer images than neighbours


def test_effective_rank_counts_the_dimensions_in_use() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 8, generator=generator)
    assert effective_rank(x) == pytest.approx(8, rel=0.01)
    x[:, 3:] = 7.0
    assert effective_rank(x) == pytest.approx(3, rel=0.01)
    assert effective_rank(torch.ones(5, 4)) == 1.0
