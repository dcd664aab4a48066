"""Cells of different models, data or protocols do not share a row."""

import re

import pytest
from accuracy_cells import DENSE, add, add_all, lines, make

from ratplus_exp.report.accuracy import tasks_table
from ratplus_exp.report.results import Results


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
    with pytest.raises(ValueError, match=r"differ in checkpoint \(digest-ratplus, newer; .*RAT\+"):
        make(store)
    table = make(store, checkpoint=["digest-attention", "digest-ratplus"])
    assert lines(table, Method="quest", Budget="1/16")[1]["S-1"] == "70.0"


def test_two_variants_of_a_method_must_be_told_apart(store):
    for pooling in ("avg", "max"):
        settings = {"top_k": 64, "pooling": pooling}
        add_all(store, 4, 7, method="snapkv", block_size=1, budget="1/8", settings=settings)
    with pytest.raises(ValueError, match=r"differ in pooling \(avg, max; .* snapkv"):
        make(store)
    table = make(store, pooling="max")
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
