"""The training loop: schedules, learning rates, losses, and going on after a kill."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ratplus_exp.memory import Memory
from ratplus_exp.methods import Dilated, Engine
from ratplus_exp.training import LossDiverged, Schedule, Trainer, TrainSettings

DILATED = Dilated(dilation=4, local=1, initial=1)
SCHEDULE = Schedule([(6 * 48, 12), (4 * 48, 16)], 48)  # 6 steps of 4 × 12 tokens, 4 of 3 × 16


def batch(step, rows, length):
    """Random tokens; about half of the labels are ignored, unevenly over the rows."""
    generator = np.random.default_rng((7, step))
    ids = generator.integers(1, 29, (rows, length + 1))
    ignored = generator.random((rows, length)) < np.linspace(0.1, 0.9, rows)[:, None]
    return ids[:, :-1], np.where(ignored, -100, ids[:, 1:])


def settings(**changed):
    defaults = {"lr": 3e-3, "memory_lr": 1e-2, "log_every": 1, "checkpoint_every": 4}
    return TrainSettings(**defaults | changed)


def train(model, folder, schedule=SCHEDULE, data=batch, sparse=None, trainer=Trainer, **changed):
    """The trainer after its run, and the rows it logged."""
    rows = []
    run = trainer(model, data, schedule, settings(**changed), folder, sparse, log=rows.append)
    run.run()
    return run, rows


def memory_parameters(model):
    return [p for m in model.modules() if isinstance(m, Memory) for p in m.parameters()]


def cross_entropy(model, ids, labels, engine=None):
    """Mean over the labelled tokens, by hand."""
    with torch.no_grad():
        logits = model(torch.from_numpy(ids), use_cache=False, engine=engine).logits.double()
    log_p = logits.log_softmax(-1)
    wanted = [(b, t) for b, t in np.argwhere(labels >= 0).tolist()]
    return float(-sum(log_p[b, t, labels[b, t]] for b, t in wanted) / len(wanted))


def test_a_schedule_gives_every_length_its_tokens():
    schedule = Schedule([(100, 8), (64, 16), (5, 64)], 32)
    assert schedule.steps == 4 + 2 + 1  # rounded up
    assert [schedule.length_at(step) for step in range(7)] == [8, 8, 8, 8, 16, 16, 64]
    assert [schedule.rows_at(step) for step in range(7)] == [4, 4, 4, 4, 2, 2, 1]


class Killed(Trainer):
    """Stops, as by Ctrl-C, in the middle of its eighth step."""

    def _train_step(self, micro_batches):
        if self.step == 7:
            raise KeyboardInterrupt
        return super()._train_step(micro_batches)


def killed_data(step, rows, length):
    if step == 7:
        raise KeyboardInterrupt
    return batch(step, rows, length)


@pytest.mark.parametrize("sparse", [None, DILATED], ids=["dense", "joint"])
@pytest.mark.parametrize("log_every", [1, 2])
@pytest.mark.parametrize("where", ["step", "data"])
def test_a_killed_and_resumed_training_is_the_uninterrupted_one(
    make_model, tmp_path, sparse, log_every, where
):
    def start(seed, folder, **how):
        model = make_model(seed, dtype=torch.float32)
        return train(model, folder, sparse=sparse, log_every=log_every, **how)

    whole, _ = start(0, tmp_path / "whole")
    how = {"trainer": Killed} if where == "step" else {"data": killed_data}
    with pytest.raises(KeyboardInterrupt):
        start(0, tmp_path / "killed", **how)
    log = tmp_path / "killed" / "log.jsonl"
    assert json.loads(log.read_text().splitlines()[-1])["step"] > 4  # later than the checkpoint
    with log.open("a") as file:
        file.write('{"loss": 1.')  # what a harder kill leaves
    resumed, rows = start(1, tmp_path / "killed")
    assert rows[0]["step"] == 4 + log_every

    assert whole.step == resumed.step == 10 and whole.tokens == resumed.tokens == 480
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    moments = [run.optimizer.state_dict()["state"] for run in (whole, resumed)]
    for a, b in zip(moments[0].values(), moments[1].values(), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert logged(tmp_path / "whole") == logged(tmp_path / "killed")
    assert len(logged(tmp_path / "whole")) == 10 // log_every


def logged(folder):
    """The log without what a clock says."""
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def test_a_finished_training_is_not_run_again(make_model, tmp_path):
    train(make_model(dtype=torch.float32), tmp_path)
    before = (tmp_path / "log.jsonl").read_bytes()
    run, rows = train(make_model(1, dtype=torch.float32), tmp_path)
    assert run.step == 10 and rows == []
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_checkpoints_between_logged_rows_are_refused():
    with pytest.raises(ValueError, match=r"\(50\) must be a multiple of log_every \(20\)"):
        TrainSettings(log_every=20, checkpoint_every=50)


ONE_STEP = Schedule([(48, 12)], 48)


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


def test_weight_decay_is_for_the_matrices_outside_the_memory(make_model, tmp_path):
    model = make_model()
    trainer = Trainer(model, batch, SCHEDULE, settings(weight_decay=0.25), tmp_path)
    groups = trainer.optimizer.param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    memory = {id(p) for p in memory_parameters(model)}
    assert len(memory) == 4
    for p in model.parameters():
        assert decay[id(p)] == (0.25 if p.ndim >= 2 and id(p) not in memory else 0.0)


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


def test_joint_training_takes_a_sparse_and_a_dense_step_a_batch(make_model, tmp_path):
    ids, labels = batch(0, 4, 12)

    class ByHand(Trainer):
        losses = []

        def _train_step(self, micro_batches):
            self.losses.append(cross_entropy(self.model, ids, labels, Engine(DILATED)))
            return super()._train_step(micro_batches)

        def _optimizer_step(self, micro_batches, engine):
            self.losses.append(cross_entropy(self.model, ids, labels))
            return super()._optimizer_step(micro_batches, engine)

    run, [row] = train(make_model(), tmp_path, ONE_STEP, sparse=DILATED, warmup=0.0, trainer=ByHand)
    sparse, _, dense_after_sparse = ByHand.losses
    assert row["sparse_loss"] == pytest.approx(sparse, abs=1e-4)
    assert row["loss"] == pytest.approx(dense_after_sparse, abs=1e-4)
    assert {int(state["step"]) for state in run.optimizer.state.values()} == {2}

    alone, [dense] = train(make_model(), tmp_path / "alone", ONE_STEP, warmup=0.0)
    assert "sparse_loss" not in dense and dense["loss"] != row["loss"]
    assert {int(state["step"]) for state in alone.optimizer.state.values()} == {1}
    for name in ("step", "tokens", "lr"):
        assert row[name] == dense[name]  # one batch, one step of the schedule


@pytest.mark.parametrize("sparse", [None, DILATED], ids=["dense", "joint"])
@pytest.mark.parametrize("rows_per_pass", [1, 2, 3])
def test_several_passes_change_nothing_but_rounding(make_model, tmp_path, sparse, rows_per_pass):
    """Though they have different numbers of labels, and of 4 rows the second of 3 has one."""
    one, rows = train(make_model(), tmp_path / "1", sparse=sparse)
    many, more = train(make_model(), tmp_path / "n", sparse=sparse, rows_per_pass=rows_per_pass)
    for a, b in zip(one.model.parameters(), many.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    for a, b in zip(rows, more, strict=True):
        for name in ("loss", "accuracy", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-3)


def test_loss_and_accuracy_count_labelled_tokens_only(make_model, tmp_path):
    model, (ids, labels) = make_model(), batch(0, 4, 12)
    with torch.no_grad():
        best = model(torch.from_numpy(ids)).logits.argmax(-1).numpy()
    labels[1, labels[1] >= 0] = best[1, labels[1] >= 0]  # so that something is right
    loss = cross_entropy(model, ids, labels)
    accuracy = (best == labels)[labels >= 0].mean()
    _, [row] = train(model, tmp_path, ONE_STEP, data=lambda *_: (ids, labels))
    assert row["loss"] == pytest.approx(loss, abs=1e-4)
    assert row["accuracy"] == pytest.approx(accuracy, abs=1e-5) and 0 < accuracy < 1


def test_gradients_are_those_of_the_mean_loss_clipped(make_model, tmp_path):
    """Seen in the logged norm, and in Adam's first moment after one step."""
    model, (ids, labels) = make_model(), batch(0, 4, 12)
    logits = model(torch.from_numpy(ids), use_cache=False).logits
    F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(labels).flatten()).backward()
    gradients = [p.grad for p in model.parameters()]
    norm = float(torch.cat([g.flatten() for g in gradients]).norm())
    model.zero_grad()
    run, [row] = train(model, tmp_path, ONE_STEP, clip=0.5)
    assert norm > 0.5
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-3)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        moment = run.optimizer.state[p]["exp_avg"] / (1 - 0.9)
        torch.testing.assert_close(moment, gradient * 0.5 / norm, rtol=1e-3, atol=1e-6)


