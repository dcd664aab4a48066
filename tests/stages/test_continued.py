"""stage=tokenize and stage=continued_pretrain: from a folder of text to a trained model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

STAGE = [
    "model=pocket_ratplus",
    "stage.schedule=[[512,32]]",
    "stage.tokens_per_step=128",
    "stage.joint={dilation:4,local:4,initial:1}",
    "stage.optimizer.accumulate=2",
    "stage.optimizer.log_every=1",
    "stage.optimizer.checkpoint_every=2",
    "stage.optimizer.peak_tflops=0.1",
]


@pytest.fixture
def corpus(tmp_path):
    """Overrides that name a local corpus of prose."""
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = [{"text": f"the grass is green. the {i} sky is blue. here we go."} for i in range(60)]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["corpus=local", f"corpus.path={folder}"]


def test_text_becomes_shards_and_trains_an_attention_model_with_fresh_gates(
    job, tiny_models, corpus, capsys
):
    init = f"stage.init={tiny_models['attention']}"
    train = ["stage=continued_pretrain", *corpus, init, *STAGE]
    with pytest.raises(ValueError, match="run stage=tokenize"):
        job(*train)
    job("stage=tokenize", *corpus, init, "stage.workers=1", "model=pocket_ratplus")
    assert "tokens in" in capsys.readouterr().out
    job(*train)
    folder = job.folder / "training/pocket_ratplus_continued"
    weights = load_file(folder / "model/model.safetensors")
    before = load_file(tiny_models["attention"] / "model.safetensors")
    assert any(".memory." in name for name in weights)
    assert any(not torch.equal(weights[name], value) for name, value in before.items())
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"sparse_loss", "loss", "mfu", "tokens_per_second", "gate_mean"} <= rows[0].keys()


def test_it_starts_from_a_model(job, corpus):
    for stage in ("tokenize", "continued_pretrain"):
        with pytest.raises(ValueError, match=f"stage={stage} starts from a trained model"):
            job(f"stage={stage}", *corpus)
