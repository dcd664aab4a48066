"""From a checkpoint in P2's format to an evaluated model, by the commands that a user types."""

import pytest
import torch

from ratplus_exp.models.loading import load_model, load_tokenizer, weights_digest
from ratplus_exp.store import Store


def test_converted_loaded_and_evaluated(job, checkpoint, tmp_path, capsys):
    model, overrides = checkpoint
    job(*overrides, "stage.dtype=null")
    folder = tmp_path / "converted"
    assert f"sha256 {weights_digest(folder)}" in capsys.readouterr().out
    loaded = load_model(folder, torch.device("cpu"))
    assert all(torch.equal(x, loaded.state_dict()[n]) for n, x in model.state_dict().items())
    assert loaded.config.eos_token_id == load_tokenizer(folder).eos_token_id
    job(
        "model=ratplus_7b",
        f"model.path={folder}",
        "data=pocket",
        "data.length=128",
        "data.tasks=[S-1]",
        "data.examples=2",
        "budget=1/4",
    )
    (cell,) = Store(job.folder / "results").cells("eval")
    assert cell.done() == 2 and cell.key["tier"] == "paper"
    with pytest.raises(ValueError, match="already exists: delete the folder"):
        job(*overrides)


def test_converted_without_a_tokenizer_which_is_then_asked_for(job, checkpoint, tmp_path, capsys):
    """The command with the checkpoint alone."""
    job(*checkpoint[1], "stage.tokenizer=null")
    folder = tmp_path / "converted"
    assert "no tokenizer yet: copy the model's tokenizer files" in capsys.readouterr().out
    assert load_model(folder, torch.device("cpu")).config.hidden_size == 16
    with pytest.raises(ValueError, match="there is no tokenizer.json in"):
        job("model=ratplus_7b", f"model.path={folder}", "method=dense")


def test_weights_are_saved_in_the_dtype_asked_for(job, checkpoint, tmp_path):
    model, overrides = checkpoint
    job(*overrides)
    loaded = load_model(tmp_path / "converted", torch.device("cpu"))
    weight = model.model.embed_tokens.weight
    assert torch.equal(loaded.model.embed_tokens.weight, weight.bfloat16().float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("checkpoint=null", "set checkpoint=FILE"),
        ("checkpoint=nowhere.pth", "there is no .*nowhere.pth"),
        ("stage.tokenizer=nowhere", "tokenizer in .*nowhere is broken"),
        ("stage.dtype=fp17", "use one of bfloat16"),
        ("model=olmo2_7b", "not of the RAT\\+ paper's architecture: use model=ratplus_7b"),
        ("model=attention_7b", "has gate rows: choose a model with backbone=ratplus"),
        (
            "model.architecture.num_hidden_layers=3",
            r"layers\.2\.hidden_layer\.fc2\.weight is missing",
        ),
        ("model.architecture.vocab_size=20", "has .* entries, the model only 20"),
    ],
)
def test_refused_with_the_remedy(job, checkpoint, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        job(*checkpoint[1], change)
    assert not (tmp_path / "converted").exists()
