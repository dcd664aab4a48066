"""dry_run=true: every configuration there is composes and is estimated, the largest included."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CONF = Path(__file__).parents[2] / "conf"


def options(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def estimate(job, capsys, *overrides):
    job(*overrides, "dry_run=true")
    text = capsys.readouterr().out
    assert not any(job.folder.iterdir()), "a dry run writes nothing"
    return text


JOBS = [
    *(f"model={name}" for name in options("model")),
    *(f"stage={name}" for name in options("stage")),
    *(f"experiment={name}" for name in options("experiment")),
    *(f"method={name}" for name in options("method")),
    *(f"data={name}" for name in options("data")),
    *(f"tracking={name}" for name in options("tracking")),
    *(f"stage=tokenize corpus={name}" for name in options("corpus")),
    *(f"budget=1/{path.stem}" for path in (CONF / "budget/1").glob("*.yaml")),
]


@pytest.mark.parametrize("line", JOBS)
def test_every_configuration_is_estimated(job, capsys, line):
    extra = []
    if line in ("budget=1/64", "budget=1/32"):
        extra = ["method=snapkv"]  # Quest's two forced blocks are more than 1/64
    if "corpus=local" in line:
        extra = ["corpus.path=texts"]
    if line.startswith("model=hf"):
        extra = ["model.path=outputs/reference/pocket/models/attention"]
    text = estimate(job, capsys, *line.split(), *extra)
    assert "Parameters" in text and "KV cache" in text


def number(text, what):
    [found] = re.findall(rf"^{re.escape(what)}  +([\d.,]+)", text, re.MULTILINE)
    return float(found.replace(",", ""))


P2_7B = [
    "model=pocket_ratplus",
    "model.path=nowhere",
    "model.architecture={hidden_size:4096,num_hidden_layers:32,num_attention_heads:32}",
    "stage=continued_pretrain",
]


def test_the_papers_training_of_a_7b_model(job, capsys):
    """P1: 10B tokens on 64 GH200 in ≈10 h; P2's 7B has 7.6B parameters."""
    text = estimate(job, capsys, *P2_7B, "cluster.gpus=64", "cluster.mfu=0.4")
    assert number(text, "Parameters") == pytest.approx(7649, rel=0.001)
    assert number(text, "Hours") == pytest.approx(10, rel=0.25)
    assert "fits" in text and "2: dilated and dense" in text
    olmo2 = ["model=olmo2_7b_ratplus", "model.path=nowhere", P2_7B[-1], "cluster.gpus=64"]
    memory = estimate(job, capsys, *olmo2)
    assert number(memory, "Parameters") == pytest.approx(7298.6 + 537.0, rel=0.001)
    assert number(memory, "Hours") == pytest.approx(10, rel=0.25)
    halved = estimate(job, capsys, *P2_7B, "cluster.gpus=64", "cluster.mfu=0.2")
    assert number(halved, "Hours") == pytest.approx(2 * number(text, "Hours"), rel=0.01)
    alone = estimate(job, capsys, *P2_7B, "cluster.gpus=1")
    assert "too much" in alone


def test_what_the_job_would_refuse_the_estimate_refuses(job):
    with pytest.raises(ValueError, match="cannot be shared by 5 processes"):
        job(*P2_7B, "cluster.gpus=5", "dry_run=true")
    with pytest.raises(ValueError, match="budget 1/3"):
        job("budget.fraction=1/3", "dry_run=true")