class Diverging(Trainer):
    def _loss(self, ids, labels, engine):
        loss, hits = super()._loss(ids, labels, engine)
        return (loss * math.nan if self.step == 6 else loss), hits


def test_a_diverged_loss_names_the_checkpoint_and_leaves_it_good(make_model, tmp_path):
    model = make_model(dtype=torch.float32)
    with pytest.raises(LossDiverged, match="the loss is nan at step 6") as error:
        train(model, tmp_path, trainer=Diverging)
    assert str(tmp_path / "checkpoint-4.pt") in str(error.value)
    saved = torch.load(tmp_path / "checkpoint-4.pt", weights_only=True)
    assert saved["step"] == 4
    assert all(w.isfinite().all() for w in saved["model"].values())


def test_a_resumed_training_takes_the_rates_it_is_given(make_model, tmp_path):
    """What LossDiverged advises, lower rates, must reach the optimizer of the checkpoint."""
    with pytest.raises(KeyboardInterrupt):
        train(make_model(), tmp_path, trainer=Killed)
    saved = torch.load(tmp_path / "checkpoint-4.pt", weights_only=True)["model"]
    run, _ = train(make_model(), tmp_path, lr=0.0, memory_lr=0.0)
    assert all(torch.equal(w, saved[name]) for name, w in run.model.state_dict().items())


