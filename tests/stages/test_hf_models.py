"""Folders saved by transformers itself: evaluated, given the memory, trained."""

import hashlib
import json
import shutil

import pytest
import torch
from transformers import Olmo2ForCausalLM

from ratplus_exp.analysis import tidy
from ratplus_exp.config import forms_of
from ratplus_exp.models import Olmo2RatPlusForCausalLM
from ratplus_exp.models.loading import load_model, load_tokenizer, weight_files
from ratplus_exp.store import Store
from ratplus_exp.tasks import Ruler
from ratplus_exp.tasks.sample import target_ids


@pytest.fixture(scope="module")
def olmo2(tiny_models, stock_model):
    """A tiny OLMo2 in several files, with more embeddings than tokens, as real ones have."""
    size = len(load_tokenizer(tiny_models["attention"])) + 3
    sizes = {"vocab_size": size, "max_position_embeddings": 512, "initializer_range": 0.1}
    return stock_model(Olmo2ForCausalLM, "40KB", **sizes)


def small(folder, model, **extra):
    fields = {
        "model": model,
        "model.path": folder,
        "data": "pocket",
        "data.length": 128,
        "data.tasks": "[S-1,MK-2]",
        "data.examples": 3,
        "budget": "1/4",
        "data.batch_size": 2,
    } | extra
    return [f"{key}={value}" for key, value in fields.items()]


@pytest.mark.parametrize("method", ["dense", "quest", "moba", "snapkv", "dilated"])
def test_a_stock_model_is_evaluated_under_every_method(job, olmo2, method):
    job(*small(olmo2, "hf", method=method))
    cells = tidy(Store(job.folder / "results"))
    assert set(cells["n"]) == {3} and set(cells["backbone"]) == {"Attention"}
    measured = cells["budget_measured"]
    assert (measured == 1).all() if method == "dense" else (measured < 0.6).all()


def test_an_answer_ends_with_any_token_of_the_generation_config(job, olmo2, tmp_path):
    folder = shutil.copytree(olmo2, tmp_path / "model")
    settings = small(folder, "hf", method="dense", **{"data.tasks": "[S-1]"})
    cfg = job(*settings)
    (cell,) = Store(job.folder / "results").cells("eval")
    assert all(record["prediction"] for record in cell.records().values())
    file = folder / "generation_config.json"
    ends = [5, *range(len(load_tokenizer(folder)) + 3)]  # whatever it says first is behind the 5
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": ends}))
    job(*settings)
    (again,) = (x for x in Store(job.folder / "results").cells("eval") if x.id != cell.id)
    assert not any(record["prediction"] for record in again.records().values())
    file.write_text(json.dumps({"eos_token_id": 5}))
    tokenizer = load_tokenizer(folder)
    sample = Ruler(tokenizer, 128, forms_of(cfg)).sample("S-1", 0, 0)
    assert target_ids(sample, tokenizer)[-1] == 5
    file.write_text(json.dumps({"eos_token_id": len(tokenizer)}))
    with pytest.raises(ValueError, match="ends with token .* its tokenizer has"):
        load_tokenizer(folder)


def test_the_checkpoint_of_a_cell_covers_all_weight_files(job, olmo2):
    files = weight_files(olmo2)
    assert len(files) > 1
    sums = "".join(f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in files)
    job(*small(olmo2, "hf"))
    digests = {cell.key["checkpoint"] for cell in Store(job.folder / "results").cells("eval")}
    assert digests == {hashlib.sha256(sums.encode()).hexdigest()[:16]}


def test_a_missing_weight_file_is_named(job, olmo2, tmp_path):
    for file in olmo2.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    last = weight_files(tmp_path)[-1]
    last.unlink()
    with pytest.raises(ValueError, match=f"there is no {last.name}"):
        job(*small(tmp_path, "hf"))
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="is not an index of weights"):
        job(*small(tmp_path, "hf"))


def test_weights_that_are_missing_are_named(job, olmo2, tmp_path):
    """transformers itself would draw them at random and go on."""
    for file in olmo2.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    lost = weight_files(tmp_path)[-1].name
    kept = {name: file for name, file in index["weight_map"].items() if file != lost}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": kept}))
    missing = min(set(index["weight_map"]) - set(kept))
    with pytest.raises(ValueError, match=f"lack {missing}.*restore"):
        job(*small(tmp_path, "hf"))


def test_a_stock_model_is_no_ratplus_backbone(job, olmo2):
    with pytest.raises(ValueError, match="memory=False, so its backbone is not ratplus"):
        job(*small(olmo2, "olmo2_1b_ratplus"))


def test_memory_added_trained_jointly_saved_and_evaluated(job, olmo2):
    """The steps that made the pocket pair, on a model of another class."""
    joint = "stage.joint={dilation: 8}"
    job(
        "stage=pretrain",
        "model=olmo2_1b_ratplus",
        "data=pocket",
        f"stage.init={olmo2}",
        "stage.schedule=[[512,64]]",
        "stage.tokens_per_step=128",
        "stage.optimizer.log_every=2",
        "stage.optimizer.checkpoint_every=2",
        "stage.optimizer.precision=fp32",
        "model.architecture.output_gate=true",
        joint,
    )
    folder = job.folder / "training" / "olmo2_1b_ratplus_pretrain"
    model = load_model(folder / "model", torch.device("cpu"))
    assert type(model) is Olmo2RatPlusForCausalLM and model.config.output_gate
    bias = torch.cat([layer.self_attn.memory.bias for layer in model.model.layers])
    assert (bias != -4).all() and (bias + 4).abs().max() < 0.1
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert all("sparse_loss" in row and row["gate_mean"] < 0.05 for row in rows)
    job(*small(folder / "model", "olmo2_1b_ratplus"))
    cells = tidy(Store(job.folder / "results"))
    assert set(cells["backbone"]) == {"RAT+"}
    assert cells["effective_memory_length"].between(1, 1.1).all()
