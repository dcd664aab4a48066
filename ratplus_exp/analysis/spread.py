"""The spread beside a mean: over trainings, or over seeds where there is one training."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from ratplus_exp.analysis.bootstrap import mean_std

DRAW = ["seed", "selector_seed"]
"""Seeds of samples and of random selection: what one training's mean is taken over."""


class Spread(NamedTuple):
    """std: NaN where there is one value; seeds: the most that a training has."""

    mean: float
    std: float
    trainings: int
    seeds: int


def spread(cells: pd.DataFrame, accuracy: str) -> Spread:
    """Mean and standard deviation of cells that differ in training, seeds and task alone.

    Tasks weigh alike; draws of seeds are averaged within a training. The deviation is over
    trainings, or over the draws where there is one training. A training or a draw that lacks one of
    the frame's tasks does not count.
    """
    tasks = cells["task"].nunique()
    draws: dict[tuple[int, ...], list[float]] = {}
    columns = (cells[name] for name in ("training", *DRAW, accuracy))
    for *draw, value in zip(*columns, strict=True):
        draws.setdefault(tuple(draw), []).append(value)
    trainings: dict[int, list[float]] = {}
    for (training, *_), values in draws.items():
        if len(values) == tasks:
            trainings.setdefault(training, []).append(float(np.mean(values)))
    if not trainings:  # no draw has all tasks
        mean = float(cells.groupby("task")[accuracy].mean().mean())
        return Spread(mean, np.nan, cells["training"].nunique(), len(draws))
    of_each = list(trainings.values())
    means = [float(np.mean(values)) for values in of_each] if len(of_each) > 1 else of_each[0]
    return Spread(*mean_std(means), len(of_each), max(map(len, of_each)))