def test_gates_are_logged_where_there_are_any(make_model, tmp_path):
    """A constant gate of 3/4: its lag m_t = 3/4 (m_{t−1} + 1) tends to 3, a length of 4."""
    model = make_model(gate_bias=math.log(3), initializer_range=0.0)
    _, [row] = train(model, tmp_path / "ratplus", ONE_STEP, memory_lr=0.0)
    lengths = [sum(0.75**i for i in range(t + 2)) for t in range(12)]
    assert row["gate_mean"] == 0.75
    assert row["effective_memory_length"] == pytest.approx(np.mean(lengths), abs=1e-3)
    assert row["effective_memory_length_median"] == pytest.approx(np.mean(lengths), abs=1e-3)
    _, [row] = train(make_model(memory=False), tmp_path / "attention", ONE_STEP)
    assert not any("gate" in name or "memory" in name for name in row)


def test_sparse_steps_alone_come_first(make_model, tmp_path):
    rows = []
    trainer = Trainer(
        make_model(),
        batch,
        SCHEDULE,
        settings(log_every=1, checkpoint_every=1),
        tmp_path,
        sparse=DILATED,
        sparse_only_steps=3,
        log=rows.append,
    )
    trainer.run()
    assert all("sparse_loss" in row for row in rows)
    assert [("loss" in row) for row in rows] == [False] * 3 + [True] * (len(rows) - 3)


