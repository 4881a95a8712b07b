"""The supervised loop that fine-tuning and segmentation share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightly", reason="the example needs otloss[examples]")

from examples.optiml.data.index import read_index
from examples.optiml.downstream.finetune import finetune, predict
from examples.optiml.downstream.settings import TrainConfig
from examples.optiml.downstream.training import fit, jitter
from examples.optiml.pretraining.network import load_backbone


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
    assert torch.equal(whole, rest) and steps == 40 and fewer == 20
    trained, none = train(None, path)  # what the training was for could not be written
    assert torch.equal(whole, trained) and none == 0


def test_jitter_moves_an_outline_with_its_image() -> None:
    x = torch.zeros(16, 2, 32, 32)
    x[:, :, 8:20, 4:14] = 1.0
    moved = jitter(x, torch.Generator().manual_seed(0))
    assert torch.equal(moved[:, 0], moved[:, 1])
    centre = (moved[:, 0].sum(1) @ torch.arange(32.0)) / moved[:, 0].sum((1, 2))
    assert (centre < 12).any() and (centre > 20).any()  # some are mirrored
    assert 0.8 < moved[:, 0].sum((1, 2)).mean() / 120 < 1.2
