"""What a report says was found and what it says is missing, from made-up cells."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import yaml

from ratplus_exp.analysis import BACKBONES, TASKS, Estimate
from ratplus_exp.report import paper_tables
from ratplus_exp.report.results import Results
from ratplus_exp.report.tables import findings_table, verdict
from ratplus_exp.stages.missing import missing

AS, AGAINST, UNDECIDED = "as in the paper", "against the paper", "undecided"


def paper_cells(*tables: str) -> pd.DataFrame:
    """The paper's cells with the columns of `tidy`; random ones with five seeds."""
    cells = paper_tables().query("table in @tables").drop(columns=["std", "inferred"])
    cells = cells.assign(n=40, budget_measured=0.3, selector_seed=0, exact=50.0, seed=0, training=0)
    cells = cells.assign(context_length=4096, tier="paper", model=cells["backbone"])
    cells = cells.assign(checkpoint=cells["model"], variant="", cell="c")
    random = cells[cells["selector"] == "random"]
    return pd.concat([cells, *(random.assign(selector_seed=i) for i in range(1, 5))])


def results(cells, samples=None, rates=None, hits=None) -> Results:
    nothing = cells[:0].assign(hits=None, values=0, id="")
    samples, rates, hits = (nothing if x is None else x for x in (samples, rates, hits))
    return Results(cells, samples, rates, hits, {}, "exact", "prefill")


def findings(table: str, right) -> dict[tuple[str, str, str], tuple[str, ...]]:
    """Rows by question, method and budget; of 40 samples a cell right(cell) are right."""
    cells = paper_cells(table)
    rows = pd.DataFrame(
        {**cell, "id": f"{cell['task']}/{i}", "exact": float(i < right(cell))}
        for cell in cells.to_dict("records")
        for i in range(40)
    )
    return {row[:3]: row[3:] for row in findings_table(results(cells, rows)).rows}


def test_a_verdict_compares_signs_with_the_paper():
    for low, high, paper, expected in (
        (1, 3, 5.0, AS),
        (-3, -1, 5.0, AGAINST),
        (-3, -1, -5.0, AS),
        (-1, 3, 5.0, UNDECIDED),
        (1, 3, 0.0, UNDECIDED),
    ):
        assert verdict(Estimate((low + high) / 2, low, high), paper) == expected
    assert not verdict(Estimate(float("nan"), 0, 0), 1.0)


def test_table_3_has_a_verdict_for_each_method_and_budget():
    def right(cell):  # the memory helps Quest, hurts SnapKV, and helps MoBA at 1/4 alone
        gain = {"quest": 10, "moba": 10 * (cell["budget"] == "1/4"), "snapkv": -10}[cell["method"]]
        return 20 + gain * (cell["backbone"] == "RAT+")

    rows = findings("table3", right)
    verdicts = {key[1:]: row[-1] for key, row in rows.items() if "Table 3" in key[0]}
    budgets = ("1/4", "1/8", "1/16")
    expected = {("quest", b): AS for b in budgets} | {("snapkv", b): AGAINST for b in budgets}
    expected |= {("moba", b): AS if b == "1/4" else UNDECIDED for b in budgets}
    assert verdicts == expected and len(rows) == 9
    attention, ratplus, gain, paper, _ = next(iter(rows.values()))
    assert (attention, ratplus, paper) == ("50.0", "75.0", "+6.2")
    assert gain.startswith("+25.0 [")


def test_h2_has_both_sets_of_tasks_and_those_against_the_paper():
    def right(cell):
        gain = -20 if cell["task"].startswith("S-") else 12
        return 20 + gain * (cell["backbone"] == "RAT+")

    rows = findings("table5", right)
    quest = {key[0]: row[2:] for key, row in rows.items() if key[1] == "quest"}
    hard, every, *single = quest.items()
    assert (
        "Table 2" in hard[0] and hard[1][0].startswith("+30.0 [") and hard[1][1:] == ("+25.5", AS)
    )
    assert "all tasks" in every[0] and every[1][0].startswith("+0.0 [")
    assert every[1][1:] == ("+27.3", UNDECIDED)
    assert [name.split()[2] for name, _ in single] == ["S-1", "S-2", "S-3"]
    assert all(row[0].startswith("−50.0 [") and row[2] == AGAINST for _, row in single)


