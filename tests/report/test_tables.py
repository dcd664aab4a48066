"""From a filled store to frames and tables."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from ratplus_exp.analysis import TASKS, accuracies, sample_scores, tidy
from ratplus_exp.analysis.frame import COLUMNS
from ratplus_exp.report import Table
from ratplus_exp.report import figures as drawn
from ratplus_exp.report.accuracy import accuracy_table, tasks_table
from ratplus_exp.report.results import Results
from ratplus_exp.report.tables import selector_table
from ratplus_exp.store import Store

QUEST = {"method": "quest", "block_size": 8, "top_k": 4, "budget": "1/16", "selector": "topk"}
DENSE = {"method": "dense", "block_size": None, "top_k": None, "budget": "1", "selector": None}


def add(store: Store, backbone: str, task: str, right: int, n: int = 10, **key) -> None:
    """A finished cell whose first `right` of n samples are right by exact match."""
    key = QUEST | {"checkpoint": f"digest-{backbone}", "seed": 0, "tier": "pocket"} | key
    key |= {"stage": "eval", "backbone": backbone, "task": task, "context_length": 512}
    cell = store.cell({"model": f"pocket_{backbone}", **key})
    with cell.open({"commit": "abc"}):
        cell.append(
            [{"id": f"{task}-{i}", "exact": float(i < right), "substring": 0.5} for i in range(n)]
        )
        measured = {"budget_measured": 0.07, "effective_memory_length": 60.0, "gate_mean": 0.9}
        cell.finish(accuracies(cell.records()) | measured)


def add_all(store: Store, attention: int, ratplus: int, **key) -> None:
    for task in TASKS:
        add(store, "attention", task, attention, **key)
        add(store, "ratplus", task, ratplus, **key)


def make(store: Store, name: str = "table3", tier: str = "pocket", **options) -> Table:
    own = {x: options.pop(x) for x in ("scorer", "first_token", "protocol") if x in options}
    return accuracy_table(Results.read(store, {"tier": tier} | options, **own), name)


def lines(table: Table, **want: str) -> list[dict[str, str]]:
    rows = list(csv.DictReader(io.StringIO(table.to_csv())))
    return [row for row in rows if all(row[name] == value for name, value in want.items())]


def figures(text: str) -> set[str]:
    """The numbers of a caption, with ranges (10–12) and lists (0, 1, 2) as one."""
    return set(re.findall(r"\d+(?:[.–]\d+)?(?:, \d+)*", text))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "outputs")


def test_tidy_has_a_row_for_each_finished_cell(store):
    add(store, "ratplus", "MK-2", 7)
    add(store, "attention", "S-1", 9, **DENSE)
    with store.cell({"stage": "eval", "task": "S-2"}).open({}) as unfinished:
        unfinished.append([{"id": "a"}])
    frame = tidy(store)
    assert list(frame.columns) == [*COLUMNS]
    assert len(frame) == 2
    row = frame[frame["task"] == "MK-2"].iloc[0]
    assert (row["backbone"], row["budget"], row["n"]) == ("RAT+", "1/16", 10)
    assert (row["exact"], row["substring"]) == (70.0, 50.0)
    dense = frame[frame["method"] == "dense"].iloc[0]
    assert dense["budget"] == "1" and pd.isna(dense["block_size"])


@pytest.mark.parametrize(
    "key", [{"seed": 2**63}, {"seed": 0.5}, {"top_k": 10**30}, {"method": None}]
)
def test_a_cell_that_cannot_be_meant_is_named_and_spoils_no_other(store, capsys, key):
    add(store, "ratplus", "MK-2", 7)
    good = tidy(store)["cell"].tolist()
    add(store, "ratplus", "MK-2", 7, **key)
    assert tidy(store)["cell"].tolist() == sample_scores(store)["cell"].unique().tolist() == good
    (bad,) = (cell for cell in store.cells() if cell.id not in good)
    assert f"warning: {bad.path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "was", "now"),
    [
        ("samples.jsonl", '"exact": 1.0, ', ""),
        ("samples.jsonl", '"substring": 0.5', '"substring": "0.5"'),
        ("metrics.json", '"exact": 70.0', '"exact": "abc"'),
    ],
)
def test_a_value_that_is_no_number_spoils_its_cell_alone(store, capsys, name, was, now):
    for task in ("MK-2", "MK-3"):
        add(store, "ratplus", task, 7)
    bad, good = store.cells()
    file = bad.path / name
    text = file.read_text()
    assert was in text
    file.write_text(text.replace(was, now, 1))
    assert tidy(store)["cell"].tolist() == [good.id]
    assert sample_scores(store)["cell"].unique().tolist() == [good.id]
    assert f"warning: {bad.path / name} has an invalid value" in capsys.readouterr().err


def test_an_empty_store_has_empty_frames_with_the_same_columns(store):
    assert list(tidy(store).columns) == [*COLUMNS]
    assert sample_scores(store).empty and "exact" in sample_scores(store)
    with pytest.raises(ValueError, match="no finished cells with tier=pocket"):
        make(store)


def test_sample_scores_pair_by_id(store):
    add(store, "ratplus", "MK-2", 7)
    add(store, "attention", "MK-2", 4)
    add(store, "attention", "MK-3", 4)
    frame = sample_scores(store, task=["MK-2"])
    wide = frame.pivot(index="id", columns="backbone", values="exact")
    assert len(wide) == 10 and (wide["RAT+"] - wide["Attention"]).sum() == 3
    with pytest.raises(ValueError, match="no column 'typo'"):
        sample_scores(store, typo=1)


def test_a_report_parses_the_samples_and_metrics_of_a_cell_once(store, monkeypatch):
    add(store, "ratplus", "MK-2", 7)
    opened, read = Path.open, []

    def reading(path, *args, **how):
        read.append(path.name)
        return opened(path, *args, **how)

    monkeypatch.setattr(Path, "open", reading)
    results = Results.read(store, {})
    assert len(results.cells) == 1 and len(results.samples) == 10
    # config.json is read to list the cell, and again with the cell's other files.
    assert Counter(read) == {"samples.jsonl": 1, "metrics.json": 1, "done": 1, "config.json": 2}


def test_table3_shows_means_gain_and_paper(store):
    add_all(store, 4, 7)
    add_all(store, 8, 10, **DENSE)
    table = make(store)
    attention, ratplus = lines(table, Method="quest", Block="8", Budget="1/16")
    assert [attention["Backbone"], ratplus["Backbone"]] == ["Attention", "RAT+"]
    assert [attention[task] for task in TASKS] == ["40.0"] * 8 and attention["Mean"] == "40.0"
    assert (ratplus["Mean"], ratplus["Δ"], ratplus["Paper Δ"]) == ("70.0", "+30.0", "+7.4")
    assert (attention["Δ"], attention["Δ 95 %"], attention["Paper Δ"]) == ("", "", "")
    low, high = (float(bound) for bound in ratplus["Δ 95 %"].strip("[]").split(", "))
    assert 15 < low < 30 < high < 45
    assert [ratplus[x] for x in ("k", "Kept", "n", "seeds")] == ["4", "0.070", "10", "1"]
    assert [row["Method"] for row in lines(table)[:3]] == ["dense", "dense", "quest"]
    assert lines(table)[1]["Δ"] == "+20.0" and lines(table)[1]["Paper Δ"] == "—"
    # Context length, n, effective memory length, the paper's context length and n.
    assert {"512", "10", "60.0", "4096", "500"} <= figures(table.caption)
    assert "digest-attention" in table.caption and "digest-ratplus" in table.caption


def test_a_model_without_its_twin_has_no_empty_rows_beside_it(store):
    for task in TASKS:
        add(store, "attention", task, 4)
        add(store, "attention", task, 2, selector="random")
    table = make(store)
    for one in (table, selector_table(Results.read(store, {}))):
        assert {row["Backbone"] for row in lines(one)} == {"Attention"}
    assert not any("Δ" in column for column in table.columns) and "Δ" not in table.caption
    assert lines(table, Method="quest", Budget="1/16", Block="8")[0]["Mean"] == "40.0"


def test_both_scorers(store):
    add_all(store, 4, 7)
    row = lines(make(store, scorer="substring"), Method="quest", Budget="1/16", Backbone="RAT+")[0]
    assert (row["Mean"], row["Δ"], row["Δ 95 %"]) == ("50.0", "+0.0", "[0.0, 0.0]")


def test_what_was_not_measured_is_missing_and_never_zero(store):
    add_all(store, 0, 7)
    add(store, "ratplus", "MK-2", 0, budget="1/8", top_k=8)
    table = make(store)
    partial = lines(table, Method="quest", Budget="1/8", Backbone="RAT+")[0]
    assert partial["MK-2"] == "0.0"
    assert {partial[name] for name in ("S-1", "MQ", "Mean", "Δ", "Δ 95 %")} == {"—"}
    assert partial["Paper Δ"] == "+9.1"
    # All of the paper's settings are there, with as many blocks a context as in P1, and dense.
    main = [("8", "16", "1/4"), ("8", "8", "1/8"), ("8", "4", "1/16")]
    sizes = {
        "dense": [("", "", "1")],
        "quest": [*main, ("2", "4", "1/64")],
        "moba": [*main, ("16", "4", "1/8"), ("16", "2", "1/16")],
        "snapkv": [("1", "128", "1/4"), ("1", "64", "1/8"), ("1", "32", "1/16")],
    }
    layout = [(row["Method"], row["Block"], row["k"], row["Budget"]) for row in lines(table)[::2]]
    assert layout == [(method, *x) for method, of_method in sizes.items() for x in of_method]
    empty = lines(table, Method="snapkv", Budget="1/4", Backbone="Attention")[0]
    assert {empty[name] for name in (*TASKS, "Mean", "Kept", "n", "seeds")} == {"—"}


def test_moba_at_one_budget_has_the_paper_gain_of_its_block_size(store):
    add_all(store, 4, 7)
    gains = [row["Paper Δ"] for row in lines(make(store), Method="moba", Budget="1/8")]
    assert gains == ["", "+10.5", "", "+6.6"]


def test_settings_that_the_paper_lacks_follow(store):
    add_all(store, 4, 7, method="mine", block_size=None, top_k=64, budget="1/8")
    last = lines(make(store))[-1]
    assert (last["Method"], last["Block"], last["k"], last["Mean"]) == ("mine", "1", "64", "70.0")
    assert last["Paper"] == last["Paper Δ"] == "—"


def test_several_seeds_show_their_deviation(store):
    for seed, right in enumerate((6, 7, 8)):
        add_all(store, 4, right, seed=seed)
    table = make(store)
    row = lines(table, Method="quest", Budget="1/16", Backbone="RAT+")[0]
    assert (row["S-1"], row["Mean"], row["seeds"]) == ("70.0±10.0", "70.0±10.0", "3")
    assert row["Δ"] == "+30.0" and "0, 1, 2" in figures(table.caption)


def test_sides_that_share_no_sample_have_no_gain(store):
    for task in TASKS:
        add(store, "attention", task, 4)
        add(store, "ratplus", task, 7, seed=1)
    results = Results.read(store, {})
    results.samples["id"] += results.samples["seed"].astype(str)
    table = accuracy_table(results, "table3")
    row = lines(table, Method="quest", Budget="1/16", Backbone="RAT+")[0]
    assert (row["Mean"], row["Δ"]) == ("70.0", "—")


def test_tiers_and_selectors_do_not_mix(store):
    add_all(store, 4, 7)
    add_all(store, 1, 1, tier="small")
    add_all(store, 2, 3, selector="random")
    means = lines(make(store), Method="quest", Budget="1/16")
    assert [row["Mean"] for row in means] == ["40.0", "70.0"]
    random = lines(make(store, "table5"), Method="quest", Budget="1/16")
    assert [row["Mean"] for row in random] == ["20.0", "30.0"]


def test_two_checkpoints_must_be_told_apart(store):
    add_all(store, 4, 7)
    add(store, "ratplus", "S-1", 9, checkpoint="newer")
    with pytest.raises(ValueError, match=r"several checkpoints \(digest-ratplus, newer; .*RAT\+"):
        make(store)
    table = make(store, checkpoint=["digest-attention", "digest-ratplus"])
    assert lines(table, Method="quest", Budget="1/16")[1]["S-1"] == "70.0"


def test_two_variants_of_a_method_must_be_told_apart(store):
    for pooling in ("avg", "max"):
        settings = {"top_k": 64, "pooling": pooling}
        add_all(store, 4, 7, method="snapkv", block_size=1, budget="1/8", settings=settings)
    with pytest.raises(ValueError, match=r"several variants \(pooling=avg, pooling=max; .* snapkv"):
        make(store)
    table = make(store, variant="pooling=max")
    assert lines(table, Method="snapkv", Budget="1/8")[1]["Mean"] == "70.0"


def test_first_tokens_of_both_kinds_do_not_mix(store):
    add_all(store, 4, 7, first_token="prefill")
    add_all(store, 2, 3, first_token="decode")
    add_all(store, 9, 9, **DENSE, first_token=None)
    titles = set()
    for first_token, mean in (("prefill", "70.0"), ("decode", "30.0")):
        table = make(store, first_token=first_token)
        assert lines(table, Method="quest", Budget="1/16")[1]["Mean"] == mean
        assert lines(table, Method="dense")[1]["Mean"] == "90.0"
        assert re.findall(r"first_token=(\w+)", table.caption) == [first_token]
        titles.add(table.title)
    assert len(titles) == 2


def test_protocols_stand_in_one_table_of_all_tasks(store):
    add_all(store, 4, 7, first_token="prefill")
    add_all(store, 2, 3, first_token="split")
    add_all(store, 9, 9, **DENSE, first_token=None)
    add(store, "ratplus", "vt", 5, first_token="split")
    table = tasks_table(Results.read(store, {}))
    protocols = [row["Protocol"] for row in lines(table, Backbone="RAT+")]
    assert protocols == ["either", "whole", "split"]
    split = lines(table, Protocol="split")
    assert [row["S-1"] for row in split] == ["20.0", "30.0"]
    assert [row["vt"] for row in split] == ["—", "50.0"]
    assert [row["Mean"] for row in split] == ["—", "32.2"]
    assert table.columns.index("vt") == table.columns.index("MQ") + 1
    assert make(store, protocol="split").title != make(store).title


def test_a_figure_has_a_panel_for_each_method_and_protocol(store, tmp_path, monkeypatch):
    add_all(store, 4, 7, first_token="prefill")
    add_all(store, 2, 3, first_token="split")
    add(store, "ratplus", "S-1", 1, first_token="prefill", budget="1/4", top_k=16)
    add_all(store, 9, 9, **DENSE, first_token=None)
    panels = {}

    def draw(panel, tasks, sides):
        panels[panel.get_title()] = {b: [x.value for x in sides[b]] for b in sides}
        assert tasks == list(TASKS)

    monkeypatch.setattr(drawn, "draw_bars", draw)
    assert drawn.accuracy_by_task(Results.read(store, {}), tmp_path).exists()
    assert list(panels) == ["dense", "Quest, 1/16", "Quest, 1/16, split"]
    assert panels == {
        "dense": {"Attention": [90] * 8, "RAT+": [90] * 8},
        "Quest, 1/16": {"Attention": [40] * 8, "RAT+": [70] * 8},
        "Quest, 1/16, split": {"Attention": [20] * 8, "RAT+": [30] * 8},
    }


def test_selector_seeds_become_mean_and_deviation(store):
    for seed, right in enumerate((1, 2, 3)):
        add_all(store, right, right, selector="random", selector_seed=seed)
    row = lines(make(store, "table5"), Method="quest", Budget="1/16")[0]
    assert (row["Mean"], row["seeds"]) == ("20.0±10.0", "3")


def test_the_caption_explains_draws_and_which_rows_have_how_many_samples(store):
    for seed in range(3):
        add_all(store, 1, 2, selector="random", selector_seed=seed)
    add_all(store, 8, 10, n=12, **(DENSE | {"selector": "topk"}))
    caption = make(store, "table5").caption
    assert {"0", "0, 1, 2", "10–12"} <= figures(caption)  # seeds of samples, of draws; n


def test_text_fits_a_terminal(store):
    add_all(store, 1, 9)
    text = make(store).to_text().splitlines()
    assert max(map(len, text)) <= 120
    assert "seeds" not in text[2].split()  # the same in all rows: the caption has it
    add_all(store, 1, 5, budget="1/4", top_k=16, n=5)
    assert "n" in make(store).to_text().splitlines()[2].split()


def test_methods_have_their_names_where_people_read_them(store):
    add_all(store, 4, 7)
    table = make(store).without(TASKS)
    for text in (table.to_text(), table.to_markdown(), table.to_latex()):
        row = next(line for line in text.splitlines() if "Quest" in line and "70.0" in line)
        assert row.replace("|", "").replace("&", "").split()[:4] == ["Quest", "8", "4", "1/16"]
    assert "\nquest,8,4,1/16,0.070,RAT+,70.0," in table.to_csv()


def test_all_formats_are_written(tmp_path):
    table = Table("A_title", "50 % of {x} & ~y^2 \\ #1 $", ("name", "Δ"), (("a|b", "−1.5"),))
    table.write(tmp_path / "tables", "demo")
    texts = {path.name: path.read_text() for path in (tmp_path / "tables").iterdir()}
    assert set(texts) == {"demo.md", "demo.csv", "demo.tex"}
    markdown, comma, latex = (texts[f"demo.{suffix}"] for suffix in ("md", "csv", "tex"))
    assert r"| a\|b | −1.5 |" in markdown and "|:-----|-----:|" in markdown
    assert comma == "name,Δ\na|b,-1.5\n"
    assert (
        r"A\_title. 50 \% of \{x\} \& \textasciitilde{}y\^{}2 "
        r"\textbackslash{} \#1 \$" in latex
    )
    assert r"\begin{tabular}{lr}" in latex and "a|b  & $-$1.5 \\\\\n" in latex
