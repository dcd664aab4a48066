import json

import pytest
import torch
from safetensors.torch import load_file

from ratplus_exp.analysis import tidy
from ratplus_exp.store import Store

TINY = [
    "model.architecture.hidden_size=16",
    "model.architecture.num_hidden_layers=2",
    "model.architecture.num_attention_heads=2",
    "stage.tokens_per_step=128",
    "stage.optimizer.log_every=1",
    "stage.optimizer.checkpoint_every=2",
    "data.length=128",
]


def train(job, experiment, length=64, steps=4, **extra):
    overrides = [f"stage.{key}={value}" for key, value in extra.items()]
    job(f"experiment={experiment}", *TINY, f"stage.schedule=[[{128 * steps},{length}]]", *overrides)
    return job.folder / "training" / experiment / "model"


def test_the_pocket_recipe_from_nothing_to_a_table(job):
    """Pretraining of both, SFT, evaluation: the path of `make weights` and `make demo`."""
    for backbone in ("attention", "ratplus"):
        folder = train(job, f"pocket_scratch_{backbone}", drill_tokens=256)
        names = load_file(folder / "model.safetensors")
        assert any(".memory." in name for name in names) == (backbone == "ratplus")
        final = train(job, f"pocket_{backbone}_sft", length=128)
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
    base = train(job, "pocket_scratch_attention")
    rate = {"optimizer.lr": 0, "optimizer.memory_lr": 0.01, "optimizer.weight_decay": 0}
    branch = load_file(
        train(job, "pocket_scratch_ratplus", init=base, **rate) / "model.safetensors"
    )
    attention = load_file(base / "model.safetensors")
    assert all(torch.equal(branch[name], value) for name, value in attention.items())
    rows = (job.folder / "training/pocket_scratch_ratplus/log.jsonl").read_text().splitlines()
    assert {"sparse_loss", "gate_mean", "effective_memory_length"} <= set(json.loads(rows[0]))


def test_a_trained_model_is_not_trained_again(job, capsys):
    train(job, "pocket_scratch_attention")
    train(job, "pocket_scratch_attention")
    assert "Trained already" in capsys.readouterr().out


def test_other_settings_do_not_go_on_from_a_checkpoint(job):
    model = train(job, "pocket_scratch_attention")
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="another configuration"):
        train(job, "pocket_scratch_attention", other_rate=0.5)


@pytest.mark.parametrize("change", ["gate_bias=-2.0", "gate_bias=[1.5,8.0]"])
def test_a_trained_memory_is_not_made_otherwise(job, tiny_models, change):
    how = ["experiment=pocket_ratplus_sft", *TINY, f"stage.init={tiny_models['ratplus']}"]
    with pytest.raises(ValueError, match="was made with gate_bias=0.0, not .* set model.arch"):
        job(*how, f"model.architecture.{change}")


def test_an_attention_model_cannot_start_from_ratplus(job):
    ratplus = train(job, "pocket_scratch_ratplus")
    with pytest.raises(ValueError, match="has the memory"):
        train(job, "pocket_scratch_attention", init=ratplus)
