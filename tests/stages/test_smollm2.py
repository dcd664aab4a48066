"""SmolLM2's recipes with a tiny Llama in its place: the memory is added, trained and evaluated."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from ratplus_exp.analysis import tidy
from ratplus_exp.store import Store


@pytest.mark.slow
def test_from_text_to_an_evaluated_llama_with_the_memory(job, stock_model, tmp_path):
    start, texts = stock_model(LlamaForCausalLM, num_key_value_heads=1), tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("the grass is green. the sky is blue. here we go.\n" * 60)
    init = f"stage.init={start}"
    small = ["stage.tokens_per_step=256", "stage.optimizer.rows_per_pass=2"]
    small += ["stage.optimizer.log_every=1", "stage.optimizer.peak_tflops=0.1"]

    job("stage=tokenize", "corpus=local", f"corpus.path={texts}", init, "stage.workers=0")
    pocket = ["data=pocket", "data.length=128"]
    lengths = ["stage.schedule=[[1024,32]]", "stage.joint.dilation=4"]
    job("experiment=smollm2_ratplus", init, *pocket, *lengths, *small)
    job("experiment=smollm2_sft", *pocket, "stage.schedule=[[1024,128]]", *small)
    folder = tmp_path / "training"
    for name, losses in (("continued", {"loss", "sparse_loss"}), ("sft", {"loss"})):
        log = folder / f"smollm2_135m_ratplus_{name}/log.jsonl"
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        assert all(losses <= row.keys() and 0 < row["gate_mean"] < 0.05 for row in rows)
    trained = f"model.path={folder / 'smollm2_135m_ratplus_sft/model'}"
    tasks = ["data.tasks=[S-1]", "data.examples=2", "budget=1/4"]
    job("model=smollm2_135m_ratplus", trained, *pocket, *tasks)
    cells = tidy(Store(tmp_path / "results"))
    assert list(cells["backbone"]) == ["RAT+"] and cells["effective_memory_length"].notna().all()


def test_a_small_file_makes_the_trained_model_again(job, stock_model, tmp_path):
    """Low-rank updates and the memory alone are trained, and the model is made of them twice."""
    start = stock_model(LlamaForCausalLM, num_key_value_heads=1)
    small = ["data=pocket", "data.length=128", "stage.schedule=[[1024,128]]", "stage.low_rank=2"]
    small += ["stage.tokens_per_step=512", "stage.optimizer.memory_lr=0.01", "stage.optimizer.precision=fp32"]
    words = ["experiment=smollm2_sft", f"stage.init={start}", *small]
    job(*words)
    folder = tmp_path / "training/smollm2_135m_ratplus_sft"
    model, file = folder / "model/model.safetensors", folder / "trained.safetensors"
    before, first = load_file(start / "model.safetensors"), load_file(model)
    trained = load_file(file)
    assert all("lora_" in name or ".memory." in name for name in trained)
    changed = {name for name in before if not torch.equal(before[name], first[name].float())}
    assert changed and all("_proj" in name for name in changed)
    for name in changed:  # W + B A
        a, b = (trained[name.replace("weight", f"lora_{x}.default.weight")] for x in "AB")
        assert b.abs().max() > 0
        torch.testing.assert_close(first[name], before[name] + b.float() @ a.float())
    shutil.rmtree(folder / "model")
    for path in folder.glob("checkpoint-*"):
        path.unlink()
    job(*words)
    assert load_file(model).keys() == first.keys()
    assert all(torch.equal(x, first[name]) for name, x in load_file(model).items())
    shutil.rmtree(folder / "model")
    with pytest.raises(ValueError, match="another stage.low_rank"):
        job(*words, "stage.low_rank=3")
