"""The training loop: schedules, losses, gradients, and what it logs."""

from __future__ import annotations

import math
import time
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_trainings import DILATED, ONE_STEP, SCHEDULE, SHORT, batch, settings, train

from ratplus_exp.methods import Engine
from ratplus_exp.methods.dilated import DilatedAfterPrefix
from ratplus_exp.training.loop import Trainer
from ratplus_exp.training.settings import Schedule


def cross_entropy(model, ids, labels, engine=None):
    """Mean over the labelled tokens, by hand."""
    with torch.no_grad():
        logits = model(torch.from_numpy(ids), use_cache=False, engine=engine).logits.double()
    log_p = logits.log_softmax(-1)
    wanted = [(b, t) for b, t in np.argwhere(labels >= 0).tolist()]
    return float(-sum(log_p[b, t, labels[b, t]] for b, t in wanted) / len(wanted))


def test_a_schedule_gives_every_length_its_tokens():
    schedule = Schedule([(100, 8), (64, 16), (5, 32)], 32)
    assert schedule.steps == 4 + 2 + 1  # rounded up
    assert [schedule.length_at(step) for step in range(7)] == [8, 8, 8, 8, 16, 16, 32]
    assert [schedule.rows(length) for length in (8, 16, 32)] == [4, 2, 1]
    with pytest.raises(ValueError, match="=32 tokens has no row of 64: raise it"):
        Schedule([(64, 8), (64, 64)], 32).check(1)


def test_steps_are_left_out_to_reach_the_schedules_end_in_time(make_model, tmp_path):
    taken = []

    class Slow(Trainer):
        def _train_step(self, micro_batches):
            ids = micro_batches[0][0]
            assert ids.tolist() == batch(self.step, *ids.shape)[0].tolist()
            taken.append((self.step, ids.shape[1]))
            time.sleep(0.01)
            return super()._train_step(micro_batches)

    schedule = Schedule([(600 * 48, 12), (400 * 48, 16)], 48)
    how = {"log_every": 50, "checkpoint_every": 100, "trainer": Slow}
    run, rows = train(make_model(), tmp_path, schedule, seconds=1.0, **how)
    steps = [step for step, _ in taken]
    assert steps == sorted(set(steps)) and steps[-1] == 999 and 2 < len(steps) < 101
    assert all(length == (12 if step < 600 else 16) for step, length in taken)
    assert run.step == rows[-1]["step"] == 1000 and run.tokens == 48 * len(taken)
    assert 1 <= rows[-1]["seconds"] < 3 and len(rows) <= 20
    assert rows[-1]["lr"] == pytest.approx(3e-4, rel=0.01)  # min_lr_ratio of 3e-3


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


@pytest.mark.parametrize(
    ("prefix", "expected"), [("prompt", [5]), ("random", [0, 1, 3, 4, 6, 7, 9, 10])]
)
def test_a_sparse_step_may_have_a_dense_prefix(make_model, tmp_path, prefix, expected):
    """expected: its possible lengths, of 12 tokens; of all rows the earliest label is the sixth."""
    seen = set()

    def prompts(step, rows, length):
        ids, labels = batch(step, rows, length)
        labels[:, :5], labels[0, :7], labels[1, 5] = -100, -100, 3
        return ids, labels

    class ByHand(Trainer):
        def _optimizer_step(self, micro_batches, engine):
            ids, labels = prompts(self.step, 4, 12)
            by_prefix = {
                cross_entropy(
                    self.model, ids, labels, Engine(DilatedAfterPrefix(dilation=4, prefix=n))
                ): n
                for n in expected
            }
            row = super()._optimizer_step(micro_batches, engine)
            loss = min(by_prefix, key=lambda x: abs(x - row["loss"]))
            assert row["loss"] == pytest.approx(loss, abs=1e-4)
            seen.add(by_prefix[loss])
            return row

    trained = []
    for folder in ("once", "again"):
        how = {"prefix": prefix, "sparse_only_steps": 99, "sparse": DILATED}
        model, schedule = make_model(), Schedule([(12 * 48, 12)], 48)
        ByHand(model, prompts, schedule, settings(), tmp_path / folder, **how).run()
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert seen <= set(expected) and len(seen) >= min(4, len(expected))
    assert torch.equal(*trained)


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


def test_a_batch_without_labels_changes_nothing(make_model, tmp_path):
    model, (ids, labels) = make_model(), batch(0, 4, 12)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    nothing = lambda *_: (ids, np.full_like(labels, -100))  # noqa: E731
    run, [row] = train(model, tmp_path, ONE_STEP, data=nothing, weight_decay=0.0)
    assert row["loss"] == row["accuracy"] == row["grad_norm"] == 0
    assert all(torch.equal(x, before[name]) for name, x in run.model.state_dict().items())


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


