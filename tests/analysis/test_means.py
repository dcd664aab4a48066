"""Means by selector (H2) and by method from a filled store, against numbers worked out by hand."""

from accuracy_cells import DENSE, add_all

from ratplus_exp.analysis import TASKS
from ratplus_exp.analysis.frame import finished
from ratplus_exp.analysis.means import method_means
from ratplus_exp.report.results import Results
from ratplus_exp.report.tables import methods_table, selector_table


def test_means_by_selector(store):
    for seed, (attention, ratplus) in enumerate(((2, 4), (0, 2))):
        add_all(store, attention, ratplus, n=8, selector="random", selector_seed=seed)
    add_all(store, 4, 4, n=8)
    add_all(store, 6, 6, n=8, selector="oracle")
    add_all(store, 8, 8, n=8, **DENSE)
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


def test_methods_are_averaged_over_the_tasks_that_all_have(store):
    """The caption names the tasks that some method lacks."""
    add_all(store, 4, 7)
    add_all(store, 9, 9, **DENSE)
    add_all(store, 2, 3, method="moba", tasks=TASKS[:-1])
    means, left_out = method_means(finished(store, "eval"), "exact")
    assert left_out == [TASKS[-1]] and set(means["n"]) == {10}
    rows = means.set_index("method")[["Attention", "RAT+"]].round(6).to_dict("index")
    assert rows["quest"] == {"Attention": 40, "RAT+": 70} and rows["moba"]["RAT+"] == 30
    table = methods_table(means, "exact", left_out, [0])
    assert f"(without {TASKS[-1]}, which some methods lack)" in table.caption
    add_all(store, 2, 3, method="moba", tasks=TASKS[-1:])
    means, left_out = method_means(finished(store, "eval"), "exact")
    assert not left_out and "lack" not in methods_table(means, "exact", left_out, [0]).caption
