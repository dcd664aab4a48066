"""Everything wrong is refused before a model loads, in one line that names the remedy."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ratplus_exp.models.loading import interface_digest, weights_digest
from ratplus_exp.provenance import sha256
from ratplus_exp.stages.common import device_of

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["budget=2/3"], "take one of 1/1, 1/2"),
        (["budget=half"], "write it as 1/16"),
        (["budget=1/64"], "raise the budget or the context length"),
        (["data.length=510"], "whole number of blocks"),
        (["data.length=20", "budget=1/2", "method=snapkv"], "shorter than the observation window"),
        (["selector=best"], "use one of topk, random, oracle"),
        (["selector=random", "method=dense"], "needs a method that selects"),
        (["oracle_heads=[0-0]"], "needs selector=oracle"),
        (["selector=oracle", "oracle_heads=[a-b]"], "write layer-head"),
        (["selector=oracle", "oracle_heads=[9-0]"], "there is no 9-0"),
        (["data.tasks=[S-9]"], "use one of S-1"),
        (["data.examples=0"], "use at least 1"),
        (["data.forms.needle=x"], "add it to the text"),
        (["data.essay=nowhere.txt"], "nowhere.txt cannot be read .* set data.essay"),
        (["stage.first_token=guess"], "use one of prefill, decode"),
        (["model.path=nowhere"], "set model.path"),
        (["method.top_k=100000"], "more than a context of 512 tokens has"),
        (["data.length=1024"], "more than the 512 positions"),
        (["data.forms.reserve=1"], "the answer has . tokens.* raise it"),
        (
            ["data=ruler", "data.length=512", "data.block_size=8"],
            "unknown to the model's tokenizer",
        ),
        (["device=abacus"], "use auto, cpu or cuda"),
        (["method.window=8.5", "method=snapkv"], "whole number"),
        (["method.window=0", "method=snapkv"], "use at least 1"),
        (["method.block_size=0"], "at least 1"),
        (["data.tasks=[]"], "use a list of at least 1"),
        (["stage.batch_size=0"], "use at least 1"),
        (["data.forms.number_digits=abc"], "whole number"),
        (["method.target=foo.Bar"], "is no Method"),
        (
            ["stage=pretrain", "data=pocket1024", "stage.optimizer.precision=fp17"],
            "use one of auto, fp32, bf16",
        ),
        (["stage=pretrain", "data=pocket1024", "+stage.optimizer.speed=1"], "no field 'speed'"),
        (["stage=pretrain", "data=pocket1024", "+stage.joint.depth=1"], "no field 'depth'"),
        (
            ["stage=pretrain", "data=pocket1024", "stage.joint={local: -1}"],
            "stage.joint.local is -1: use at least 0",
        ),
        (["stage=sft"], "set stage.init"),
        (["stage=report"], "evaluate first"),
    ],
)
def test_refused_with_the_remedy(job, tiny_models, overrides, message):
    model = [f"model.path={tiny_models['ratplus']}", "model.sha256=null"]
    with pytest.raises((ValueError, OSError), match=message):
        job(*model, *overrides)
    assert not list(job.folder.rglob("samples.jsonl"))


NONSENSE = {
    "schedule": [
        "[]",
        "[[0,64]]",
        "[[-512,64]]",
        "[[512,0]]",
        "[[512]]",
        "[512,64]",
        "x",
        "[[a,b]]",
    ],
    "tokens_per_step": ["0", "-1", "x"],
    "drill_tokens": ["-1", "x"],
    "sparse_only_tokens": ["-1"],
    "several_rate": ["2", "-0.1", "nan", "x"],
    "other_rate": ["1.5"],
    "optimizer.lr": ["-1", "inf", "nan"],
    "optimizer.memory_lr": ["-1e-3"],
    "optimizer.min_lr_ratio": ["-0.1", "2"],
    "optimizer.warmup": ["5", "1", "-0.1"],
    "optimizer.weight_decay": ["-0.1", "nan"],
    "optimizer.betas": ["[0.9,1]", "[0.9]"],
    "optimizer.clip": ["-1", "0", "nan"],
    "optimizer.spike": ["1"],
    "optimizer.decay": ["some"],
    "optimizer.parallel": ["tensor"],
    "optimizer.rows_per_pass": ["0"],
    "optimizer.peak_tflops": ["0"],
    "optimizer.log_every": ["0"],
}


@pytest.mark.parametrize(
    "override",
    [f"stage.{name}={value}" for name, values in NONSENSE.items() for value in values]
    + [f"model.architecture.{x}" for x in ("num_hidden_layers=-1", "hidden_size=0")],
)
def test_no_nonsense_is_trained(job, override):
    with pytest.raises(ValueError, match="use|write") as error:
        job("experiment=pocket1024_attention", override)
    name, _, _ = override.rpartition("=")
    assert name.rpartition(".")[2] in str(error.value)
    assert not list(job.folder.rglob("training"))


@pytest.mark.parametrize("mixture", ["{S-1: -1}", "{S-1: .nan}", "{S-1: 0}", "{S-9: 1}", "{}"])
def test_no_nonsense_is_tuned(job, tiny_models, mixture):
    how = [
        "experiment=pocket1024_attention_sft",
        "model=pocket_attention",
        f"stage.init={tiny_models['attention']}",
    ]
    cfg = job.compose(*how)
    only = {f"~stage.mixture.{task}" for task in cfg.stage.mixture}
    with pytest.raises(ValueError, match="mixture.*(use one of S-1|at least 0|a number|give some)"):
        job(*how, *only, f"+stage.mixture={mixture}" if mixture != "{}" else "seed=0")
    assert not list(job.folder.rglob("training"))


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 1}, "have unexpected"),
        ({"num_hidden_layers": 3}, "the weights in .* lack"),
        ({"quantization_config": {"bits": 4}}, "is quantised"),
        (None, "no configuration in JSON"),
        (
            {"model_type": "unheard_of", "auto_map": {"AutoConfig": "own.Config"}},
            "cannot be|broken",
        ),
    ],
)
def test_a_changed_config_is_refused(job, tiny_models, tmp_path, change, message):
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


def test_a_changed_tokenizer_config_makes_other_cells(tiny_models, tmp_path):
    model = shutil.copytree(tiny_models["ratplus"], tmp_path / "model")
    before = interface_digest(model)
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<pad>"}))
    assert interface_digest(model) != before


def test_a_prompt_that_does_not_fit_leaves_nothing_behind(job, tiny_models):
    overrides = ("data.length=24", "budget=1/1", f"model.path={tiny_models['ratplus']}")
    with pytest.raises(ValueError, match="raise length"):
        job(*overrides, "model.sha256=null", "data.tasks=[MQ]")
    assert not list(job.folder.rglob("config.json"))


def test_the_wrong_backbone_is_refused(job, tiny_models):
    with pytest.raises(ValueError, match="no ratplus backbone"):
        job(f"model.path={tiny_models['attention']}", "model.sha256=null")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=guess"], "there is no method guess: choose one of adakv, dense"),
        (["budget=x"], "budget is 'x'"),
        (["seed=x"], "seed is 'x': use a whole number"),
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
