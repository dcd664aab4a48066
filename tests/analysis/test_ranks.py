"""One backbone's order of settings and tasks beside the paper's, from made-up samples."""

import numpy as np
import pandas as pd
import pytest

from ratplus_exp.analysis.ranks import rank_agreement

SETTINGS = {("quest", 16, "1/4"): 90, ("quest", 8, "1/8"): 60, ("snapkv", 1024, "1/4"): 40}
TASKS = {"S-1": 8, "MK-1": 0, "MK-3": -6}


def paper():
    return pd.DataFrame(
        [
            {"method": m, "block_size": 64 if m == "quest" else 1, "top_k": k, "budget": b}
            | {"selector": "topk", "task": task, "accuracy": level + shift}
            for (m, k, b), level in SETTINGS.items()
            for task, shift in TASKS.items()
        ]
    )


def samples(right, dense):
    """100 samples a cell, of which right(level, shift) are right, or dense[task] without a method;
    blocks have 16 tokens, and SnapKV keeps 256, as a context of 1024 has it."""
    rows = [
        {"method": m, "block_size": 16 if m == "quest" else 1, "top_k": k if m == "quest" else 256}
        | {"budget": b, "task": task, "hits": right(level, shift)}
        for (m, k, b), level in SETTINGS.items()
        for task, shift in TASKS.items()
    ]
    none = {"method": "dense", "block_size": pd.NA, "top_k": pd.NA, "budget": "1"}
    rows += [none | {"task": task, "hits": n} for task, n in dense.items()]
    return pd.DataFrame(
        row | {"id": f"{row['task']}/{i}", "exact": float(i < row["hits"]), "training": 0}
        for row in rows
        for i in range(100)
    ).assign(selector="topk")


def test_orders_of_settings_and_tasks_beside_the_paper():
    dense = {"S-1": 100, "MK-1": 100, "MK-3": 30}
    frame = samples(lambda level, shift: (130 - level) // 5 + shift, dense)  # settings reversed
    found = rank_agreement(paper(), frame, "exact", n_boot=50)
    # Tasks: of 30 little is lost, so MK-3 comes first of all and S-1 before MK-1.
    assert [(r.over, r.tasks, r.count) for r in found.itertuples(index=False)] == [
        ("settings", ("S-1", "MK-1", "MK-3"), 3),
        ("tasks", ("S-1", "MK-1", "MK-3"), 3),
        ("settings", ("S-1", "MK-1"), 3),
        ("tasks", ("S-1", "MK-1"), 2),
    ]
    np.testing.assert_allclose(found["value"], [-1, -0.5, -1, 1])
    assert (found["low"] <= found["value"]).all() and (found["value"] <= found["high"]).all()


@pytest.mark.parametrize("missing", ["dense", "settings"])
def test_nothing_without_dense_or_settings(missing):
    frame = samples(lambda level, shift: 20, {"S-1": 100})
    frame = frame[(frame["method"] == "dense") == (missing == "settings")]
    assert rank_agreement(paper(), frame, "exact", n_boot=5).empty
