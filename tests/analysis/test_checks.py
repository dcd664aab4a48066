"""What is doubted in a filled store."""

import re

import pytest
from accuracy_cells import DENSE, QUEST, add, add_all

from ratplus_exp.analysis.checks import anomalies
from ratplus_exp.analysis.frame import LeftOut
from ratplus_exp.report.results import Results


def test_more_accuracy_from_less_attention_is_an_anomaly(store):
    add_all(store, 24, 24, n=40, **DENSE)
    add_all(store, 20, 20, n=40)
    add_all(store, 23, 23, n=40, budget="1/8", top_k=8)
    assert anomalies(Results.read(store, {}).draws) == []
    add(store, "ratplus", "MK-2", 36, n=40, budget="1/32", top_k=2)
    found = anomalies(Results.read(store, {}).draws)
    assert {x.group for x in found} == {("quest", 8, "1/32", "topk", "RAT+")}
    assert [(x.than, x.task) for x in found] == [("dense", None), ("dense", "MK-2"), ("1/16", None)]
    assert [round(x.gain) for x in found] == [30, 30, 40]
    assert all(0 < x.bound < x.gain for x in found)


@pytest.mark.parametrize(
    "other",
    [
        {"model": "pocket_conv", "training": 3},  # another model of one backbone
        {"dtype": "bfloat16", **DENSE},  # another precision than the sparse cells'
        {"data": {"essay": "other"}, **DENSE},
        {"settings": {"pooling": "max"}},
        {"rope": {"factor": 4.0}, **DENSE},
    ],
)
def test_cells_that_do_not_belong_together_give_no_mean(store, other):
    common = {"dtype": "float32", "data": {"essay": "one"}, "settings": {"pooling": "avg"}}
    add_all(store, 4, 7, **common)
    assert len(Results.read(store, {}).draws.groups) == 2
    add(store, "ratplus", "S-1", 5, **common | other)
    with pytest.raises(LeftOut, match=r"would mix .*stage.where={(\w+): ") as error:
        _ = Results.read(store, {}).draws
    name, value = re.search(r"where={(\w+): \"(.*)\"}", str(error.value)).groups()
    assert Results.read(store, {name: value}).draws.groups  # the remedy works


def test_a_setting_chooses_among_accuracies_though_hit_rates_lack_it(store):
    for pooling in ("avg", "max"):
        add_all(store, 4, 7, settings={"pooling": pooling})
    cell = store.cell({**QUEST, "stage": "hit_rate", "task": "S-1", "backbone": "ratplus"})
    with cell.open({}):
        cell.append([{"id": "S-1/0", "values": 1, "hits": [[1]]}])
        cell.finish({"hit_rate": [[100.0]], "values": 1, "budget_measured": 0.1})
    chosen = Results.read(store, {"pooling": "avg"})
    assert len(chosen.draws.groups) == 2 and len(chosen.rates) == 1
    with pytest.raises(ValueError, match="no column 'poling'"):
        Results.read(store, {"poling": "avg"})
