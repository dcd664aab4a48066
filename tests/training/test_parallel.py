"""Training on two processes (gloo, CPU): the same steps as on one, and resuming after a kill.

Every run is processes of their own, as torchrun would start them; see worker.py.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def start(folder, processes=2, **how):
    """Exit codes and outputs of a run's processes; one that dies takes the others with it."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []
    for rank in range(processes):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in ranks.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        running.append(
            subprocess.Popen(
                [sys.executable, HERE / "worker.py", folder, json.dumps(how)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    ends = [process.communicate(timeout=600)[0] for process in running]
    return [process.returncode for process in running], ends


def final(folder, processes=2, **how):
    """The final weights of a run that ends well."""
    codes, texts = start(folder, processes, **how)
    assert codes == [0] * processes, "\n".join(texts)
    return torch.load(folder / "final.pt", weights_only=True)


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint*"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return final(folder, 1, joint=True), log(folder)


@pytest.mark.parametrize("how", [{"parallel": "fsdp"}, {"parallel": "ddp", "rows_per_pass": 1}])
def test_two_processes_take_the_steps_of_one(tmp_path, alone, how):
    """Though the labels are spread unevenly over their rows."""
    weights = final(tmp_path, joint=True, **how)
    for name, value in alone[0].items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)
    rows = log(tmp_path)
    assert len(rows) == 10 and rows[-1]["tokens"] == 480
    for a, b in zip(alone[1], rows, strict=True):
        for name in ("loss", "sparse_loss", "accuracy", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-3)


def test_a_killed_rank_costs_nothing_but_the_steps_since_the_checkpoint(tmp_path, alone):
    """FSDP2, SIGKILL of rank 1 at step 6: on two processes bit for bit, on one to rounding."""
    how = {"parallel": "fsdp", "rows_per_pass": 1, "activation_checkpointing": True, "joint": True}
    whole = final(tmp_path / "whole", **how)
    codes, _ = start(tmp_path / "killed", interrupt=(1, 6, "SIGKILL"), **how)
    assert codes[1] == -9 and codes[0] != 0
    assert checkpoints(tmp_path / "killed") == ["checkpoint-4"]
    copied = tmp_path / "one"
    subprocess.run(["cp", "-r", tmp_path / "killed", copied], check=True)

    resumed = final(tmp_path / "killed", **how)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    losses = [[row["loss"] for row in log(tmp_path / name)] for name in ("whole", "killed")]
    assert losses[0] == losses[1] and len(losses[0]) == 10

    one = final(copied, 1, **how)
    for name, value in whole.items():
        torch.testing.assert_close(one[name], value, rtol=1e-3, atol=1e-4)
    assert [row["loss"] for row in log(copied)] == pytest.approx(losses[0], rel=1e-3)
    assert checkpoints(copied) == ["checkpoint-10.pt", "checkpoint-8.pt"]


def test_sigterm_of_one_rank_stops_all_with_a_checkpoint(tmp_path, alone):
    """And a training with a checkpoint of one process resumes with two."""
    codes, texts = start(tmp_path, 1, joint=True, interrupt=(0, 2, "SIGTERM"))
    assert codes == [3] and "stopped by a signal after step 3" in texts[0]
    assert checkpoints(tmp_path) == ["checkpoint-3.pt"]
    codes, texts = start(tmp_path, joint=True, interrupt=(1, 6, "SIGTERM"))
    assert codes == [3, 3], texts
    assert "checkpoint-7: run the same command to resume" in texts[0]
    weights = final(tmp_path, joint=True)
    for name, value in alone[0].items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)
    assert [row["step"] for row in log(tmp_path)] == list(range(1, 11))


def test_a_damaged_checkpoint_of_two_processes_is_set_aside_by_both(tmp_path):
    weights = final(tmp_path / "whole")
    final(tmp_path / "damaged")
    shards = sorted((tmp_path / "damaged" / "checkpoint-10").glob("*.distcp"))
    shards[-1].write_bytes(shards[-1].read_bytes()[:1000])  # of one of them
    codes, texts = start(tmp_path / "damaged")
    assert codes == [0, 0] and "checkpoint-10 is damaged" in texts[0]
    again = torch.load(tmp_path / "damaged" / "final.pt", weights_only=True)
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    assert len(log(tmp_path / "damaged")) == 10
