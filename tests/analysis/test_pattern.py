"""P1 against measured numbers, checked against plain loops over made-up cells."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from ratplus_exp.analysis import pattern
from ratplus_exp.analysis.bootstrap import Bootstrap, Estimate, rank_correlation
from ratplus_exp.analysis.frame import GROUP
from ratplus_exp.analysis.pattern import compare, scaled
from ratplus_exp.report import paper_tables

CONTEXT = 512


def patterns(table: str, samples: pd.DataFrame, score: str, n_boot: int):
    draws = Bootstrap(samples, score, GROUP, n_boot)
    return list(pattern.patterns(scaled(paper_tables(table), CONTEXT), draws).itertuples())


def measured(table: str, accuracy, n: int = 8) -> pd.DataFrame:
    """Samples of every setting of a table, scaled to 512 tokens; accuracy(cell) in [0, 1] is what
    the mean over a cell's samples comes out at (a multiple of 1/n)."""
    cells = paper_tables(table)[["method", "block_size", "budget", "selector", "backbone", "task"]]
    cells["block_size"] = (cells["block_size"] * CONTEXT // 4096).clip(lower=1)
    right = [round(accuracy(cell) * n) for cell in paper_tables(table).to_dict("records")]
    samples = cells.assign(right=right, training=0).merge(pd.DataFrame({"i": range(n)}), "cross")
    exact = (samples["i"] < samples["right"]).astype(float)
    return samples.assign(id=samples["task"] + "/" + samples["i"].astype(str), exact=exact)


@pytest.mark.parametrize(
    ("table", "count"), [("table2", 8), ("table3", 53), ("table4", 39), ("table5", 22)]
)
def test_the_papers_decisive_cells(table, count):
    (whole, *_) = patterns(table, measured(table, lambda cell: 0.5), "exact", n_boot=2)
    assert (whole.decisive, whole.measured) == (count, count)
    assert (whole.agree, whole.against, whole.tied) == (0, 0, count)


def test_signs_are_counted_over_decisive_cells_alone():
    def accuracy(cell):  # the memory helps Quest, hurts MoBA, and does nothing to SnapKV
        gain = {"quest": 0.25, "moba": -0.25, "snapkv": 0.0}[cell["method"]]
        return 0.5 + gain * (cell["backbone"] == "RAT+")

    expected = dict.fromkeys(("quest", "moba", "snapkv"), 0)
    cells = paper_tables("table3")
    place = ["method", "block_size", "budget", "task"]
    for (method, *_), pair in cells.groupby(place):
        sides = pair.set_index("backbone")["accuracy"]
        expected[method] += abs(sides["RAT+"] - sides["Attention"]) >= 5
    whole, *methods = patterns("table3", measured("table3", accuracy), "exact", n_boot=20)
    assert {p.scope: p.decisive for p in methods} == expected
    assert (whole.agree, whole.against, whole.tied) == tuple(expected.values())
    assert whole.agreement.value == pytest.approx(100 * expected["quest"] / 53)
    assert methods[0].agreement.value == 100 and methods[1].agreement.value == 0


def test_the_papers_own_numbers_agree_and_correlate_fully():
    samples = measured("table3", lambda cell: cell["accuracy"] / 100, n=1000)
    (whole, *_) = patterns("table3", samples, "exact", n_boot=20)
    assert whole.agreement.value == 100
    assert whole.gain.value == pytest.approx(1) and whole.attention.value == pytest.approx(1)
    assert whole.settings == 12


def test_few_settings_have_no_rank_correlation():
    samples = measured("table3", lambda cell: cell["accuracy"] / 100, n=1000)
    found = {p.scope: p for p in patterns("table3", samples, "exact", n_boot=20)}
    assert found["moba"].settings == 5 and found["moba"].gain.value == pytest.approx(1)
    assert found["quest"].settings == 4 and np.isnan(found["quest"].gain.value)


def test_the_gain_pairs_samples_and_wants_every_task():
    samples = measured("table3", lambda cell: 0.5 + 0.25 * (cell["backbone"] == "RAT+"))
    sides = [("quest", 8, "1/4", "topk", b) for b in ("RAT+", "Attention")]
    gain = Bootstrap(samples, "exact", GROUP).gain(*sides, ["S-1", "MQ"])
    assert gain.value == 25 and 0 < gain.low < 25 < gain.high
    lacking = samples[(samples["task"] != "MQ") | (samples["backbone"] != "RAT+")]
    draws = Bootstrap(lacking, "exact", GROUP)
    assert np.isnan(draws.gain(*sides, ["S-1", "MQ"]).value)
    assert draws.gain(*sides, ["S-1"]).value == 25


def test_what_is_not_measured_does_not_count():
    samples = measured("table3", lambda cell: 0.5 + 0.25 * (cell["backbone"] == "RAT+"))
    gone = (samples["method"] == "snapkv") & (samples["backbone"] == "Attention")
    small = (samples["method"] == "moba") & (samples["block_size"] == 16)  # P1's block size 128
    (whole, *methods) = patterns("table3", samples[~gone & ~small], "exact", n_boot=20)
    full = {p.scope: p for p in patterns("table3", samples, "exact", n_boot=2)}
    assert methods[2].measured == 0 and np.isnan(methods[2].agreement.value)
    assert methods[1].settings == 3 and 0 < methods[1].measured < full["moba"].measured
    assert whole.agreement.value == 100 and whole.decisive == 53


def test_the_interval_is_that_of_resampled_samples():
    """One decisive cell, of which 3 of 4 samples favour RAT+: all 4^4 resamplings by hand."""
    samples = measured("table2", lambda cell: 0.0, n=4)
    chosen = (samples["method"] == "quest") & (samples["task"] == "MK-1")
    samples = samples[chosen]
    scores = {"RAT+": [1, 1, 1, 0], "Attention": [0, 0, 0, 1]}
    for backbone, values in scores.items():
        samples.loc[samples["backbone"] == backbone, "exact"] = values
    (whole, *_) = patterns("table2", samples, "exact", n_boot=4000)
    difference = np.subtract(*scores.values())
    every = [difference[list(draw)].sum() > 0 for draw in itertools.product(range(4), repeat=4)]
    assert (whole.measured, whole.agree) == (1, 1)
    assert 0 < np.mean(every) < 0.975 and whole.agreement.low == 0 and whole.agreement.high == 100


def test_rank_correlation_without_and_with_ties():
    ranks = [[1, 2, 3, 4], [4, 3, 2, 1], [2, 1, 4, 3]]
    n = 4
    by_hand = [1 - 6 * sum((r - i) ** 2 for i, r in enumerate(x, 1)) / (n**3 - n) for x in ranks]
    found = rank_correlation(np.array(ranks) * 10.0, np.array([1.0, 5.0, 6.0, 9.0]))
    assert found == pytest.approx(by_hand)
    tied = rank_correlation(np.array([[1.0, 1.0, 2.0]]), np.array([1.0, 2.0, 3.0]))
    assert tied == pytest.approx(np.corrcoef([1.5, 1.5, 3], [1, 2, 3])[0, 1])
    assert np.isnan(rank_correlation(np.ones((1, 3)), np.arange(3.0)))[0]


def test_an_estimate_leaves_out_what_could_not_be_drawn():
    estimate = Estimate.of(np.array([3.0, *range(101), np.nan]))
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((3, 2.5, 97.5))


def test_cell_by_cell_beside_the_paper():
    cells = pd.DataFrame(
        {"method": "quest", "budget": "1/4", "block_size": 8, "top_k": 16, "backbone": "RAT+"}
        | {"task": "MK-3", "selector": "random", "exact": a, "n": 50, "training": 0, "seed": 0}
        | {"selector_seed": i, "budget_measured": 0.3}
        for i, a in enumerate((10.0, 14.0))
    )
    frame = compare(scaled(paper_tables("table5"), CONTEXT), cells, "exact")
    assert len(frame) == 48 and frame["measured"].notna().sum() == 1
    row = frame[frame["measured"].notna()].iloc[0]
    place = ["backbone", "task", "accuracy", "std"]
    assert row[place].tolist() == ["RAT+", "MK-3", 10.12, 1.16]
    assert (row["measured"], row["seeds"], row["n"]) == (12.0, 2, 50)
    assert row["difference"] == pytest.approx(1.88)
    assert row["measured_std"] == pytest.approx(8**0.5)
    assert set(frame.loc[frame["measured"].isna(), "seeds"]) == {0}
