"""stage=tokenize and stage=continued_pretrain: from a folder of text to a trained model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import Olmo2ForCausalLM

from ratplus_exp.analysis import tidy
from ratplus_exp.models import Olmo2RatPlusForCausalLM
from ratplus_exp.models.loading import load_model
from ratplus_exp.provenance import sha256
from ratplus_exp.store import Store, StoreBusy, locked

STAGE = [
    "model=pocket_ratplus",
    "stage.schedule=[[512,32]]",
    "stage.tokens_per_step=128",
    "stage.joint.dilation=4",
    "stage.optimizer.rows_per_pass=2",
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
    job("stage=tokenize", *corpus, init, "stage.workers=0", "model=pocket_ratplus")
    assert "tokens in" in capsys.readouterr().out
    assert len(list((job.folder / "corpus/local").iterdir())) == 1  # of this tokenizer
    capsys.readouterr()
    job(*train)
    assert "the schedule reads it" not in capsys.readouterr().out
    folder = job.folder / "training/pocket_ratplus_continued"
    weights = load_file(folder / "model/model.safetensors")
    before = load_file(tiny_models["attention"] / "model.safetensors")
    assert any(".memory." in name for name in weights)
    assert any(not torch.equal(weights[name], value) for name, value in before.items())
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"sparse_loss", "loss", "mfu", "tokens_per_second", "gate_mean"} <= rows[0].keys()


def test_two_tokenizations_do_not_share_a_folder(job, tiny_models, corpus):
    init = tiny_models["attention"]
    folder = job.folder / "corpus/local" / sha256(init / "tokenizer.json")[:12]
    with locked(folder), pytest.raises(StoreBusy, match="is being written by process"):
        job("stage=tokenize", *corpus, f"stage.init={init}", "stage.workers=0")


def test_models_that_end_texts_otherwise_do_not_share_a_corpus(job, tiny_models, corpus, tmp_path):
    shutil.copytree(tiny_models["attention"], tmp_path / "other")
    (tmp_path / "other/generation_config.json").write_text('{"eos_token_id": 7}')
    for init in (tiny_models["attention"], tmp_path / "other"):
        job("stage=tokenize", *corpus, f"stage.init={init}", "stage.workers=0")
    assert len(list((job.folder / "corpus/local").iterdir())) == 2


def test_a_corpus_that_is_read_several_times_is_told_so(job, tiny_models, corpus, capsys):
    init = f"stage.init={tiny_models['attention']}"
    job("stage=tokenize", *corpus, init, "stage.workers=0", "model=pocket_ratplus")
    tokens = int(capsys.readouterr().out.split(" tokens")[0].split()[-1].replace(",", ""))
    windows = (tokens - 1) // 32
    schedule = f"stage.schedule=[[{2 * 32 * windows},32]]"
    steps = ["stage.tokens_per_step=32768", "stage.optimizer.rows_per_pass=null"]
    job("stage=continued_pretrain", *corpus, init, *STAGE, schedule, *steps)
    out = capsys.readouterr().out
    assert f"The corpus has {tokens:,} tokens: the schedule reads it 2.0 times." in out


def test_it_starts_from_a_model(job, corpus):
    for stage in ("tokenize", "continued_pretrain"):
        with pytest.raises(ValueError, match=f"stage={stage} starts from a trained model"):
            job(f"stage={stage}", *corpus)


def test_a_stock_olmo2_goes_the_way_of_the_pocket_pair(job, stock_model, corpus, tmp_path):
    """As transformers saves it: memory added, joint training, SFT, evaluation, by the same code."""
    stock = stock_model(Olmo2ForCausalLM)
    model = ["model=olmo2_1b_ratplus", "data=pocket", "data.length=128"]
    init = f"stage.init={stock}"
    job("stage=tokenize", *corpus, *model, init, "stage.workers=0")
    job("stage=continued_pretrain", *corpus, *model, init, *STAGE[1:])
    folder = tmp_path / "training/olmo2_1b_ratplus_continued"
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all(row["gate_mean"] < 0.05 and "sparse_loss" in row for row in rows)  # −4 is 0.018
    trained = folder / "model"
    assert type(load_model(trained, torch.device("cpu"))) is Olmo2RatPlusForCausalLM
    weights = load_file(trained / "model.safetensors")
    assert load_file(stock / "model.safetensors").keys() < weights.keys()

    small = ["stage.schedule=[[256,128]]", "stage.tokens_per_step=256"]
    job("stage=sft", *model, f"stage.init={trained}", *small)
    tuned = tmp_path / "training/olmo2_1b_ratplus_sft/model"
    job(*model, f"model.path={tuned}", "budget=1/4", "data.tasks=[S-1]", "data.examples=2")
    [cell] = tidy(Store(tmp_path / "results")).itertuples()
    assert cell.backbone == "RAT+" and cell.n == 2 and cell.method == "quest"
    assert cell.effective_memory_length > 0