@pytest.mark.parametrize("alternate", [False, True])
def test_sparse_steps_alone_come_first(make_model, tmp_path, alternate):
    rows = []
    trainer = Trainer(
        make_model(),
        batch,
        SCHEDULE,
        settings(log_every=1, checkpoint_every=1),
        tmp_path,
        sparse=DILATED,
        alternate=alternate,
        sparse_only_steps=3,
        log=rows.append,
    )
    trainer.run()
    kinds = [("sparse_loss" in row, "loss" in row) for row in rows]
    joint = [(i % 2 == 0, i % 2 == 1) if alternate else (True, True) for i in range(3, len(rows))]
    assert len(joint) > 2 and kinds == [(True, False)] * 3 + joint
    steps = sum(map(sum, kinds))
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {steps}


def test_steps_take_turns_though_steps_are_left_out(make_model, tmp_path):
    """As settings.seconds leaves out steps; also after a kill between the two."""

    class EverySecond(Trainer):
        def _steps(self, total):
            for step, *size in super()._steps(self.last):
                if step % 2 == 0:
                    yield step, *size

    rows = []
    for last in (6, SCHEDULE.steps):
        EverySecond.last = last
        how = settings(log_every=1, checkpoint_every=1)
        EverySecond(
            make_model(),
            batch,
            SCHEDULE,
            how,
            tmp_path,
            sparse=DILATED,
            alternate=True,
            log=rows.append,
        ).run()
    assert len(rows) > 4
    assert [("sparse_loss" in row) for row in rows] == [i % 2 == 0 for i in range(len(rows))]


def test_flops_are_logged_as_a_share_of_the_peak(make_model, tmp_path):
    """MFU · peak · seconds: 6 · parameters + 12 · layers · width · keys a token, in both passes."""
    model = make_model()
    _, rows = train(model, tmp_path, sparse=DILATED, peak_tflops=1e-3, log_every=2)
    matrices = sum(p.numel() for p in model.parameters())
    patterns = [[j <= t for j in range(12)] for t in range(12)]
    dense = sum(map(sum, patterns)) / 12
    sparse = sum((j + 1) % 4 == 0 or j == t for t in range(12) for j in range(t + 1))
    token = 2 * 6 * matrices + 12 * 2 * 32 * (dense + sparse / 12)
    [first, *_] = rows
    assert first["mfu"] * 1e9 == pytest.approx(token * first["tokens_per_second"], rel=0.02)


@pytest.mark.parametrize("sparse", [None, DILATED], ids=["dense", "joint"])
def test_activation_checkpointing_changes_no_result(make_model, tmp_path, sparse):
    plain, _ = train(make_model(), tmp_path / "plain", sparse=sparse)
    other, _ = train(make_model(), tmp_path / "other", sparse=sparse, activation_checkpointing=True)
    a, b = plain.model.state_dict(), other.model.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# The interpreter is slow.
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
ONE_ROW = Schedule([(12, 12)], 12)


def test_compiled_layers_take_the_same_steps(make_model, tmp_path, monkeypatch, triton_device):
    """Traced by torch.compile and run without code generation: all layers are one graph a kind of
    pass, around the Triton scan as it is."""
    torch._dynamo.reset()
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    def run(name, **how):
        model = make_model(dtype=torch.float32, **SMALL).to(triton_device)
        return train(model, tmp_path / name, ONE_ROW, sparse=DILATED, precision="fp32", **how)[1]

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    plain = run("plain")
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        rows = run("compiled", compile=True)
    assert len(traced) == 2
    for a, b in zip(plain, rows, strict=True):
        for name in ("loss", "sparse_loss", "grad_norm", "gate_mean"):
            assert a[name] == pytest.approx(b[name], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_generated_code_takes_the_same_steps(make_model, tmp_path, triton_device, checkpointing):
    """The same by torch's own code generation."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()

    def run(name, **how):
        model = make_model(dtype=torch.float32, **SMALL).to(triton_device)
        return train(model, tmp_path / name, SHORT, sparse=DILATED, precision="fp32", **how)[1]

    plain = run("plain")
    rows = run("compiled", compile=True, activation_checkpointing=checkpointing)
    assert counters["stats"]["unique_graphs"] == 4 and not counters["graph_break"]
    for a, b in zip(plain, rows, strict=True):
        for name in ("loss", "sparse_loss", "grad_norm", "gate_mean"):
            assert a[name] == pytest.approx(b[name], rel=1e-4)


def test_rows_must_divide_among_processes():
    Schedule([(48, 12)], 48).check(2)
    with pytest.raises(ValueError, match="4 rows of 12 tokens cannot be shared by 3"):
        Schedule([(48, 12)], 48).check(3)
