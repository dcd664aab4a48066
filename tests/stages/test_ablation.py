"""stage=ablation: models side by side; and the variants of the small tier's RAT+."""

import shutil

import numpy as np
import pandas as pd
import pytest

from ratplus_exp.analysis import sample_scores, tidy
from ratplus_exp.config import plain
from ratplus_exp.models.building import config_for
from ratplus_exp.report.tables import model_table
from ratplus_exp.stages import evaluate
from ratplus_exp.store import Store

VARIANTS = {
    "small_ratplus_no_joint": ("kv", True),
    "small_ratplus_gates": ("kv", False),
    "small_ratplus_keys": ("k", True),
    "small_ratplus_values": ("v", True),
}


def test_models_stand_side_by_side(job, pair, capsys, monkeypatch):
    # Untrained models never answer right, so the score is made from the answer's length.
    monkeypatch.setattr(evaluate, "exact", lambda text, *_: len(text) % 5 / 4)
    settings = [*pair, "data.tasks=[S-1,MV]", "data.examples=3", "stage.methods=[dense,moba]"]
    settings += ["+stage.cells.random={method: moba, budget: 1/2, selector: random, examples: 2}"]
    cfg = job("stage=ablation", "budget=1/4", *settings)
    table = pd.read_csv(job.folder / "job" / "ablation.csv")
    models = list(cfg.stage.models)
    assert list(table["Model"]) == models and len(models) == 2
    scores = sample_scores(Store(job.folder / "results"))
    for method, column in (("dense", "dense"), ("moba", "MoBA")):
        here = scores[(scores["method"] == method) & (scores["selector"] != "random")]
        assert set(here["budget"]) == {"1" if method == "dense" else "1/4"}
        means = 100 * here.groupby(["model", "task"])["exact"].mean().groupby("model").mean()
        assert table[column].tolist() == pytest.approx(means[models].tolist(), abs=0.051)
        assert means.min() > 0 and means.nunique() == 2
        gain = float(str(table[f"Δ {column}"][1]).split()[0].replace("−", "-"))
        assert gain == pytest.approx(means[models[1]] - means[models[0]], abs=0.051)
        assert pd.isna(table[f"Δ {column}"][0])
    drawn = scores[scores["selector"] == "random"]
    assert set(drawn["budget"]) == {"1/2"} and set(drawn.groupby(["model", "task"]).size()) == {2}
    means = 100 * drawn.groupby(["model", "task"])["exact"].mean().groupby("model").mean()
    assert table["MoBA 1/2 random"].tolist() == pytest.approx(means[models].tolist(), abs=0.051)
    lengths = tidy(Store(job.folder / "results")).groupby("model")["effective_memory_length"].mean()
    for name, text in zip(models, table["Length"].astype(str), strict=True):
        assert text == ("—" if pd.isna(lengths[name]) else f"{lengths[name]:.1f}")
    assert table["Length"].nunique() == 2
    capsys.readouterr()
    job("stage=ablation", "budget=1/4", *settings)
    assert "nothing to run" in capsys.readouterr().out


def test_an_option_need_not_be_named_as_its_model(job, pair):
    """Such as pocket_ratplus_trained, whose model is named pocket_ratplus."""
    attention, ratplus = sorted((job.folder / "conf" / "model").iterdir())
    shutil.copy(ratplus, ratplus.with_name("mine.yaml"))
    models = f"stage.models=[{attention.stem},mine]"
    job("stage=ablation", "budget=1/4", *pair, models, "stage.methods=[dense]")
    table = pd.read_csv(job.folder / "job" / "ablation.csv")
    assert list(table["Model"]) == [attention.stem, ratplus.stem]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ("{method: quest, blocks: [8, 16]}", "averages .*differ in .*block_size"),
        ("{method: quest, protocol: [whole, split]}", "averages .*differ in .*first_token"),
        ("{method: [quest], protocol: split}, other: {method: snapkv}", "has one protocol"),
    ],
)
def test_cells_that_differ_in_more_than_a_column_shows_are_refused(job, pair, cells, message):
    with pytest.raises(ValueError, match=f"stage=ablation {message}"):
        job(
            "stage=ablation",
            "stage.methods=[dense]",
            "budget=1/4",
            *pair,
            f"+stage.cells={{mine: {cells}}}",
        )
    assert not any(Store(job.folder / "results").cells())


def test_only_samples_that_all_models_answered_count():
    """More samples of one model, from another run, move neither its mean nor a difference."""
    scores = {"a1": [1, 0], "a2": [0, 1, 1], "b1": [1, 1, 0, 0], "b2": [0, 1]}
    samples = pd.DataFrame(
        [
            {
                "model": cell[0],
                "method": "moba",
                "budget": "1/4",
                "selector": "topk",
                "training": 0,
                "task": f"MK-{cell[1]}",
                "id": i,
                "exact": score,
            }
            for cell, values in scores.items()
            for i, score in enumerate(values)
        ]
    )
    setting = {"tier": "pocket", "budget": "1/4", "seed": 0}
    setting |= {"first_token": "prefill", "protocol": "whole"}
    table = model_table(samples, {"a": 3.0, "b": np.nan}, ["a", "b"], "exact", **setting)
    assert table.columns == ("Model", "Length", "MoBA", "Δ MoBA")
    first, second = table.rows
    assert first == ("a", "3.0", "50.0", "") and second[:3] == ("b", "—", "75.0")
    assert second[3].startswith("+25.0 [") and "n = 2 samples" in table.caption


def test_models_of_two_tiers_are_refused(job):
    with pytest.raises(ValueError, match="set model=small_ratplus, and only models"):
        job("stage=ablation", "stage.models=[small_ratplus,pocket_ratplus]")


def test_variants_differ_from_ratplus_in_one_thing_each(job):
    assert set(job.compose("experiment=small_ablation").stage.models) == {
        *("small_ratplus", "small_attention"),
        *VARIANTS,
    }
    for name, (memory_on, shared_gate) in VARIANTS.items():
        of = "small_attention" if name.endswith("no_joint") else "small_ratplus"
        cfg, recipe = (
            job.compose(f"experiment={of}", f"model={name}"),
            job.compose(f"experiment={of}"),
        )
        variant, ratplus = (
            config_for(plain(x.model.architecture), memory=True)
            for x in (cfg, job.compose("model=small_ratplus"))
        )
        assert (variant.memory_on, variant.shared_gate) == (memory_on, shared_gate)
        assert variant.to_dict() | {"memory_on": "kv", "shared_gate": True} == ratplus.to_dict()
        assert plain(cfg.stage) == plain(recipe.stage) | {"folder": cfg.stage.folder}
        assert cfg.stage.folder == f"{job.folder}/training/{name}"
        sft = job.compose(f"experiment={of}_sft", f"model={name}")
        assert sft.stage.init == f"{cfg.stage.folder}/model"
        assert sft.model.path == f"{sft.stage.folder}/model"
