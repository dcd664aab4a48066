"""The training loop: schedules, losses, and going on after a kill."""

from __future__ import annotations

import json
import math
import resource
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_trainings import (
    DILATED,
    ONE_STEP,
    SCHEDULE,
    SHORT,
    Killed,
    batch,
    killed_data,
    settings,
    train,
)

from ratplus_exp.methods import Engine
from ratplus_exp.training.loop import Stopped, Trainer
from ratplus_exp.training.settings import Schedule, TrainSettings


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
    assert steps == sorted(set(steps)) and steps[-1] == 999 and 10 < len(steps) < 101
    assert all(length == (12 if step < 600 else 16) for step, length in taken)
    assert run.step == rows[-1]["step"] == 1000 and run.tokens == 48 * len(taken)
    assert 1 <= rows[-1]["seconds"] < 2 and len(rows) <= 20
    assert rows[-1]["lr"] == pytest.approx(3e-4, rel=0.01)  # min_lr_ratio of 3e-3


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


DAMAGES = {
    "truncated": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
    "garbage": lambda whole: bytes(reversed(whole)),
    "one byte": lambda whole: whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(make_model, tmp_path, capsys, damage):
    whole, _ = train(make_model(), tmp_path / "whole")
    folder = tmp_path / "damaged"
    train(make_model(), folder)
    last = folder / "checkpoint-10.pt"
    last.write_bytes(damage(last.read_bytes()))
    again, rows = train(make_model(1), folder)
    assert "checkpoint-10.pt is damaged" in capsys.readouterr().out
    assert [row["step"] for row in rows] == [9, 10] and last.exists()
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert logged(folder) == logged(tmp_path / "whole")


def test_where_all_checkpoints_are_damaged_nothing_is_trained(make_model, tmp_path):
    train(make_model(), tmp_path)
    for path in tmp_path.glob("checkpoint-*"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="all checkpoints in .* delete the folder"):
        train(make_model(), tmp_path)


def test_a_full_disk_is_one_line_and_costs_no_checkpoint(make_model, tmp_path):
    """A limit on the size of files stands for it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Filling(Trainer):
        def _train_step(self, micro_batches):
            if self.step == 5:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
            return super()._train_step(micro_batches)

    try:
        with pytest.raises(OSError, match="checkpoint-8.pt .*make room") as error:
            train(make_model(), tmp_path, trainer=Filling)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.glob("checkpoint*")] == ["checkpoint-4.pt"]
    run, rows = train(make_model(1), tmp_path)
    assert run.step == 10 and rows[0]["step"] == 5


@pytest.mark.parametrize("torn", ['{"loss": 1.', '{"loss": 1.{"loss": 2, "step": 1}\n', "7\n"])
def test_a_kill_before_the_first_checkpoint_leaves_no_row(make_model, tmp_path, torn):
    train(make_model(), tmp_path / "whole", checkpoint_every=10)
    with pytest.raises(KeyboardInterrupt):
        train(make_model(), tmp_path / "killed", trainer=Killed, checkpoint_every=10)
    log = tmp_path / "killed" / "log.jsonl"
    assert len(log.read_text().splitlines()) == 7
    with log.open("a") as file:
        file.write(torn)
    train(make_model(), tmp_path / "killed", checkpoint_every=10)
    assert logged(tmp_path / "whole") == logged(tmp_path / "killed")


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


class Signalled(Trainer):
    """Gets SIGTERM in its last step, when that has looked for signals already."""

    def _train_step(self, micro_batches):
        row = super()._train_step(micro_batches)
        if self.step + 1 == self.schedule.steps:
            signal.raise_signal(signal.SIGTERM)
        return row


def test_a_signal_to_the_last_step_is_not_lost(make_model, tmp_path):
    with pytest.raises(Stopped, match="after step 1; .*checkpoint-1.pt"):
        train(make_model(), tmp_path, ONE_STEP, trainer=Signalled)
    run, rows = train(make_model(seed=1), tmp_path, ONE_STEP)
    assert run.step == 1 and not rows


def test_checkpoints_between_logged_rows_are_refused():
    with pytest.raises(ValueError, match=r"\(50\) must be a multiple of log_every \(20\)"):
        TrainSettings(log_every=20, checkpoint_every=50)


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
        def _steps(self, total, made):
            for step in range(self.step + self.step % 2, self.last, 2):
                made.append(step)
                yield step

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


def test_a_checkpoint_is_for_the_data_that_it_was_trained_on(make_model, tmp_path):
    Trainer(make_model(), batch, ONE_STEP, settings(), tmp_path, data="a").run()
    with pytest.raises(ValueError, match="trained on other data"):
        Trainer(make_model(), batch, ONE_STEP, settings(), tmp_path, data="b")


def test_rows_must_divide_among_processes():
    Schedule([(48, 12)], 48).check(2)
    with pytest.raises(ValueError, match="4 rows of 12 tokens cannot be shared by 3"):
        Schedule([(48, 12)], 48).check(3)


def test_what_a_kill_left_half_written_goes_with_the_next_checkpoint(make_model, tmp_path):
    (tmp_path / "checkpoint-3.pt.partial").write_bytes(b"half")
    train(make_model(), tmp_path)
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert kept == {"checkpoint-8.pt", "checkpoint-10.pt"}
