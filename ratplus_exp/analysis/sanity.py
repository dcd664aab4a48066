"""What should make a reader doubt a result: checks that published tables rarely come with."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd

from ratplus_exp.analysis.bootstrap import Estimate, Resampled, resample
from ratplus_exp.analysis.frame import TASKS
from ratplus_exp.budget import Budget

LEVEL = 0.999
"""Of the one-sided bootstrap bound beyond which a difference is no noise: a report makes some two
hundred comparisons."""
FEWEST = 20
"""Samples of a task without which nothing is said."""

Setting = tuple[str, str, int, str]
"""Backbone, method, block size (0: it has none), budget."""


class Doubt(NamedTuple):
    """A setting that is better, beyond noise, than one that knows more.

    than: the budget of the other setting, "dense" for dense attention.
    task: None for the mean over the tasks.
    gain, bound: points, and their one-sided lower bound.
    """

    setting: Setting
    than: str
    task: str | None
    gain: float
    bound: float


def doubts(samples: pd.DataFrame, score: str) -> list[Doubt]:
    """Sparse attention better than dense, which is badly trained then, or the sparse run sees
    something that it shouldn't; and, on the mean of the tasks, a smaller budget better than a
    larger one at the same method and block size.

    Args:
        samples: rows of `sample_scores` to check, one model a backbone; score: their column.
    """
    place = ["backbone", "method", "block_size", "budget"]
    chosen = samples[samples["task"].isin(TASKS) & (samples["selector"] == "topk")]
    chosen = chosen.assign(block_size=chosen["block_size"].fillna(0))
    found = resample(chosen, score, place)
    dense = {group[0]: group for group in found.groups if group[1] == "dense"}
    sparse = [group for group in found.groups if group[1] != "dense"]
    results = []
    for group in sparse:
        for task in (None, *TASKS) if group[0] in dense else ():
            x = _gain(found, group, dense[group[0]], TASKS if task is None else (task,))
            if x.low > 0:
                results.append(Doubt(group, "dense", task, x.value, x.low))
    for start in dict.fromkeys(group[:3] for group in sparse):
        budgets = [group[3] for group in sparse if group[:3] == start]
        for small, large in pairwise(sorted(budgets, key=lambda b: Budget.parse(b).fraction)):
            x = _gain(found, (*start, small), (*start, large), TASKS)
            if x.low > 0:
                results.append(Doubt((*start, small), large, None, x.value, x.low))
    return results


def _gain(found: Resampled, a: Setting, b: Setting, tasks: tuple[str, ...]) -> Estimate:
    """Mean of a − b in points over the tasks that both have; NaN where there is none."""
    sides = [found.groups[a], found.groups[b]]
    enough = found.counts[:, sides].min(axis=1)
    shared = [t for t, n in zip(found.tasks, enough, strict=True) if n >= FEWEST and t in tasks]
    difference = found.mean(a, shared) - found.mean(b, shared)
    return Estimate.of(100 * np.asarray(difference), level=2 * LEVEL - 1)


def cut_prompts(samples: pd.DataFrame) -> dict[str, int]:
    """How many prompts of a cell leave no room for their answer: they were cut, or will be."""
    counts = samples.groupby("cell")["cut"].sum()
    return {str(cell): int(count) for cell, count in counts[counts > 0].items()}
