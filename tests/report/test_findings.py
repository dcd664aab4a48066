"""What a report says was found and what it says is missing, from made-up cells."""

from __future__ import annotations

import pandas as pd
import pytest

from ratplus_exp.analysis import BACKBONES, TASKS, Estimate, pattern
from ratplus_exp.report import paper_tables
from ratplus_exp.report.findings import findings, verdict
from ratplus_exp.report.missing import missing


def patterns(table: str, samples: pd.DataFrame, score: str, n_boot: int):
    return pattern.patterns(paper_tables(table), samples, score, n_boot)


NO_CURVES = pd.DataFrame(columns=["task", "rank", "method"])


def paper_cells(*tables: str) -> pd.DataFrame:
    """the paper's cells with the columns of `tidy`; random ones with five seeds."""
    cells = paper_tables().query("table in @tables").drop(columns=["std", "inferred"])
    cells = cells.assign(n=40, budget_measured=0.3, selector_seed=0, exact=50.0, seed=0, training=0)
    random = cells[cells["selector"] == "random"]
    return pd.concat([cells, *(random.assign(selector_seed=i) for i in range(1, 5))])


def samples(table: str, right) -> pd.DataFrame:
    """40 samples a cell, of which right(cell) are right."""
    cells = paper_cells(table).to_dict("records")
    return pd.DataFrame(
        {**cell, "id": f"{cell['task']}/{i}", "exact": float(i < right(cell))}
        for cell in cells
        for i in range(40)
    )


def test_a_verdict_compares_signs_with_the_paper():
    for low, high, paper, found in (
        (1, 3, 5.0, "as in the paper"),
        (-3, -1, 5.0, "against the paper"),
        (-3, -1, -5.0, "as in the paper"),
        (-1, 3, 5.0, "undecided"),
        (1, 3, 0.0, "undecided"),
    ):
        assert verdict(Estimate((low + high) / 2, low, high), paper) == found


def test_table_3_is_told_method_by_method():
    def right(cell):  # the memory helps Quest, hurts SnapKV, and helps MoBA at 1/4 alone
        gain = {"quest": 10, "moba": 10 * (cell["budget"] == "1/4"), "snapkv": -10}[cell["method"]]
        return 20 + gain * (cell["backbone"] == "RAT+")

    frame = samples("table3", right)
    quest, moba, snapkv, signs = findings(
        frame, "exact", NO_CURVES, patterns("table3", frame, "exact", n_boot=20)
    )
    assert "Table 3, Quest: RAT+ minus Attention is +25.0 [" in quest
    assert (
        "at 1/4 (paper +6.2)" in quest
        and "points: as in the paper. Of the paper's decisive cells 7 of 7" in quest
    )
    assert "as in the paper at 1/4, undecided at 1/8 and 1/16." in moba
    assert (
        "−25.0 [" in snapkv
        and "points: against the paper. Of the paper's decisive cells 0 of 21" in snapkv
    )
    assert "Table 3 " in signs and "of 53" in signs


def test_h2_is_told_on_both_sets_of_tasks_with_those_that_say_the_opposite():
    def right(cell):
        gain = -20 if cell["task"].startswith("S-") else 12
        return 20 + gain * (cell["backbone"] == "RAT+")

    frame = samples("table5", right)
    quest, _, snapkv = findings(frame, "exact", NO_CURVES, [])
    assert "H2, Quest at 1/4 choosing at random: RAT+ minus Attention is +30.0 [" in quest
    assert (
        "on MK-1 to MQ, the tasks of the paper's Table 2 (paper +25.5: as in the paper) and +0.0 ["
        in quest
    )
    assert "on all 8 tasks (paper +27.3: undecided)" in quest
    for text in (quest, snapkv):
        assert "The opposite on its own: S-1 −50.0 [" in text and "S-3 −50.0" in text
        assert "MQ +" not in text


def test_the_best_heads_are_told_rank_by_rank():
    rows = []
    for rank, gap in enumerate((20.0, 10.0, 0.0, -10.0), start=1):
        row = {"method": "quest", "task": "mean", "rank": rank, "budget": "1/4"}
        row |= {"RAT+": 50 + gap, "Attention": 50.0, "difference": gap}
        rows.append(row | {"difference low": gap - 2, "difference high": gap + 2})
    (told,) = findings(samples("table3", lambda cell: 20)[:0], "exact", pd.DataFrame(rows), [])
    assert "+20.0 [18.0, 22.0] at 1/4 (70.0 against 50.0 %) points: as in the paper." in told
    assert "ahead beyond the interval in 2 of 4 comparisons and behind in 1." in told


OUTPUTS = [f"table{i}" for i in (2, 3, 4, 5)] + [f"fig{i}" for i in (1, 2, 3, 4)]


@pytest.fixture
def everything() -> tuple[pd.DataFrame, pd.DataFrame]:
    cells = paper_cells("table3", "table5")
    oracle = cells[cells["selector"] == "random"].query("selector_seed == 0")
    dense = [
        {"method": "dense", "backbone": b, "task": t, "budget": "1", "selector": "topk"}
        for b in BACKBONES
        for t in TASKS
    ]
    dense = pd.DataFrame(dense).assign(block_size=1, top_k=0)
    cells = pd.concat([cells, oracle.assign(selector="oracle"), dense], ignore_index=True)
    return cells, cells[cells["method"].isin(["quest", "snapkv"]) & (cells["selector"] == "topk")]


def test_nothing_is_missing_when_all_is_there(everything):
    assert missing(*everything, OUTPUTS) == []


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (
            "method == 'dense' and backbone == 'RAT+' and task == 'MV'",
            "RAT+, dense attention, on MV (Table 3, Table 4, Table 5, Figure 1).",
        ),
        (
            "method == 'snapkv' and selector == 'oracle' and backbone == 'Attention'",
            "Attention, SnapKV at 1/4 with oracle selection (Table 5).",
        ),
        (
            "method == 'quest' and selector == 'random' and selector_seed == 3 and task == 'S-2'"
            " and backbone == 'RAT+'",
            "RAT+, Quest at 1/4 with random selection with the paper's block size 64: 4 of 5 "
            "seeds, on S-2 (Table 5).",
        ),
        (
            "method == 'moba' and block_size == 64 and budget == '1/8' and backbone == 'RAT+' and "
            "selector == 'topk'",
            "RAT+, MoBA at 1/8 with the paper's block size 64 (Table 3, Table 4).",
        ),
    ],
)
def test_what_is_missing_is_named_with_what_needs_it(everything, gone, said):
    cells, rates = everything
    assert missing(cells.drop(cells.query(gone).index), rates, OUTPUTS) == [said]


def test_missing_hit_rates_are_named_by_budget(everything):
    cells, rates = everything
    gone = "method == 'snapkv' and budget == '1/16' and task == 'MQ' and backbone == 'RAT+'"
    rates = rates.drop(rates.query(gone).index)
    expected = "RAT+, hit rates of SnapKV at 1/16, on MQ (Figure 3, Figure 4)."
    assert missing(cells, rates, OUTPUTS) == [expected]
