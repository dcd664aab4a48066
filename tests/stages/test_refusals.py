"""What is wrong beyond the words alone (see robustness/) is refused in one line with the remedy,
before a model loads."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ratplus_exp.models.loading import interface_digest, load_model, weights_digest
from ratplus_exp.provenance import sha256
from ratplus_exp.stages.common import device_of

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["budget=2/3"], "take one of 1/1, 1/2"),
        (["budget=1/64"], "raise the budget or the context length"),
        (["data.length=510"], "whole number of blocks"),
        (["data.length=40", "budget=1/1", "method=snapkv"], "shorter than the observation window"),
        (["selector=random", "method=dense"], "needs a method that selects"),
        (["selector=oracle", "method=vertical_slash"], "selects distances, too"),
        (
            [
                *("selector=oracle", "method=layers", "method.layers=[quest,vertical_slash]"),
                "+method@method.methods.vertical_slash=vertical_slash",
            ],
            "vertical_slash selects distances, too",
        ),
        (["method=layers", "method.layers=[quest,quest,moba]"], "lists 3 layers, .* has 2"),
        (
            [
                *("selector=oracle", "method=layers", "method.layers=[shared,shared]"),
                "oracle_heads=[1-0]",
            ],
            "reuses .* of layer 0",
        ),
        (
            ["method=quest_dilated", "method.dilation=128", "budget=1/8"],
            "budget 1/8 less 1/128 .* change the budget or method.dilation",
        ),
        (["method=twilight", "method.candidates=1"], "candidates"),
        (["method=shared", "selector=oracle", "oracle_heads=[1-0]"], "reuses .* of layer 0"),
        (["method=pyramidkv", "budget=1"], "1982 of 1024 tokens cannot .* lower the budget"),
        (["method=pyramidkv", "method.top_k=900"], "of 1024 tokens .* lower method.top_k"),
        (["method=quest", "method.name=snapkv"], "method.name=snapkv is .*SnapKV: name .*Quest"),
        (
            ["model=hf", "model.path=nowhere", "dry_run=true"],
            "there is no model in .*nowhere: set model.path",
        ),
        (["selector=oracle", "oracle_heads=[9-0]"], "there is no 9-0"),
        (["data.essay=nowhere.txt"], "nowhere.txt cannot be read .* set data.essay"),
        (["model.path=nowhere"], "set model.path"),
        (["method.top_k=100000"], "of 1024 tokens .* lower method.top_k"),
        (["data.length=2048"], "more than the 1024 positions"),
        (["data.forms.reserve=1"], "the answer has . tokens.* raise it"),
        (
            ["data=ruler", "data.length=512", "data.block_size=8"],
            "unknown to the model's tokenizer",
        ),
        (["method.target=foo.Bar"], "is no Method"),
        (["stage=sft"], "set stage.init"),
        (["stage=report"], "evaluate first"),
        (
            ["stage=reads", "pair=pocket", "stage.models=[]", "model.training=1"],
            "model.training has no effect.*set stage.trainings",
        ),
        (["experiment=fig1"], r"model.path has no effect.*stage.models=\[\]"),
        (
            ["experiment=fig1", "stage.models=[]", "method=snapkv", "method.pooling=max"],
            "method.pooling has no effect.*conf/method",
        ),
        (["stage=look", "method.block_size=32"], "method.block_size has no effect"),
        (["model.architecture.memory_kind=shift"], "memory_kind has no effect.* trained model"),
        (["experiment=table2", "stage.models=[]", "data.tasks=[S-1]"], "no cell .* has a task of"),
    ],
)
def test_refused_with_the_remedy(job, tiny_models, overrides, message):
    model = [f"model.path={tiny_models['ratplus']}", "model.sha256=null"]
    with pytest.raises((ValueError, OSError), match=message):
        job(*model, *overrides)
    assert not list(job.folder.rglob("samples.jsonl"))


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"head_dim": 3}, "RoPE needs an even number"),
        ({"+vocab_size": 2}, "vocab_size=2 is less than the tokenizer's"),
        ({"hidden_size": 10**9}, "makes no model here .* change it"),
        ({"+hidden_act": "foo"}, "hidden_act is not a field of .* backbone: leave it out"),
    ],
    ids=str,
)
def test_an_architecture_that_makes_no_model_is_refused(job, architecture, message):
    ((name, value),) = architecture.items()
    field = f"{'+' if '+' in name else ''}model.architecture.{name.strip('+')}={value}"
    with pytest.raises(ValueError, match=message):
        job("experiment=pocket_base", "model=pocket_attention", "stage.init=null", field)
    assert not list(job.folder.rglob("provenance.json"))


@pytest.mark.parametrize("stage", ["eval", "sft"])
def test_an_essay_without_end_is_refused(job, tiny_models, stage):
    model = [f"model.path={tiny_models['attention']}", "model.sha256=null"]
    train = ["experiment=pocket_attention_sft", f"stage.init={tiny_models['attention']}"]
    with pytest.raises(ValueError, match="/dev/zero cannot be read .*it is not a file"):
        job(*(train if stage == "sft" else model), "model=pocket_attention", "data.essay=/dev/zero")


def test_a_corrupt_weight_file_is_named(job, tiny_models):
    with pytest.raises(ValueError, match="corrupt or another version"):
        job(f"model.path={tiny_models['ratplus']}", f"model.sha256={'0' * 64}")


def test_broken_files_are_named(job, tiny_models, tmp_path):
    model = shutil.copytree(tiny_models["ratplus"], tmp_path / "model")
    overrides = (f"model.path={model}", "model.sha256=null", "data.examples=1")
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        job(*overrides)
    weights.write_bytes(whole)
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer in .* is broken"):
        job(*overrides)


def _store(path, change):
    weights = load_file(path)
    name = next(iter(weights))
    weights[name] = change(weights[name])
    save_file(weights, path, {"format": "pt"})


def test_large_weights_in_float16_are_loaded(tiny_models, tmp_path):
    """Their sum is beyond float16, each of them is not."""
    model = shutil.copytree(tiny_models["ratplus"], tmp_path / "model")
    _store(model / "model.safetensors", lambda weight: torch.full_like(weight, 6e4))
    loaded = load_model(model, torch.device("cpu"), "float16")
    assert loaded.dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: weight.fill_(float("nan")), "is not finite: restore the weights"),
        (lambda weight: weight.to(torch.int8), "weights in I8: use them in fp32"),
        (lambda weight: weight[:-1].contiguous(), "cannot be loaded"),
    ],
)
def test_weights_that_give_no_numbers_are_refused(job, tiny_models, tmp_path, change, message):
    model = shutil.copytree(tiny_models["ratplus"], tmp_path / "model")
    _store(model / "model.safetensors", change)
    with pytest.raises(ValueError, match=message):
        job(f"model.path={model}", "model.sha256=null", "data.examples=1", "data.tasks=[S-1]")
    assert not list((job.folder / "results").rglob("*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 1}, "have unexpected"),
        ({"num_hidden_layers": 3}, "the weights in .* lack"),
        ({"quantization_config": {"bits": 4}}, "is quantised"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps is x: it must be a positive number"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0: it must be a positive integer"),
        (None, "not a configuration in JSON"),
        (
            {"model_type": "unheard_of", "auto_map": {"AutoConfig": "own.Config"}},
            "cannot be|broken",
        ),
    ],
)
def test_a_changed_config_is_refused(job, tiny_models, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # to run the folder's code
    model = shutil.copytree(tiny_models["ratplus"], tmp_path / "model")
    (model / "own.py").write_text("raise SystemExit('code of a model folder ran')")
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change if change else []))
    with pytest.raises(ValueError, match=message):
        job(f"model.path={model}", "model.sha256=null", "data.examples=1", "data.tasks=[S-1]")


def test_what_is_hashed_is_what_is_loaded(tiny_models, tmp_path):
    """With an index of other files beside the one that transformers loads."""
    model = shutil.copytree(tiny_models["ratplus"], tmp_path / "model")
    weights = model / "model.safetensors"
    digest = sha256(weights)
    shutil.copy(weights, model / "part.safetensors")
    index = {"weight_map": {"lm_head.weight": "part.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    _store(weights, lambda weight: weight.zero_())
    assert weights_digest(model) == sha256(weights) != digest


@pytest.mark.parametrize(
    ("name", "change", "other"),
    [
        ("tokenizer_config.json", {"eos_token": "<pad>"}, True),
        ("generation_config.json", {"eos_token_id": [1, 5]}, True),
        ("generation_config.json", {"temperature": 0.5}, False),  # decoding is greedy
    ],
)
def test_what_changes_answers_makes_other_cells(tiny_models, tmp_path, name, change, other):
    model = shutil.copytree(tiny_models["ratplus"], tmp_path / "model")
    before = interface_digest(model)
    file = model / name
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert (interface_digest(model) != before) == other


def test_a_prompt_that_does_not_fit_leaves_nothing_behind(job, tiny_models):
    overrides = ("data.length=32", "budget=1/1", f"model.path={tiny_models['ratplus']}")
    with pytest.raises(ValueError, match="raise length"):
        job(*overrides, "model.sha256=null", "data.tasks=[MQ]")
    assert not list(job.folder.rglob("config.json"))


def test_the_wrong_backbone_is_refused(job, tiny_models):
    with pytest.raises(ValueError, match="backbone is not ratplus"):
        job(f"model.path={tiny_models['attention']}", "model.sha256=null")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.colour=red"], "data: there is no field 'colour': use one of name, length"),
        (["output=/dev/null/x"], "set output=DIR"),
        (["stage=tokenize", "stage.init=nowhere"], "there is no model in"),
    ],
)
def test_the_command_line_says_it_in_one_line(overrides, message, tmp_path):
    where = [] if any("output" in o for o in overrides) else [f"output={tmp_path}"]
    command = [sys.executable, "run.py", "tracking=disabled", *where, *overrides]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    "overrides",
    [[x] for x in ("stage=tokenize", "stage=report", "experiment=table3", "dry_run=true")],
)
def test_what_runs_in_one_process_is_refused_to_several(job, monkeypatch, overrides):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="runs in one process: .* torchrun is for stage=pretrain"):
        job(*overrides)


def test_one_of_several_processes_says_which_it_is(tmp_path):
    """After the first has had the time to say it for all: then torchrun ends the others."""
    command = [sys.executable, "run.py", f"output={tmp_path}", "selector=best"]
    ranks = {"RANK": "3", "WORLD_SIZE": "4"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | ranks, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error on rank 3: selector is 'best': use one of")


@pytest.mark.parametrize(
    ("name", "world", "current"),
    [("cuda", 1, None), ("cuda:1", 1, "cuda:1"), ("cuda", 4, "cuda:2")],
)
def test_the_gpu_that_is_named_becomes_the_current_one(job, monkeypatch, name, world, current):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("LOCAL_RANK", "2")
    device = device_of(job.compose(f"device={name}"))
    assert chosen == ([current] if current else []) and str(device) == (current or "cuda")
