"""The rows, columns and caption of an accuracy table."""

import re

from accuracy_cells import DENSE, add, add_all, lines, make

from ratplus_exp.analysis import TASKS
from ratplus_exp.report.accuracy import accuracy_table
from ratplus_exp.report.results import Results
from ratplus_exp.report.tables import selector_table


def numbers(text: str) -> set[str]:
    """The numbers of a caption, with ranges (10–12) and lists (0, 1, 2) as one."""
    return set(re.findall(r"\d+(?:[.–]\d+)?(?:, \d+)*", text))


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
    assert {"512", "10", "60.0", "4096", "500"} <= numbers(table.caption)
    assert "digest-attention" in table.caption and "digest-ratplus" in table.caption
    row = lines(make(store, scorer="substring"), Method="quest", Budget="1/16", Backbone="RAT+")[0]
    assert (row["Mean"], row["Δ"], row["Δ 95 %"]) == ("50.0", "+0.0", "[0.0, 0.0]")


def test_a_model_without_its_twin_has_no_empty_rows_beside_it(store):
    for task in TASKS:
        add(store, "attention", task, 4)
        add(store, "attention", task, 2, selector="random")
    table = make(store)
    for one in (table, selector_table(Results.read(store, {}))):
        assert {row["Backbone"] for row in lines(one)} == {"Attention"}
    assert not any("Δ" in column for column in table.columns) and "Δ" not in table.caption
    assert lines(table, Method="quest", Budget="1/16", Block="8")[0]["Mean"] == "40.0"


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
    # MoBA at one budget has the paper's gain at its block size.
    gains = [row["Paper Δ"] for row in lines(table, Method="moba", Budget="1/8")]
    assert gains == ["", "+10.5", "", "+6.6"]
    empty = lines(table, Method="snapkv", Budget="1/4", Backbone="Attention")[0]
    assert {empty[name] for name in (*TASKS, "Mean", "Kept", "n", "seeds")} == {"—"}


def test_settings_that_the_paper_lacks_follow(store):
    add_all(store, 4, 7, method="mine", block_size=None, top_k=64, budget="1/8")
    last = lines(make(store))[-1]
    assert (last["Method"], last["Block"], last["k"], last["Mean"]) == ("mine", "1", "64", "70.0")
    assert last["Paper"] == last["Paper Δ"] == "—"


def test_several_seeds_show_their_deviation(store):
    for seed in range(3):
        add_all(store, 4, 6 + seed, seed=seed)
        add_all(store, 1 + seed, 1 + seed, selector="random", selector_seed=seed)
    table = make(store)
    row = lines(table, Method="quest", Budget="1/16", Backbone="RAT+")[0]
    assert (row["S-1"], row["Mean"], row["seeds"]) == ("70.0±10.0", "70.0±10.0", "3")
    assert row["Δ"] == "+30.0" and "0, 1, 2" in numbers(table.caption)
    random = lines(make(store, "table5"), Method="quest", Budget="1/16")[0]
    assert (random["Mean"], random["seeds"]) == ("20.0±10.0", "3")


def test_sides_that_share_no_sample_have_no_gain(store):
    for task in TASKS:
        add(store, "attention", task, 4)
        add(store, "ratplus", task, 7, seed=1)
    results = Results.read(store, {})
    results.samples["id"] += results.samples["seed"].astype(str)
    table = accuracy_table(results, "table3")
    row = lines(table, Method="quest", Budget="1/16", Backbone="RAT+")[0]
    assert (row["Mean"], row["Δ"]) == ("70.0", "—")


def test_the_caption_explains_draws_and_which_rows_have_how_many_samples(store):
    for seed in range(3):
        add_all(store, 1, 2, selector="random", selector_seed=seed)
    add_all(store, 8, 10, n=12, **DENSE)
    # Seeds of samples and of draws, and n.
    assert {"0", "0, 1, 2", "10–12"} <= numbers(make(store, "table5").caption)
