import copy
import json
from typing import ClassVar

import pytest
import torch
from ruler_file import write_jsonl
from safetensors.torch import load_file

from ratplus_exp.analysis import tidy
from ratplus_exp.config import forms_of
from ratplus_exp.models.loading import load_tokenizer
from ratplus_exp.stages import train as stage
from ratplus_exp.store import Store, StoreBusy, locked
from ratplus_exp.tasks import Ruler
from ratplus_exp.training.loop import Trainer

TINY = [
    "model.architecture.hidden_size=16",
    "model.architecture.num_hidden_layers=2",
    "model.architecture.num_attention_heads=2",
    "stage.tokens_per_step=128",
    "stage.optimizer.log_every=1",
    "stage.optimizer.checkpoint_every=2",
    "data.length=128",
]


def train(job, model, *overrides, experiment=None, length=64, steps=4, **extra):
    """By default the model's own experiment, from scratch."""
    if experiment is None:
        extra = {"init": "null", "sparse_only_tokens": 0, **extra}
    overrides = [*overrides, *(f"stage.{key}={value}" for key, value in extra.items())]
    how = [f"experiment={experiment or model}", f"model={model}", *TINY]
    job(*how, f"stage.schedule=[[{128 * steps},{length}]]", *overrides)
    suffix = "_sft" if (experiment or "").endswith("_sft") else ""
    return job.folder / "training" / f"{model}_0{suffix}" / "model"


def test_the_pocket_recipe_from_nothing_to_a_table(job):
    """Pretraining of both, SFT, evaluation: the path of `make weights` and `make demo`."""
    for backbone in ("attention", "ratplus"):
        folder = train(job, f"pocket_{backbone}", drill_tokens=256)
        names = load_file(folder / "model.safetensors")
        assert any(".memory." in name for name in names) == (backbone == "ratplus")
        final = train(job, f"pocket_{backbone}", experiment=f"pocket_{backbone}_sft", length=128)
        assert load_file(final / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
        job(
            f"model=pocket_{backbone}",
            f"model.path={final}",
            "model.sha256=null",
            "budget=1/4",
            "data.length=128",
            "data.tasks=[S-1,MK-3]",
            "data.examples=2",
        )
    cells = tidy(Store(job.folder / "results"))
    assert sorted(cells["backbone"]) == ["Attention"] * 2 + ["RAT+"] * 2


def test_a_memory_can_be_added_to_attention_weights(job):
    base = train(job, "pocket_attention")
    rate = {"optimizer.lr": 0, "optimizer.memory_lr": 0.01, "optimizer.weight_decay": 0}
    branch = load_file(train(job, "pocket_ratplus", init=base, **rate) / "model.safetensors")
    attention = load_file(base / "model.safetensors")
    assert all(torch.equal(branch[name], value) for name, value in attention.items())
    rows = (job.folder / "training/pocket_ratplus_0/log.jsonl").read_text().splitlines()
    assert {"sparse_loss", "gate_mean", "effective_memory_length"} <= set(json.loads(rows[0]))


def test_a_trained_model_is_not_trained_again(job, capsys):
    train(job, "pocket_attention")
    train(job, "pocket_attention")
    assert "Already trained" in capsys.readouterr().out
    for name in ("lr", "memory_lr"):
        with pytest.raises(ValueError, match=f"holds a training with stage.optimizer.{name}="):
            train(job, "pocket_attention", f"stage.optimizer.{name}=0.123")
    file = job.folder / "training/pocket_attention_0/provenance.json"
    starts = json.loads(file.read_text())
    starts.append(copy.deepcopy(starts[0]))
    starts[-1]["config"]["stage"]["optimizer"]["lr"] = 0.123  # as after a divergence
    file.write_text(json.dumps(starts))
    for rate in ([], ["stage.optimizer.lr=0.123"]):
        train(job, "pocket_attention", *rate)


def test_contexts_longer_than_the_model_are_refused(job):
    with pytest.raises(ValueError, match="of 2048 tokens, but the model has 128 positions"):
        train(job, "pocket_attention", tokens_per_step=2048, length=2048, steps=16)
    assert not (job.folder / "training").exists()


def test_other_settings_do_not_go_on_from_a_checkpoint(job):
    model = train(job, "pocket_attention")
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="another configuration"):
        train(job, "pocket_attention", "model.tokenizer=outputs/reference/small/tokenizer")
    with pytest.raises(ValueError, match="another configuration"):
        train(job, "pocket_attention", other_rate=0.5)


