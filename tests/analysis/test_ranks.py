"""One backbone's order of settings and tasks beside the paper's, from made-up samples."""

import numpy as np
import pandas as pd
import pytest

from ratplus_exp.analysis.ranks import rank_agreement

SETTINGS = {
    ("quest", 16, "1/4"): 90,
    ("quest", 8, "1/8"): 60,
    ("snapkv", 1024, "1/4"): 40,
    ("snapkv", 512, "1/8"): 30,
    ("snapkv", 256, "1/16"): 20,
}
TASKS = {"S-1": 8, "S-2": 6, "MK-1": 4, "MV": 2, "MQ": 0, "MK-3": -6}


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
        {
            "method": m,
            "block_size": 16 if m == "quest" else 1,
            "top_k": k if m == "quest" else k // 4,
        }
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
    dense = dict.fromkeys(TASKS, 100) | {"MK-3": 30}
    frame = samples(lambda level, shift: (130 - level) // 5 + shift, dense)  # settings reversed
    found = rank_agreement(paper(), frame, "exact", n_boot=50)
    every, solved = tuple(TASKS), tuple(TASKS)[:-1]
    assert [(r.over, r.tasks, r.count) for r in found.itertuples(index=False)] == [
        ("settings", every, 5),
        ("tasks", every, 6),
        ("settings", solved, 5),
        ("tasks", solved, 5),
    ]
    # Of 30 little is lost, so that MK-3, the paper's last task, comes first and the others follow:
    # 1 − 6 · (5 · 1² + 5²) / (6 · 35).
    np.testing.assert_allclose(found["value"], [-1, 1 / 7, -1, 1])
    assert (found["low"] <= found["value"]).all() and (found["value"] <= found["high"]).all()


@pytest.mark.parametrize("missing", ["dense", "settings"])
def test_nothing_without_dense_or_settings(missing):
    frame = samples(lambda level, shift: 20, {"S-1": 100})
    frame = frame[(frame["method"] == "dense") == (missing == "settings")]
    assert rank_agreement(paper(), frame, "exact", n_boot=5).empty