def test_a_loss_that_jumps_stops_the_run(make_model, tmp_path):
    """After 20 steps to compare with; at 3 times the mean of the recent ones."""

    class Jumping(Trainer):
        def _loss(self, ids, labels, engine):
            loss, hits = super()._loss(ids, labels, engine)
            return (loss * 5 if self.step == at else loss), hits

    schedule = Schedule([(24 * 48, 12)], 48)
    how = {"lr": 0.0, "memory_lr": 0.0, "spike": 3.0, "trainer": Jumping}
    at = 10
    run, _ = train(make_model(), tmp_path / "early", schedule, **how)
    assert run.step == 24
    at = 22
    with pytest.raises(LossDiverged, match=r"the loss rose to .* at step 22, from") as error:
        train(make_model(), tmp_path / "late", schedule, **how)
    newest, older = (str(tmp_path / "late" / f"checkpoint-{step}.pt") for step in (20, 16))
    assert f"{newest} (delete it to go on from {older})" in str(error.value)
    with pytest.raises(LossDiverged, match="the loss rose to .* at step 22"):  # which it remembers
        train(make_model(), tmp_path / "late", schedule, **how)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(make_model, tmp_path):
    model = make_model()
    weight = model.lm_head.weight
    weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(LossDiverged, match="the gradient's norm is .* there is no checkpoint yet"):
        train(model, tmp_path)
    assert all(p.isfinite().all() for p in model.parameters())


def test_flops_are_logged_as_a_share_of_the_peak(make_model, tmp_path):
    """MFU · peak · seconds: 6 · parameters + 12 · layers · width · keys a token, in both passes."""
    model = make_model()
    _, rows = train(model, tmp_path, sparse=DILATED, peak_tflops=1e-3, log_every=2)
    matrices = sum(p.numel() for p in model.parameters())
    patterns = [[j <= t for j in range(12)] for t in range(12)]
    dense = sum(map(sum, patterns)) / 12
    sparse = sum((j + 1) % 4 == 0 or t - j <= 1 or j < 1 for t in range(12) for j in range(t + 1))
    token = 2 * 6 * matrices + 12 * 2 * 32 * (dense + sparse / 12)
    [first, *_] = rows
    assert first["mfu"] * 1e9 == pytest.approx(token * first["tokens_per_second"], rel=0.02)


@pytest.mark.parametrize("sparse", [None, DILATED], ids=["dense", "joint"])
def test_activation_checkpointing_changes_no_result(make_model, tmp_path, sparse):
    plain, _ = train(make_model(), tmp_path / "plain", sparse=sparse)
    other, _ = train(make_model(), tmp_path / "other", sparse=sparse, activation_checkpointing=True)
    a, b = plain.model.state_dict(), other.model.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_compiled_layers_take_the_same_steps(make_model, tmp_path, monkeypatch):
    """Traced by torch.compile and run without code generation. Each layer and kind of pass is one
    more compilation of the same code, which torch's own limit must not cut short."""
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    _, plain = train(make_model(), tmp_path / "plain", ONE_STEP, sparse=DILATED)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        how = {"sparse": DILATED, "compile": True}
        _, rows = train(make_model(), tmp_path / "compiled", ONE_STEP, **how)
    assert traced
    for a, b in zip(plain, rows, strict=True):
        for name in ("loss", "sparse_loss", "grad_norm", "gate_mean"):
            assert a[name] == pytest.approx(b[name], rel=1e-6)


def test_a_checkpoint_is_for_the_data_that_it_was_trained_on(make_model, tmp_path):
    Trainer(make_model(), batch, ONE_STEP, settings(), tmp_path, data="a").run()
    with pytest.raises(ValueError, match="trained on other data"):
        Trainer(make_model(), batch, ONE_STEP, settings(), tmp_path, data="b")


def test_rows_must_divide_among_processes():
    Schedule([(48, 12)], 48).check(2)
    with pytest.raises(ValueError, match="4 rows of 12 tokens cannot be shared by 3"):
        Schedule([(48, 12)], 48).check(3)
