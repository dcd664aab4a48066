"""H1 and H2 from a filled store, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from ratplus_exp.analysis import TASKS, accuracies, sample_scores
from ratplus_exp.analysis.checks import anomalies, cut_prompts
from ratplus_exp.analysis.hits import MEAN, STAGE, hit_rates, rank_curves, ranked_heads
from ratplus_exp.report.figures import heads_by_task
from ratplus_exp.report.figures import ranked_heads as ranked_heads_figure
from ratplus_exp.report.results import Results
from ratplus_exp.report.tables import heads_table, selector_table, top_heads_table
from ratplus_exp.store import Store

SETTING = {"tier": "pocket", "method": "quest", "block_size": 8, "top_k": 4, "budget": "1/16"}
COMMON = {"seed": 0, "context_length": 512, "first_token": "prefill", "selector_seed": 0}


def add_hits(store: Store, backbone: str, task: str, hits: list, **key) -> None:
    """hits: of each sample, [layer][head] of 2 values."""
    key = SETTING | COMMON | {"selector": "topk", "checkpoint": backbone} | key
    key |= {"stage": "hit_rate", "backbone": backbone, "model": f"my_{backbone}", "task": task}
    cell = store.cell(key)
    with cell.open({}):
        cell.append([{"id": f"{task}/{i}", "values": 2, "hits": h} for i, h in enumerate(hits)])
        rates = 100 * np.sum(hits, axis=0) / (2 * len(hits))
        cell.finish({"hit_rate": rates.tolist(), "values": 2 * len(hits), "budget_measured": 0.1})


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def test_heads_are_ranked_and_compared(store):
    add_hits(store, "attention", "S-1", [[[0, 1], [2, 0]], [[0, 1], [2, 0]]])
    add_hits(store, "ratplus", "S-1", [[[2, 0], [1, 0]], [[2, 0], [1, 2]]])
    add_hits(store, "attention", "MV", [[[0, 2], [0, 0]], [[0, 2], [0, 0]]])
    add_hits(store, "ratplus", "MV", [[[1, 0], [0, 0]], [[1, 0], [0, 0]]])
    rates = hit_rates(store)
    assert len(rates) == 16 and set(rates["n"]) == {2} and set(rates["values"]) == {4}
    one = rates[(rates["backbone"] == "RAT+") & (rates["task"] == "S-1")]
    found = {(r.layer, r.head): r.hit_rate for r in one.itertuples()}
    assert found == {(0, 0): 100, (0, 1): 0, (1, 0): 50, (1, 1): 50}

    ranked = ranked_heads(rates)
    attention = ranked[ranked["backbone"] == "Attention"]
    assert list(attention["hit_rate"]) == [75, 50, 0, 0]  # means of (50, 100), (100, 0), …
    assert tuple(attention.iloc[0][["layer", "head", "rank"]]) == (0, 1, 1)

    curves = rank_curves(sample_scores(store, STAGE), n_boot=200).set_index(["task", "rank"])
    assert list(curves.loc["S-1"]["Attention"]) == [100, 50, 0, 0]
    assert list(curves.loc["S-1"]["RAT+"]) == [100, 50, 50, 0]
    assert list(curves.loc[MEAN]["RAT+"]) == [75, 25, 25, 0]
    assert list(curves.loc[MEAN]["difference"]) == [0, -25, 25, 0]
    # Head 1.1 of RAT+ hits in one sample of two: it may be at the top, never above 100.
    third = curves.loc[("S-1", 3)]
    assert (third["RAT+ low"], third["RAT+ high"]) == (0, 50)
    results = Results.read(store, {})
    assert heads_table(results, "quest").rows[1][:5] == ("quest", "8", "1/16", "RAT+", "100.0")
    top = top_heads_table(results, "quest")
    assert top.columns[4:] == ("rank 1", "rank 2", "rank 3", "rank 4", "n")
    attention, ratplus, gap = top.rows
    assert attention[3:] == ("Attention", "75.0", "50.0", "0.0", "0.0", "2")
    assert ratplus[4:6] == ("75.0", "25.0") and gap[5] == "−25.0 [−25.0, 0.0]"


def test_heads_of_a_model_without_the_other_backbone(store, tmp_path):
    add_hits(store, "attention", "S-1", [[[0, 1], [2, 0]], [[0, 1], [2, 0]]])
    curves = rank_curves(sample_scores(store, STAGE), n_boot=50)
    assert list(curves.loc[curves["task"] == "S-1", "Attention"]) == [100, 50, 0, 0]
    assert curves[["RAT+", "RAT+ low", "difference"]].isna().all(axis=None)
    results = Results.read(store, {})
    table = heads_table(results, "quest")
    assert [row[3] for row in table.rows] == ["Attention"] and "Δ" not in table.columns
    assert [row[3] for row in top_heads_table(results, "quest").rows] == ["Attention"]
    assert ranked_heads_figure(results, "quest", tmp_path, "fig2").exists()
    assert heads_by_task(results, tmp_path).exists()


def test_samples_pair_by_id_and_models_do_not_mix(store):
    add_hits(store, "attention", "S-1", [[[2]], [[0]], [[0]]])
    add_hits(store, "ratplus", "S-1", [[[2]]])
    curves = rank_curves(sample_scores(store, STAGE), n_boot=50)
    assert set(curves["n"]) == {1} and set(curves["Attention"]) == {100}
    add_hits(store, "ratplus", "S-1", [[[2]]], checkpoint="another")
    with pytest.raises(ValueError, match="choose one of each backbone"):
        rank_curves(sample_scores(store, STAGE))
    assert len(hit_rates(store, checkpoint="another")) == 1


def add(store: Store, backbone: str, right: int, n: int = 8, tasks=TASKS, **key) -> None:
    """Cells of all tasks, whose first `right` of n samples are right."""
    key = SETTING | COMMON | {"selector": "topk", "stage": "eval", "checkpoint": backbone} | key
    for task in tasks:
        own = {"backbone": backbone, "model": f"my_{backbone}", "task": task}
        cell = store.cell(key | own)
        with cell.open({}):
            cell.append(
                [
                    {"id": f"{task}/{i}", "exact": float(i < right), "substring": 0.0}
                    | {"prompt_tokens": 100}
                    for i in range(n)
                ]
            )
            cell.finish(accuracies(cell.records()) | {"budget_measured": 0.1})


DENSE = {"method": "dense", "block_size": 1, "top_k": 0, "budget": "1"}


def test_who_selects(store):
    for backbone, random in (("attention", (2, 0)), ("ratplus", (4, 2))):
        for seed, right in enumerate(random):
            add(store, backbone, right, selector="random", selector_seed=seed)
        add(store, backbone, 4)
        add(store, backbone, 6, selector="oracle")
        add(store, backbone, 8, **DENSE)
    results = Results.read(store, {})
    means = results.selector_means.set_index(["side", "selector"])["estimate"]
    value = {name: x.value for name, x in means.items()}
    gap = "RAT+ − Attention"
    assert value["Attention", "random"] == 12.5 and value["RAT+", "random"] == 37.5
    assert value[gap, "random"] == 25 and value[gap, "topk"] == 0
    assert value["Attention", "selection"] == 25 and value["RAT+", "dense"] == 100
    assert 10 < means[gap, "random"].low < 25 < means[gap, "random"].high < 40
    table = selector_table(results)
    attention, ratplus, gap = table.rows
    assert attention[3:8] == ("Attention", "12.5±17.7", "50.0", "75.0", "100.0")
    assert gap[3] == "RAT+ − Attention" and gap[4].startswith("+25.0 [") and gap[8] == ""
    assert ratplus[-1] == "8"


def test_what_is_odd_is_doubted(store):
    for backbone in ("attention", "ratplus"):
        add(store, backbone, 24, n=40, **DENSE)
        add(store, backbone, 20, n=40)
        add(store, backbone, 23, n=40, budget="1/8", top_k=8)
    assert anomalies(Results.read(store, {}).draws) == []
    add(store, "ratplus", 36, n=40, budget="1/32", top_k=2, tasks=["MK-2"])
    found = anomalies(Results.read(store, {}).draws)
    assert {x.group for x in found} == {("quest", 8, "1/32", "topk", "RAT+")}
    assert [(x.than, x.task) for x in found] == [("dense", None), ("dense", "MK-2"), ("1/16", None)]
    assert [round(x.gain) for x in found] == [30, 30, 40]
    assert all(0 < x.bound < x.gain for x in found)


def test_a_prompt_without_room_for_its_answer_is_noticed(store):
    add(store, "ratplus", 3, tasks=["S-1"], data={"forms": {"reserve": 420}}, **DENSE)
    assert list(cut_prompts(sample_scores(store)).values()) == [8]
    add(store, "ratplus", 3, tasks=["S-1"], data={"file": "ab", "reserve": 413}, **DENSE)
    assert len(cut_prompts(sample_scores(store))) == 2  # a RULER file
    add(store, "ratplus", 3, tasks=["S-1"], data={"forms": {"reserve": 412}}, **DENSE)
    assert len(cut_prompts(sample_scores(store))) == 2
