"""SmolLM2's recipes with a tiny Llama in its place: the memory is added, trained and evaluated."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from ratplus_exp.analysis import tidy
from ratplus_exp.models.building import add_memory
from ratplus_exp.models.loading import load_model
from ratplus_exp.models.low_rank import add_low_rank, merge_trained, origin_of, save_trained
from ratplus_exp.store import Store
from ratplus_exp.training.loop import Trainer


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


LOW_RANK = ["data=pocket", "data.length=128", "stage.schedule=[[1024,128]]", "stage.low_rank=2"]
LOW_RANK += ["stage.tokens_per_step=512", "stage.optimizer.memory_lr=0.01"]
LOW_RANK += ["stage.optimizer.precision=fp32"]


def test_a_small_file_makes_the_trained_model_again(job, stock_model, tmp_path):
    """Low-rank updates and the memory alone are trained, and the model is made of them twice."""
    start = stock_model(LlamaForCausalLM, num_key_value_heads=1)
    words = ["experiment=smollm2_sft", f"stage.init={start}", *LOW_RANK]
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

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(file, elsewhere)
    words += [f"stage.folder={elsewhere}"]
    for wrong in ("seed=1", "stage.low_rank=3", "stage.low_rank=0"):
        with pytest.raises(ValueError, match="another configuration"):
            job(*words, wrong)
    job(*words)
    assert not {*elsewhere.glob("checkpoint-*"), *elsewhere.glob("log.jsonl")}
    second = load_file(elsewhere / "model/model.safetensors")
    assert second.keys() == first.keys()
    assert all(torch.equal(x, first[name]) for name, x in second.items())


def test_a_killed_low_rank_training_goes_on(job, stock_model, tmp_path, monkeypatch):
    start = stock_model(LlamaForCausalLM, num_key_value_heads=1)
    words = ["experiment=smollm2_sft", f"stage.init={start}", *LOW_RANK]
    words += ["stage.schedule=[[2048,128]]", "stage.optimizer.checkpoint_every=1"]
    words += ["stage.optimizer.log_every=1"]
    step, steps = Trainer._train_step, []

    def killed(trainer, batches):
        steps.append(trainer.step)
        if steps == [0, 1, 2]:
            raise KeyboardInterrupt
        return step(trainer, batches)

    whole, cut = (tmp_path / name for name in ("whole", "cut"))
    job(*words, f"stage.folder={whole}")
    monkeypatch.setattr(Trainer, "_train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        job(*words, f"stage.folder={cut}")
    assert not (cut / "trained.safetensors").exists()
    job(*words, f"stage.folder={cut}")
    assert steps[3] == 2
    one, other = (load_file(folder / "trained.safetensors") for folder in (whole, cut))
    torch.testing.assert_close(other, one, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("output_gate", [False, True])
def test_the_merged_model_computes_what_was_trained(stock_model, tmp_path, output_gate):
    start = stock_model(LlamaForCausalLM, num_key_value_heads=1)

    def wrapped():
        model = load_model(start, torch.device("cpu"))
        model = add_memory(model, gate_bias=1.0, output_gate=output_gate)
        return add_low_rank(model, 2, seed=0)

    trained = wrapped().get_base_model()
    ids = torch.arange(12).view(1, -1)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).bfloat16())
        file = tmp_path / "trained.safetensors"
        save_trained(trained, trained.state_dict(), file, "origin")
        merged = merge_trained(wrapped(), file)
        torch.testing.assert_close(merged(ids).logits, trained(ids).logits)


def test_a_damaged_file_of_trained_weights_is_named(tmp_path):
    file = tmp_path / "trained.safetensors"
    save_trained(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4).state_dict(), file, "here")
    assert origin_of(file) == "here"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="trained.safetensors is damaged .* copy it again"):
        origin_of(file)
    full = tmp_path / "nowhere" / "trained.safetensors"
    with pytest.raises(OSError, match="cannot write .*trained.safetensors .*make room"):
        save_trained(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4).state_dict(), full, "here")
