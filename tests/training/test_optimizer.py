"""Learning rates, weight decay, and which parameters they are for."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_trainings import (
    ONE_STEP,
    SCHEDULE,
    Killed,
    batch,
    memory_parameters,
    settings,
    train,
)

from ratplus_exp.training.loop import Trainer
from ratplus_exp.training.settings import Schedule


def test_memory_moves_at_its_own_rate(make_model, tmp_path):
    """Adam's first step moves a weight by its learning rate, whatever the gradient's size."""
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, tmp_path, ONE_STEP, warmup=0.0, weight_decay=0.0, lr=1e-3, memory_lr=5e-3)
    for name, p in model.named_parameters():
        rate = 5e-3 if ".memory." in name else 1e-3
        assert float((p.detach() - before[name]).abs().max()) == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize("frozen", ["memory_lr", "lr"])
def test_a_rate_of_zero_freezes_its_parameters_only(make_model, tmp_path, frozen):
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, tmp_path, **{frozen: 0.0})
    for name, p in model.named_parameters():
        still = (".memory." in name) == (frozen == "memory_lr")
        assert torch.equal(p, before[name]) == still


@pytest.mark.parametrize("what", ["matrices", "all"])
def test_weight_decay_is_for_the_matrices_outside_the_memory_or_for_all(make_model, tmp_path, what):
    model = make_model()
    trainer = Trainer(model, batch, SCHEDULE, settings(weight_decay=0.25, decay=what), tmp_path)
    groups = trainer.optimizer.param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    memory = {id(p) for p in memory_parameters(model)}
    assert len(memory) == 4
    for p in model.parameters():
        decays = what == "all" or (p.ndim >= 2 and id(p) not in memory)
        assert decay[id(p)] == (0.25 if decays else 0.0)


def test_learning_rates_warm_up_and_follow_a_cosine(make_model, tmp_path):
    class Rates(Trainer):
        seen = []

        def _train_step(self, micro_batches):
            self.seen.append({group["lr"] for group in self.optimizer.param_groups})
            return super()._train_step(micro_batches)

    schedule = Schedule([(20 * 12, 12)], 12)
    rates = {"lr": 1e-3, "memory_lr": 2e-3, "warmup": 0.2, "min_lr_ratio": 0.1}
    _, rows = train(make_model(), tmp_path, schedule, trainer=Rates, **rates)
    warmup = [0.25, 0.5, 0.75, 1.0]
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * i / 16)) / 2 for i in range(16)]
    wanted = warmup + cosine
    assert cosine[0] == 1 and cosine[8] == pytest.approx(0.55)  # the peak, and halfway down
    assert [row["lr"] for row in rows] == pytest.approx([1e-3 * x for x in wanted])
    for seen, x in zip(Rates.seen, wanted, strict=True):
        assert sorted(seen) == pytest.approx([1e-3 * x, 2e-3 * x])


def test_a_resumed_training_takes_the_rates_it_is_given(make_model, tmp_path):
    """What LossDiverged advises, lower rates, must reach the optimizer of the checkpoint."""
    with pytest.raises(KeyboardInterrupt):
        train(make_model(), tmp_path, trainer=Killed)
    saved = torch.load(tmp_path / "checkpoint-4.pt", weights_only=True)["model"]
    run, _ = train(make_model(), tmp_path, lr=0.0, memory_lr=0.0)
    assert all(torch.equal(w, saved[name]) for name, w in run.model.state_dict().items())
