"""Losses and gradients that stop a run, before they do harm."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_trainings import train

from ratplus_exp.training.divergence import LossDiverged
from ratplus_exp.training.loop import Trainer
from ratplus_exp.training.settings import Schedule


class Diverging(Trainer):
    """Multiplies the loss of one step."""

    at, factor = 6, math.nan

    def __init__(self, *settings, **more):
        super().__init__(*settings, **more)
        self.objective.register_forward_hook(self._change)

    def _change(self, objective, inputs, output):
        loss, correct = output
        return (loss * self.factor if self.step == self.at else loss), correct


def test_a_diverged_loss_names_the_checkpoint_and_leaves_it_good(make_model, tmp_path):
    model = make_model(dtype=torch.float32)
    with pytest.raises(LossDiverged, match="the loss is nan at step 6") as error:
        train(model, tmp_path, trainer=Diverging)
    assert str(tmp_path / "checkpoint-4.pt") in str(error.value)
    saved = torch.load(tmp_path / "checkpoint-4.pt", weights_only=True)
    assert saved["step"] == 4
    assert all(w.isfinite().all() for w in saved["model"].values())


def test_a_loss_that_jumps_stops_the_run(make_model, tmp_path):
    """After 20 steps to compare with; at 3 times the mean of the recent ones."""

    class Jumping(Diverging):
        at, factor = 10, 5

    schedule = Schedule([(24 * 48, 12)], 48)
    how = {"lr": 0.0, "memory_lr": 0.0, "spike": 3.0, "trainer": Jumping}
    run, _ = train(make_model(), tmp_path / "early", schedule, **how)
    assert run.step == 24
    Jumping.at = 22
    with pytest.raises(LossDiverged, match=r"the loss rose to .* at step 22, from") as error:
        train(make_model(), tmp_path / "late", schedule, **how)
    newest, older = (str(tmp_path / "late" / f"checkpoint-{step}.pt") for step in (20, 16))
    assert f"{newest} (delete it to resume from {older})" in str(error.value)
    with pytest.raises(LossDiverged, match="the loss rose to .* at step 22"):  # which it remembers
        train(make_model(), tmp_path / "late", schedule, **how)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(make_model, tmp_path):
    model = make_model()
    weight = model.lm_head.weight
    weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(LossDiverged, match="the gradient's norm is .* there is no checkpoint yet"):
        train(model, tmp_path)
    assert all(p.isfinite().all() for p in model.parameters())
