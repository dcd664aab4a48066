"""The paper's numbers against its own text."""

from ratplus_exp.analysis import BACKBONES, TASKS
from ratplus_exp.report import paper_tables


def test_snapkv_gains_of_table_3_are_those_of_the_introduction():
    snapkv = paper_tables("table3").query("method == 'snapkv'")
    means = snapkv.pivot_table("accuracy", "budget", "backbone")
    gains = (means["RAT+"] - means["Attention"]).round(2)
    assert gains["1/4"] == 34.11 and gains["1/8"] == 40.03


def test_paper_tables_are_whole_and_say_what_was_inferred():
    frame = paper_tables()
    sizes = {"table2": 20, "table3": 192, "table4": 192, "table5": 48}
    assert frame.groupby("table").size().to_dict() == sizes
    assert set(frame["backbone"]) == set(BACKBONES) and set(frame["task"]) == set(TASKS)
    assert set(frame["budget"]) == {"1/4", "1/8", "1/16", "1/64"}
    assert set(frame.loc[frame["inferred"], "table"]) == {"table2", "table5"}
    assert frame["inferred"].sum() == 68
    assert frame["std"].notna().equals(frame["inferred"])
    assert frame["accuracy"].between(0, 100).all()