@pytest.mark.parametrize(
    ("change", "made"),
    [
        ("gate_bias=-2.0", "gate_bias=0.0"),
        ("gate_bias=[1.5,8.0]", "gate_bias=0.0"),
        ("memory_kind=conv", "memory_kind=gate"),
    ],
)
def test_a_trained_memory_is_not_made_otherwise(job, tiny_models, change, made):
    how = [
        "experiment=pocket_ratplus_sft",
        "model=pocket_ratplus",
        *TINY,
        "stage.schedule=[[256,64]]",
        f"stage.init={tiny_models['ratplus']}",
    ]
    with pytest.raises(ValueError, match=f"was made with {made}, not .* set model.arch"):
        job(*how, "model.architecture.gate_bias=0.0", f"model.architecture.{change}")


@pytest.mark.parametrize("field", ["hidden_size=32", "num_hidden_layers=3"])
def test_sizes_other_than_those_of_the_model_to_start_from_are_refused(job, tiny_models, field):
    how = ["experiment=pocket_attention_sft", "model=pocket_attention"]
    with pytest.raises(ValueError, match=f"{field} has no effect: the model in .* leave it out"):
        job(*how, f"stage.init={tiny_models['attention']}", f"model.architecture.{field}")
    for sign in (": ", ":"):
        together = "model.architecture={" + field.replace("=", sign) + "}"
        with pytest.raises(ValueError, match=f"{field} has no effect"):
            job(*how, f"stage.init={tiny_models['attention']}", together)


def test_prompts_that_the_tokenizer_does_not_have_are_not_trained_on(job, tiny_models):
    how = ["experiment=pocket_attention_sft", "model=pocket_attention", "data=ruler", *TINY[:-1]]
    how.append("stage.tokens_per_step=1024")
    with pytest.raises(ValueError, match="tokens are unknown to the model's tokenizer"):
        job(*how, f"stage.init={tiny_models['attention']}", "stage.schedule=[[2048,1024]]")


SELECT = ["memory_kind=ema_fixed", "memory_on=select", "gate_bias=[1,16]"]


def test_a_control_is_trained_by_the_recipe_of_ratplus(job):
    job(
        "experiment=pocket_ratplus",
        *TINY,
        "stage.init=null",
        "stage.sparse_only_tokens=0",
        "stage.schedule=[[512,64]]",
        "model.architecture.memory_kind=conv",
    )
    training = job.folder / "training/pocket_ratplus_0"
    names = load_file(training / "model/model.safetensors")
    assert "model.layers.0.attention.memory.filter" in names
    rows = [json.loads(line) for line in (training / "log.jsonl").read_text().splitlines()]
    assert "sparse_loss" in rows[0] and "gate_mean" not in rows[0]
    assert rows[-1]["effective_memory_length"] > 1  # taps have left the identity


def test_a_memory_that_only_selects_is_trained_as_the_attention_baseline(job):
    attention = load_file(train(job, "pocket_attention") / "model.safetensors")
    job(
        "experiment=pocket_attention",
        *TINY,
        "stage.init=null",
        "model=pocket_ratplus",
        "stage.folder=" + str(job.folder / "training/select"),
        "stage.schedule=[[512,64]]",
        *(f"model.architecture.{field}" for field in SELECT),
    )
    select = load_file(job.folder / "training/select/model/model.safetensors")
    assert all(torch.equal(select[name], value) for name, value in attention.items())


def test_an_attention_model_cannot_start_from_ratplus(job):
    ratplus = train(job, "pocket_ratplus")
    with pytest.raises(ValueError, match="has the memory"):
        train(job, "pocket_attention", init=ratplus)


