"""H1 from a filled store, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from accuracy_cells import QUEST

from ratplus_exp.analysis import sample_scores
from ratplus_exp.analysis.checks import check_unmixed
from ratplus_exp.analysis.frame import grouped
from ratplus_exp.analysis.hits import MEAN, STAGE, UP_TO, hit_rates, rank_curves, ranked_heads
from ratplus_exp.report.figures import heads_by_task
from ratplus_exp.report.figures import ranked_heads as ranked_heads_figure
from ratplus_exp.report.results import Results
from ratplus_exp.report.tables import heads_table, top_heads_table
from ratplus_exp.store import Store

COMMON = {"tier": "pocket", "seed": 0, "context_length": 512, "first_token": "prefill"}


def add_hits(store: Store, backbone: str, task: str, hits: list, **key) -> None:
    """hits: of each sample, [layer][head] of 2 values."""
    key = QUEST | COMMON | {"checkpoint": backbone} | key
    key |= {"stage": "hit_rate", "backbone": backbone, "model": f"my_{backbone}", "task": task}
    cell = store.cell(key)
    with cell.open({}):
        cell.append([{"id": f"{task}/{i}", "values": 2, "hits": h} for i, h in enumerate(hits)])
        rates = 100 * np.sum(hits, axis=0) / (2 * len(hits))
        cell.finish({"hit_rate": rates.tolist(), "values": 2 * len(hits), "budget_measured": 0.1})


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
    assert list(curves.loc[MEAN][f"RAT+{UP_TO}"]) == pytest.approx([75, 50, 125 / 3, 31.25])
    assert list(curves.loc[MEAN][f"difference{UP_TO}"]) == pytest.approx([0, -12.5, 0, 0])
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


def test_a_figure_shows_one_block_size_and_a_table_the_tasks_of_both_backbones(store, tmp_path):
    for backbone in ("attention", "ratplus"):
        for task in ("S-1", "MK-3"):
            add_hits(store, backbone, task, [[[2, 0]]], block_size=16, top_k=2)
            add_hits(store, backbone, task, [[[2, 0]]], block_size=16, top_k=4, budget="1/8")
        add_hits(store, backbone, "S-1", [[[0, 1]]])
    add_hits(store, "attention", "MK-1", [[[2, 2]]])
    results = Results.read(store, {})
    assert ranked_heads_figure(results, "quest", tmp_path, "fig2").exists()
    assert heads_by_task(results, tmp_path).exists()
    table = heads_table(results, "quest")
    every = {(row[1], row[3]): row[table.columns.index("All heads")] for row in table.rows}
    assert every == {
        (size, side): rate
        for size, rate in (("8", "25.0"), ("16", "50.0"))
        for side in ("Attention", "RAT+")
    }


def test_hit_rates_of_unlike_cells_are_not_compared(store):
    for backbone, kernel in (("attention", 3), ("ratplus", 63)):
        settings = {"top_k": 4, "kernel": kernel}
        add_hits(store, backbone, "S-1", [[[2]]], settings=settings)
    with pytest.raises(ValueError, match=r"differ in kernel \(3, 63"):
        check_unmixed(grouped(hit_rates(store).drop_duplicates("cell")))


def test_samples_pair_by_id_and_models_do_not_mix(store):
    add_hits(store, "attention", "S-1", [[[2]], [[0]], [[0]]])
    add_hits(store, "ratplus", "S-1", [[[2]]])
    curves = rank_curves(sample_scores(store, STAGE), n_boot=50)
    assert set(curves["n"]) == {1} and set(curves["Attention"]) == {100}
    add_hits(store, "ratplus", "S-1", [[[2]]], checkpoint="another")
    with pytest.raises(ValueError, match="choose one of each backbone"):
        rank_curves(sample_scores(store, STAGE))
    assert len(hit_rates(store, checkpoint="another")) == 1


def test_a_training_that_one_backbone_lacks_does_not_count_and_n_is_each_tasks(store):
    for backbone in ("attention", "ratplus"):
        add_hits(store, backbone, "S-1", [[[2]], [[0]]])
        add_hits(store, backbone, "MV", [[[1]]])
    add_hits(store, "ratplus", "S-1", [[[0]], [[0]]], training=1)
    add_hits(store, "ratplus", "MV", [[[0]]], training=1)
    curves = rank_curves(sample_scores(store, STAGE), n_boot=50).set_index("task")
    assert dict(curves["n"]) == {"S-1": 2, "MV": 1, MEAN: 1}
    assert dict(curves["RAT+"]) == dict(curves["Attention"]) == {"S-1": 50, "MV": 50, MEAN: 50}
