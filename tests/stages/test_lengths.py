"""Several context lengths, and contexts longer than the positions of a model."""

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ratplus_exp.models.loading import load_model
from ratplus_exp.store import Store

CPU = torch.device("cpu")
YARN = {"rope_type": "yarn", "factor": 2.0}


def test_a_sweep_over_lengths_draws_each_method_at_equal_budget(job, pair):
    few = ["data.tasks=[S-1]", "stage.cells.dense.length=[128,256]"]
    job("experiment=lengths", *pair, *few, "stage.cells.blocks.blocks=32")
    folder = job.folder / "reports" / "tiny" / "lengths"
    assert (folder / "lengths.png").stat().st_size and (folder / "lengths.pdf").stat().st_size
    curves = pd.read_csv(folder / "lengths.csv", keep_default_na=False)
    lines = {
        (*line, *points["block_size"])
        for line, points in curves.groupby(["backbone", "method", "blocks"])
        if list(points["length"]) == [128, 256]
    }
    methods = [("dense", "", 1, 1), ("snapkv", "", 1, 1)]
    for method in ("quest", "moba"):
        methods += [(method, "32 blocks", 4, 8), (method, "blocks of 4", 4, 4)]
    assert lines == {(b, *method) for b in ("Attention", "RAT+") for method in methods}
    cells = {cell.id: cell for cell in Store(job.folder / "results").cells("eval")}
    for row in curves.itertuples():
        (cell,) = (
            cell
            for cell in cells.values()
            if (cell.key["context_length"], cell.key["method"]) == (row.length, row.method)
            and cell.key["block_size"] == row.block_size
            and cell.key["backbone"] == ("ratplus" if row.backbone == "RAT+" else "attention")
        )
        assert row.accuracy == cell.metrics()["exact"] and row.n == 2
        if row.method != "dense":
            assert cell.key["top_k"] * row.block_size == row.length // 16


def test_a_table_of_one_length_refuses_several(job, pair):
    with pytest.raises(ValueError, match="of one length: set data.length"):
        few = ["stage.selecting=[quest]", "stage.budgets=[1/4]"]
        job("experiment=methods", *pair, *few, "+stage.cells.dense.length=[128,256]")


@pytest.fixture(scope="module")
def llama(stock_model):
    """A tiny Llama of 64 positions."""
    return stock_model(LlamaForCausalLM, max_position_embeddings=64, initializer_range=0.3)


@pytest.mark.parametrize(
    "rope",
    [
        YARN,
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "default", "rope_theta": 1e6},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rope_is_that_of_transformers(llama, rope):
    ids = torch.randint(3, 1000, (2, 120), generator=torch.Generator().manual_seed(0))
    stock = LlamaConfig.from_pretrained(llama)
    stock.rope_parameters = {"rope_theta": 10_000.0} | rope
    stock.standardize_rope_params()
    theirs = LlamaForCausalLM.from_pretrained(llama, config=stock).eval()
    with torch.no_grad():
        ours, plain = (load_model(llama, CPU, rope=x)(ids).logits for x in (rope, None))
        torch.testing.assert_close(ours, theirs(ids).logits, atol=2e-5, rtol=2e-5)
    assert (ours - plain)[:, 64:].abs().max() > 0.01


def settings(folder, length, *more):
    return [
        *("model=hf", f"model.path={folder}", "data=pocket", f"data.length={length}"),
        *("data.tasks=[S-1]", "data.examples=1", "budget=1/4", "data.block_size=8", *more),
    ]


@pytest.mark.parametrize(
    "more, message",
    [
        ([], "more than the 64 positions .* set rope, or positions=N"),
        (["rope={rope_type: default}"], "more than the 64 positions"),
        (["rope={rope_type: default, factor: 8}"], "more than the 64 positions"),
        (["rope={rope_type: linear, factor: 1.5}"], "more than the 96 positions"),
        (["rope={rope_type: linear, factor: 4}", "positions=100"], "than the 100 positions"),
        (["rope={rope_type: llama3, factor: 2}"], "that transformers needs.*low_freq_factor"),
        (["rope={rope_type: dynamic, factor: 2}"], "use one of default, linear, yarn, llama3"),
    ],
)
def test_longer_contexts_need_scaling_or_a_setting(job, llama, more, message):
    with pytest.raises(ValueError, match=message):
        job(*settings(llama, 128, *more))


def test_scaled_models_have_cells_of_their_own(job, llama):
    for more in (["positions=128"], ["rope={rope_type: yarn, factor: 2}"]):
        job(*settings(llama, 128, *more))
    plain, scaled = sorted(Store(job.folder / "results").cells("eval"), key=lambda x: len(x.key))
    assert "rope" not in plain.key and scaled.key["rope"] == {"rope_type": "yarn", "factor": 2}
    assert plain.done() and scaled.done() and len(scaled.key) == len(plain.key) + 1


def test_rope_is_of_models_with_such_parameters(job, tiny_models):
    with pytest.raises(ValueError, match="no rope_parameters for all layers: leave rope out"):
        job(
            *("model=pocket_attention", f"model.path={tiny_models['attention']}"),
            *("model.sha256=null", "rope={rope_type: linear, factor: 2}"),
        )
