"""Stages under torchrun, as on a cluster: two processes of run.py on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ratplus_exp.analysis import tidy
from ratplus_exp.store import Store

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def torchrun(folder, *overrides):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*TORCHRUN, "run.py", f"output={folder}", "tracking=disabled", "device=cpu", *overrides],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def settings(model):
    return [
        "model=pocket_ratplus",
        f"model.path={model}",
        "model.sha256=null",
        "data.length=128",
        "budget=1/4",
        "data.tasks=[S-1,MQ]",
        "data.examples=5",
        "data.batch_size=2",
    ]


def test_evaluation_shared_by_two_processes(tmp_path, tiny_models, job):
    """Five samples a task on two processes, and a killed one's share on the next run."""
    model = tiny_models["ratplus"]
    job(*settings(model))  # alone
    alone = {cell.key["task"]: cell for cell in Store(tmp_path / "results").cells()}

    both = tmp_path / "both"
    done = torchrun(both, *settings(model))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Written to") == 1
    store = Store(both / "results")
    for cell in store.cells():
        files = {name: (cell.path / name).read_text() for name in SHARES}
        assert [text.count("\n") for text in files.values()] == [3, 2]
        assert measured(cell) == measured(alone[cell.key["task"]])

    cell = next(store.cells())  # as rank 1 leaves it that dies in its second batch
    (cell.path / "done").unlink()
    (cell.path / SHARES[1]).write_text(files_cut(cell))
    assert torchrun(both, *settings(model)).returncode == 0
    assert cell.done() == 5 and measured(cell) == measured(alone[cell.key["task"]])
    assert len(tidy(store)) == 2


def measured(cell):
    """A cell's records by id and its metrics, without the times, which differ."""
    records = cell.records() | {"metrics": cell.metrics()}
    return {name: {k: x[k] for k in x if k != "seconds"} for name, x in records.items()}


SHARES = ("samples.jsonl", "samples.1.jsonl")


def files_cut(cell):
    """No whole line, and half of one."""
    return (cell.path / SHARES[1]).read_text()[:20]


@pytest.mark.parametrize("low_rank", [0, 2])
def test_pretraining_sharded_over_two_processes(low_rank, tmp_path, tiny_models, job):
    """The saved model is that of one process to rounding, in one job folder, ready to load."""
    new_model = [
        "stage.init=null",
        "model.architecture.hidden_size=16",
        "model.architecture.num_hidden_layers=2",
        "model.architecture.num_attention_heads=2",
    ]
    updates = [f"stage.init={tiny_models['attention']}", f"stage.low_rank={low_rank}"]
    how = [
        "experiment=pocket_ratplus",
        *(updates if low_rank else new_model),
        "stage.sparse_only_tokens=0",
        "stage.tokens_per_step=256",
        "stage.schedule=[[1024,64]]",
        "stage.drill_tokens=256",
        "stage.optimizer.precision=fp32",
        "stage.optimizer.log_every=1",
        "stage.optimizer.checkpoint_every=2",
        "data.length=128",
    ]
    job(*how)
    done = torchrun(tmp_path / "both", *how)
    assert done.returncode == 0, done.stderr
    name = "training/pocket_ratplus_0"
    one, two = (
        load_file(f / name / "model/model.safetensors") for f in (tmp_path, tmp_path / "both")
    )
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4)
    rows = (tmp_path / "both" / name / "log.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4]
    assert len(list((tmp_path / "both/runs").glob("*/*"))) == 1
    uneven = torchrun(tmp_path / "odd", *how, "stage.schedule=[[1024,256]]")
    assert uneven.returncode and "cannot be shared by 2 processes" in uneven.stderr