class Interrupted(Trainer):
    """Notes its precision, and the first one stops after a checkpoint."""

    seen: ClassVar[list] = []

    def run(self, description="training"):
        self.seen.append(self.settings.precision)
        super().run(description)

    def _train_step(self, micro_batches):
        if self.step == 2 and len(self.seen) == 1:
            raise KeyboardInterrupt
        return super()._train_step(micro_batches)


@pytest.mark.parametrize("first", ["fp32", "bf16"])
def test_a_training_keeps_the_precision_that_it_began_with(job, monkeypatch, capsys, first):
    monkeypatch.setattr(stage, "Trainer", Interrupted)
    monkeypatch.setattr(stage, "fastest", lambda *_: first)
    monkeypatch.setattr(Interrupted, "seen", [])
    with pytest.raises(KeyboardInterrupt):
        train(job, "pocket_attention")
    assert f"precision=auto: {first}" in capsys.readouterr().out
    other = {"fp32": "bf16", "bf16": "fp32"}[first]
    monkeypatch.setattr(stage, "fastest", lambda *_: other)
    with pytest.raises(ValueError, match="another configuration"):
        train(job, "pocket_attention", **{"optimizer.precision": other})
    model = train(job, "pocket_attention")
    assert Interrupted.seen == [first] * 2
    starts = json.loads((model.parent / "provenance.json").read_text())
    assert [start["precision"] for start in starts] == [first] * 2


def test_two_trainings_do_not_share_a_folder(job):
    folder = job.folder / "training" / "pocket_attention_0"
    with locked(folder), pytest.raises(StoreBusy, match="is being written by process"):
        train(job, "pocket_attention")
    train(job, "pocket_attention")


def test_a_first_try_that_failed_does_not_block_the_corrected_one(job, tiny_models, tmp_path):
    bad, good = tmp_path / "bad.txt", tmp_path / "good.txt"
    bad.write_bytes(b"\xff\xfe")
    good.write_text("the grass is green. the sky is blue. " * 100)
    how = [
        "experiment=pocket_attention_sft",
        "model=pocket_attention",
        *TINY,
        f"stage.init={tiny_models['attention']}",
    ]
    how += ["stage.schedule=[[256,128]]", "data.forms.reserve=32"]
    with pytest.raises(ValueError, match="bad.txt"):
        job(*how, f"data.essay={bad}")
    job(*how, f"data.essay={good}")
    starts = json.loads(
        (job.folder / "training/pocket_attention_0_sft/provenance.json").read_text()
    )
    assert [start["config"]["data"]["essay"] for start in starts] == [str(good)]


def test_sft_learns_from_rulers_files(job, tiny_models, tmp_path):
    """Other answers than the generated ones, another training; a task without a file is refused."""
    settings = [
        *("experiment=pocket_attention_sft", "model=pocket_attention", *TINY),
        *(f"stage.init={tiny_models['attention']}", "stage.schedule=[[256,128]]"),
        f"data.path={tmp_path / 'ruler'}",
    ]
    forms = forms_of(job.compose("data=pocket"))
    niah = Ruler(load_tokenizer(tiny_models["attention"]), 96, forms)
    folder = tmp_path / "ruler" / "niah_single_1"
    folder.mkdir(parents=True)
    write_jsonl([niah.sample("S-1", 0, 0, "train")], folder / "validation.jsonl")
    with pytest.raises(ValueError, match=r"there is no .*niah_single_2/validation\.jsonl"):
        job(*settings)
    only = "stage.mixture={S-1:1,S-2:0,S-3:0,MK-1:0,MK-2:0,MK-3:0,MV:0,MQ:0}"
    with pytest.raises(ValueError, match=r"there is no .*/vt/validation\.jsonl"):
        job(*settings, only, "stage.mixture.vt=1")
    job(*settings, only)
    folder = job.folder / "training/pocket_attention_0_sft"
    assert (folder / "model/model.safetensors").exists()
    with pytest.raises(ValueError, match="another configuration"):
        job(*settings[:-1], only)
