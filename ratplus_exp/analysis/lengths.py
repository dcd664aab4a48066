"""Accuracy against the context length."""

from collections.abc import Mapping

import pandas as pd

from ratplus_exp.analysis.bootstrap import Bootstrap, Estimate

LINE = ["backbone", "budget", "method", "blocks"]


def length_curves(draws: Mapping[int, Bootstrap]) -> pd.DataFrame:
    """Means over the tasks that all lengths have, in percent with their 95 % intervals.

    draws: the accuracies of each context length, by `GROUP`. The columns LINE name a line of a
    plot: of a method with blocks, one line has a fixed block size and another a fixed number of
    blocks; a point may be in both. Lines of a single length are left out. n: samples a task.
    """
    tasks = sorted(set.intersection(*(set(x.tasks) for x in draws.values()))) if draws else []
    rows = []
    for length, of_length in draws.items():
        for group in of_length.trainings:
            method, size, budget, selector, backbone = group
            if selector not in ("topk", "dense"):
                continue
            x = Estimate.of(100 * of_length.mean(group, tasks))
            n = min((of_length.count(task, [group]) for task in tasks), default=0)
            names = [f"blocks of {size}", f"{length // size} blocks"] if size > 1 else [""]
            rows += [
                (backbone, budget, method, blocks, length, size, x.value, x.low, x.high, n)
                for blocks in names
            ]
    columns = [*LINE, "length", "block_size", "accuracy", "low", "high", "n"]
    frame = pd.DataFrame(rows, columns=columns).dropna()
    several = frame.groupby(LINE)["length"].transform("nunique") > 1
    return frame[several].sort_values([*LINE, "length"], ignore_index=True)
