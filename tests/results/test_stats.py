"""Statistics against brute force, and the paper's numbers against its own text."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from ratplus_exp.results import mean_std, paired_bootstrap, paper_means, paper_tables
from ratplus_exp.results.paper import BACKBONES, TASKS


def scores(values: dict) -> pd.Series:
    return pd.Series(values, dtype=float)


def test_interval_is_that_of_all_possible_resamples():
    generator = np.random.default_rng(1)
    sizes = {"S-1": 4, "MQ": 5}
    index = [(task, i) for task, n in sizes.items() for i in range(n)]
    a = scores({key: generator.normal() for key in index})
    b = scores({key: generator.normal() for key in index})
    means = []  # of every way to draw n of n samples, a task each
    for task in sizes:
        d = (a - b)[task].to_numpy()
        means.append([np.mean(draw) for draw in itertools.product(d, repeat=len(d))])
    every = np.add.outer(*map(np.array, means)).ravel() / 2

    difference, low, high = paired_bootstrap(a, b, n_boot=200_000)
    assert difference == pytest.approx(every.mean())
    assert (low, high) == pytest.approx(tuple(np.quantile(every, (0.025, 0.975))), abs=0.02)


def test_tasks_weigh_alike_whatever_their_size():
    a = scores({("S-1", i): 1.0 for i in range(10)} | {("MQ", 0): 0.0})
    assert paired_bootstrap(a, a * 0)[0] == 0.5


def test_pairs_by_id_and_drops_what_has_no_partner():
    a = scores({"x": 1, "y": 0, "z": 1, "only a": 1})
    b = scores({"z": 1, "only b": 0, "y": 0, "x": 1})
    assert paired_bootstrap(a, b) == (0.0, 0.0, 0.0)


def test_same_inputs_same_interval():
    generator = np.random.default_rng(0)
    a, b = (scores(dict(enumerate(generator.integers(0, 2, 50)))) for _ in "ab")
    assert paired_bootstrap(a, b) == paired_bootstrap(a, b)
    assert paired_bootstrap(a, b) != paired_bootstrap(a, b, seed=1)


def test_nothing_to_pair_is_an_error():
    for a, b in [
        ({"x": 1}, {"y": 1}),
        ({("S-1", "x"): 1}, {("MQ", "x"): 1}),
        ({("S-1", "x"): 1, ("MQ", "y"): 1}, {("S-1", "x"): 1}),
    ]:
        with pytest.raises(ValueError, match="same id"):
            paired_bootstrap(scores(a), scores(b))


def test_mean_std_over_seeds():
    assert mean_std([1.0, 2.0, 3.0]) == (2.0, 1.0)
    mean, std = mean_std([4.0])
    assert mean == 4.0 and np.isnan(std)


def test_snapkv_gains_of_table_3_are_those_of_the_introduction():
    snapkv = paper_means("table3").query("method == 'snapkv'").set_index("budget")["gain"]
    assert round(snapkv["1/4"], 2) == 34.11
    assert round(snapkv["1/8"], 2) == 40.03


def test_paper_tables_are_whole_and_say_what_was_inferred():
    frame = paper_tables()
    assert frame.groupby("table").size().to_dict() == {
        "table2": 20,
        "table3": 192,
        "table4": 192,
        "table5": 48,
    }
    assert set(frame["backbone"]) == set(BACKBONES) and set(frame["task"]) == set(TASKS)
    assert set(frame["budget"]) == {"1/4", "1/8", "1/16", "1/64"}
    assert set(frame.loc[frame["inferred"], "table"]) == {"table2", "table5"}
    assert frame["inferred"].sum() == 68
    assert frame["std"].notna().equals(frame["inferred"])
    assert frame["accuracy"].between(0, 100).all()


def test_an_unknown_paper_table_is_an_error():
    with pytest.raises(ValueError, match="choose one of table2"):
        paper_means("table9")
