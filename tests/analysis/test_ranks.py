"""One backbone's order of settings and tasks beside the paper's, from made-up samples."""

import numpy as np
import pandas as pd

from ratplus_exp.analysis.bootstrap import Bootstrap
from ratplus_exp.analysis.frame import GROUP
from ratplus_exp.analysis.pattern import rank_agreement

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
        {"method": method, "block_size": 16 if method == "quest" else 1, "budget": budget}
        | {"backbone": "Attention", "selector": "topk", "task": task, "accuracy": level + shift}
        for (method, _, budget), level in SETTINGS.items()
        for task, shift in TASKS.items()
    )


def draws(right, dense):
    """100 samples a cell: right(level, shift) of them are right, dense[task] without a method."""
    cells = [
        (*setting, "topk", task, right(level, shift))
        for setting, level in SETTINGS.items()
        for task, shift in TASKS.items()
    ]
    cells = [(m, 16 if m == "quest" else 1, b, *rest) for m, _, b, *rest in cells]
    cells += [("dense", 1, "1", "dense", task, n) for task, n in dense.items()]
    columns = ["method", "block_size", "budget", "selector", "task", "hits"]
    frame = pd.DataFrame(cells, columns=columns).loc[lambda x: x.index.repeat(100)]
    number = frame.groupby(level=0).cumcount()
    frame = frame.assign(
        id=frame["task"] + number.astype(str), exact=(number < frame["hits"]) * 1.0
    )
    return Bootstrap(frame.assign(training=0, backbone="Attention"), "exact", GROUP, n_boot=50)


def test_orders_of_settings_and_tasks_beside_the_paper():
    dense = dict.fromkeys(TASKS, 100) | {"MK-3": 30}
    reversed_settings = draws(lambda level, shift: (130 - level) // 5 + shift, dense)
    found = rank_agreement(paper(), reversed_settings)
    every, solved = tuple(TASKS), tuple(TASKS)[:-1]
    assert [(r.over, r.tasks, r.count) for r in found.itertuples(index=False)] == [
        ("settings", every, 5),
        ("tasks", every, 6),
        ("settings", solved, 5),
        ("tasks", solved, 5),
    ]
    # Of 30 little is lost, so that MK-3, the paper's last task, comes first and the others follow:
    # 1 − 6 · (5 · 1² + 5²) / (6 · 35).
    np.testing.assert_allclose([rho.value for rho in found["rho"]], [-1, 1 / 7, -1, 1])
    assert all(rho.low <= rho.value <= rho.high for rho in found["rho"])


def test_nothing_without_dense():
    assert rank_agreement(paper(), draws(lambda level, shift: 20, {})).empty