def test_the_best_heads_have_a_verdict_and_all_heads_a_difference():
    cells = paper_cells("table3").query("method == 'quest' and budget == '1/4' and task == 'MV'")
    heads = {"Attention": [1, 1, 1, 1, 1, 2], "RAT+": [0, 0, 0, 0, 0, 2]}
    hits = [
        cell | {"id": i, "values": 2, "hits": [heads[cell["backbone"]]]}
        for cell in cells.to_dict("records")
        for i in range(5)
    ]
    best, four, every = findings_table(results(cells, hits=pd.DataFrame(hits))).rows
    assert best[1:] == ("quest", "1/4", "100.0", "100.0", "+0.0 [0.0, 0.0]", "> 0", UNDECIDED)
    assert four[3:] == ("62.5", "25.0", "−37.5 [−37.5, −37.5]", "> 0", AGAINST)
    assert every[3:] == ("58.3", "16.7", "−41.7 [−41.7, −41.7]", "—", "—")


def planned() -> dict:
    """What conf/experiment/ plans for each output."""
    folder = Path(__file__).parents[2] / "conf" / "experiment"
    names = [f"table{i}" for i in (2, 3, 5)] + [f"fig{i}" for i in (1, 2, 3, 4)]
    read = {name: yaml.safe_load((folder / f"{name}.yaml").read_text()) for name in names}
    cells = {name: x["stage"]["cells"] for name, x in read.items()}
    return cells | {"table4": cells["table3"]}


@pytest.fixture
def everything() -> tuple[pd.DataFrame, pd.DataFrame]:
    cells = paper_cells("table3", "table5")
    oracle = cells[cells["selector"] == "random"].query("selector_seed == 0")
    dense = [
        {"method": "dense", "backbone": b, "task": t, "budget": "1", "selector": "topk"}
        for b in BACKBONES
        for t in TASKS
    ]
    dense = pd.DataFrame(dense).assign(block_size=1, top_k=0, selector_seed=0, training=0)
    cells = pd.concat([cells, oracle.assign(selector="oracle"), dense], ignore_index=True)
    rates = cells[cells["method"].isin(["quest", "snapkv"]) & (cells["selector"] == "topk")]
    return cells, rates


def test_nothing_is_missing_when_all_is_there(everything):
    cells, rates = everything
    assert missing(results(cells, rates=rates), planned()) == []


@pytest.mark.parametrize(
    ("gone", "words", "outputs"),
    [
        (
            "method == 'dense' and backbone == 'RAT+' and task == 'MV'",
            ["RAT+", "dense attention", "on MV"],
            "Table 3, Table 4, Table 5, Figure 1",
        ),
        (
            "method == 'snapkv' and selector == 'oracle' and backbone == 'Attention'",
            ["Attention", "SnapKV at 1/4", "oracle"],
            "Table 5",
        ),
        (
            "method == 'quest' and selector == 'random' and selector_seed == 3 and task == 'S-2'"
            " and backbone == 'RAT+'",
            ["RAT+", "Quest at 1/4", "random", "4 of 5 seeds", "on S-2"],
            "Table 5",
        ),
        (
            "method == 'moba' and block_size == 64 and budget == '1/8' and backbone == 'RAT+' and "
            "selector == 'topk'",
            ["RAT+", "MoBA at 1/8", "block size 64"],
            "Table 3, Table 4, Figure 1",
        ),
        (
            "method == 'moba' and block_size == 128 and budget == '1/8' and backbone == 'RAT+'",
            ["RAT+", "MoBA at 1/8", "block size 128"],
            "Table 3, Table 4",
        ),
    ],
)
def test_what_is_missing_is_named_with_what_needs_it(everything, gone, words, outputs):
    cells, rates = everything
    (line,) = missing(results(cells.drop(cells.query(gone).index), rates=rates), planned())
    assert all(word in line for word in words) and line.endswith(f" ({outputs}).")


def test_missing_hit_rates_are_named_by_budget(everything):
    cells, rates = everything
    gone = "method == 'snapkv' and budget == '1/16' and task == 'MQ' and backbone == 'RAT+'"
    rates = rates.drop(rates.query(gone).index)
    (line,) = missing(results(cells, rates=rates), planned())
    assert all(word in line for word in ("RAT+", "hit rates", "SnapKV at 1/16", "on MQ"))
    assert line.endswith(" (Figure 3, Figure 4).")


def test_a_training_that_a_setting_lacks_is_named(everything):
    cells, rates = (pd.concat([x, x.assign(training=3)]) for x in everything)
    cells = cells.reset_index(drop=True)
    gone = "training == 3 and method == 'moba' and budget == '1/4' and backbone == 'RAT+'"
    cells = cells.drop(cells.query(f"{gone} and selector == 'topk'").index)
    (line,) = missing(results(cells, rates=rates), planned())
    assert line.startswith("RAT+, MoBA at 1/4 with block size 64, training 3 (Table 3")
