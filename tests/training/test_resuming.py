"""Checkpoints: a killed, signalled or damaged training resumes as if nothing had happened."""

from __future__ import annotations

import json
import resource
import signal

import pytest
import torch
from tiny_trainings import DILATED, ONE_STEP, Killed, batch, killed_data, settings, train

from ratplus_exp.training.loop import Stopped, Trainer


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
        settings(log_every=20, checkpoint_every=50)


def test_a_checkpoint_is_for_the_data_that_it_was_trained_on(make_model, tmp_path):
    Trainer(make_model(), batch, ONE_STEP, settings(), tmp_path, data="a").run()
    with pytest.raises(ValueError, match="trained on other data"):
        Trainer(make_model(), batch, ONE_STEP, settings(), tmp_path, data="b")


def test_what_a_kill_left_half_written_goes_with_the_next_checkpoint(make_model, tmp_path):
    (tmp_path / "checkpoint-3.pt.partial").write_bytes(b"half")
    train(make_model(), tmp_path)
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert kept == {"checkpoint-8.pt", "checkpoint-10.pt"}
