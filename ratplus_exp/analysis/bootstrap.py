"""The bootstrap of every interval: over trainings and, within each task, over samples.

A resampling draws trainings with replacement, and within each task samples with replacement. All
settings and backbones share the draws of a task's samples, and all that have the same trainings
share the draw of trainings, so that differences are paired by prompt and by training. Where one
side has other trainings than the other, they are drawn independently.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

RESAMPLES = 10_000
"""Of every bootstrap interval."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % percentile interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, resampled: np.ndarray, level: float = 0.95) -> Estimate:
        """From (n_boot + 1,): the estimate, then its resamplings; NaN resamplings are left out."""
        rest = resampled[1:][np.isfinite(resampled[1:])]
        ends = ((1 - level) / 2, (1 + level) / 2)
        low, high = np.quantile(rest, ends) if len(rest) else (np.nan, np.nan)
        return cls(float(resampled[0]), float(low), float(high))


def sample_counts(task: str, n: int, n_boot: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often a resampling draws each of a task's n samples: (n_boot + 1, n), float64.

    Row 0 has every sample once, so that `counts @ scores / n` is the estimate, then its
    resamplings. A task, n and seed always have the same draws.
    """
    return _draws(n, n_boot, (seed, *task.encode())).astype(float)


def training_weights(
    trainings: Iterable[int], n_boot: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """The weight of each training in a resampling: (n_boot + 1, trainings), rows that sum to 1."""
    numbers = sorted(trainings)
    return _draws(len(numbers), n_boot, (seed, len(numbers), *numbers)) / len(numbers)


@lru_cache(maxsize=24)
def _draws(n: int, n_boot: int, entropy: tuple[int, ...]) -> np.ndarray:
    assert 0 < n < 1 << 16
    generator = np.random.default_rng(entropy)
    draws = generator.multinomial(n, np.full(n, 1 / n), size=n_boot).astype(np.uint16)
    return np.concatenate((np.ones((1, n), np.uint16), draws))


@dataclass(frozen=True)
class Resampled:
    """Means of groups of samples, and their resamplings.

    Attributes:
        tasks: of `values`, in order.
        groups: the index in `values` of each group, a tuple of the values of the columns `by`.
        values: (n_boot + 1, tasks, groups) in the unit of the scores, over trainings; NaN where
            nothing was measured.
        counts: (tasks, groups), the distinct samples of a mean.
    """

    tasks: tuple[str, ...]
    groups: dict[tuple[Any, ...], int]
    values: np.ndarray
    counts: np.ndarray

    def mean(self, group: tuple[Any, ...], tasks: Iterable[str] | None = None) -> np.ndarray:
        """(n_boot + 1,): the mean over tasks (default: all here), each weighing alike; NaN where
        the group lacks one of them."""
        wanted = self.tasks if tasks is None else tuple(tasks)
        if group not in self.groups or not wanted or not set(wanted) <= set(self.tasks):
            return np.full(len(self.values), np.nan)
        places = [self.tasks.index(task) for task in wanted]
        return self.values[:, places, self.groups[group]].mean(axis=1)


def resample(
    samples: pd.DataFrame,
    score: str,
    by: Sequence[str],
    shared: bool = False,
    n_boot: int = RESAMPLES,
    seed: int = 0,
) -> Resampled:
    """The means of the groups of `samples`, resampled over trainings and samples.

    Args:
        samples: rows with task, id, training, score and the columns `by`; several rows of one
            sample, training and group (seeds of a random selector) are averaged.
        shared: count only the samples that all groups of a task have.
    """
    groups = {g if isinstance(g, tuple) else (g,): i for i, g in enumerate(_unique(samples, by))}
    tasks = tuple(dict.fromkeys(samples["task"]))
    values = np.full((n_boot + 1, len(tasks), len(groups)), np.nan)
    counts = np.zeros((len(tasks), len(groups)), int)
    trainings = {
        g if isinstance(g, tuple) else (g,): tuple(sorted(set(here["training"])))
        for g, here in samples.groupby(list(by), sort=False, dropna=False)
    }
    columns = [*by, "training"]
    for t, task in enumerate(tasks):
        wide = samples[samples["task"] == task].pivot_table(
            index="id", columns=columns, values=score, aggfunc="mean", sort=False
        )
        wide = wide.dropna() if shared else wide
        if wide.empty:
            continue
        draws = sample_counts(task, len(wide), n_boot, seed)
        with np.errstate(invalid="ignore"):  # of no sample at all
            means = draws @ wide.fillna(0).to_numpy() / (draws @ wide.notna().to_numpy())
        labels = [label[:-1] for label in wide.columns]
        for group in dict.fromkeys(labels):
            mine = [i for i, label in enumerate(labels) if label == group]
            numbers = [wide.columns[i][-1] for i in mine]
            own = over_trainings(means[:, mine], numbers, trainings[group], seed)
            values[:, t, groups[group]] = own
            counts[t, groups[group]] = wide.iloc[:, mine].notna().any(axis=1).sum()
    return Resampled(tasks, groups, values, counts)


def over_trainings(
    means: np.ndarray, numbers: Sequence[int], drawn: Sequence[int], seed: int = 0
) -> np.ndarray:
    """The mean over trainings in every resampling of them.

    Args:
        means: (n_boot + 1, trainings, …), of the trainings `numbers`.
        drawn: the trainings that are drawn from; where `numbers` lacks some of them, the mean is
            over the others, NaN in a resampling without any.
    """
    order = sorted(drawn)
    weights = training_weights(order, len(means) - 1, seed)[:, [order.index(n) for n in numbers]]
    with np.errstate(invalid="ignore"):
        weights = weights / weights.sum(axis=1, keepdims=True)
    return np.einsum("rt,rt...->r...", weights, means)


def _unique(samples: pd.DataFrame, by: Sequence[str]) -> list[Any]:
    frame = samples[list(by)].drop_duplicates()
    return [tuple(row) for row in frame.itertuples(index=False, name=None)]


def difference(
    samples: pd.DataFrame,
    score: str,
    column: str,
    sides: tuple[str, str],
    tasks: Iterable[str],
    n_boot: int = RESAMPLES,
) -> Estimate:
    """The first side minus the second one in points, on the mean of `tasks`, over the samples that
    both have; NaN where a side lacks one of the tasks, or the two share no sample of it.

    Args:
        column: of `samples`, which says whose side a row is on.
    """
    wanted = tuple(tasks)
    here = samples[samples["task"].isin(wanted) & samples[column].isin(sides)]
    found = resample(here, score, [column], shared=True, n_boot=n_boot)
    first, second = (found.mean((side,), wanted) for side in sides)
    return Estimate.of(100 * (first - second))


def mean_std(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n − 1); the deviation of one value is NaN."""
    array = np.asarray(list(values), dtype=float)
    assert array.size, "mean_std of no value"
    return float(array.mean()), float(array.std(ddof=1)) if array.size > 1 else float("nan")


def rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's, of each row of a (R, S) with b (S,) or with the same row of b (R, S).

    Ties share their mean rank; NaN where one side is constant.
    """
    ranks = [pd.DataFrame(np.atleast_2d(x)).rank(axis=1).to_numpy() for x in (a, b)]
    first, second = (x - x.mean(axis=1, keepdims=True) for x in ranks)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.sqrt((first**2).sum(1) * (second**2).sum(1))
        return (first * second).sum(1) / scale
