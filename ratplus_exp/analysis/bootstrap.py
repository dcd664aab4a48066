"""The bootstrap behind every interval: over trainings and, within each task, over samples.

A resample draws trainings with replacement and, within each task, samples with replacement. Means
over the same samples share their draws, and groups with the same trainings share the draw of
trainings, so differences are paired by prompt and by training. Groups with different trainings draw
them independently.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

RESAMPLES = 10_000
Group = tuple[Any, ...]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % percentile interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, resampled: np.ndarray, level: float = 0.95) -> Estimate:
        """From (n_boot + 1,): the estimate, then its resamples; NaN resamples are left out."""
        rest = resampled[1:][np.isfinite(resampled[1:])]
        ends = ((1 - level) / 2, (1 + level) / 2)
        low, high = np.quantile(rest, ends) if len(rest) else (np.nan, np.nan)
        return cls(float(resampled[0]), float(low), float(high))


class Bootstrap:
    """Resampled means of groups of samples; each is (n_boot + 1,), the estimate first.

    Args:
        samples: rows with task, id, training, score and the columns `by`, whose values name a
            group. Several rows of one sample, training and group (seeds of a random selector) are
            averaged.
    """

    def __init__(
        self,
        samples: pd.DataFrame,
        score: str,
        by: Sequence[str],
        n_boot: int = RESAMPLES,
        seed: int = 0,
    ) -> None:
        self.n_boot, self.seed = n_boot, seed
        columns = [*by, "training"]
        rows = samples[["task", "id", *columns, score]]
        self._scores: dict[str, np.ndarray] = {}  # of a task: (samples, columns)
        self._columns: dict[str, dict[Group, list[tuple[int, int]]]] = {}
        for task, here in rows.groupby("task", sort=False):
            wide = here.pivot_table(
                index="id", columns=columns, values=score, aggfunc="mean", sort=False
            )
            self._scores[task] = wide.to_numpy()
            self._columns[task] = {}
            for i, (*group, training) in enumerate(wide.columns):
                self._columns[task].setdefault(tuple(group), []).append((i, training))
        self.tasks = tuple(self._scores)
        numbers: dict[Group, set[int]] = {}
        for *group, training in rows[columns].drop_duplicates().itertuples(index=False, name=None):
            numbers.setdefault(tuple(group), set()).add(training)
        self.trainings = {group: sorted(drawn) for group, drawn in numbers.items()}
        self._cache: dict[tuple[str, bytes], np.ndarray] = {}

    def count(self, task: str, groups: Iterable[Group]) -> int:
        """Samples of a task that all trainings of all groups have."""
        return int(self._common(task, groups).sum())

    def mean(
        self, group: Group, tasks: Iterable[str] | None = None, among: Iterable[Group] = ()
    ) -> np.ndarray:
        """(n_boot + 1,): the mean over trainings, samples and tasks (default: all), tasks weighing
        alike, in the unit of the score; NaN where the group lacks a task.

        among: count only the samples that these groups have, too.
        """
        wanted = self.tasks if tasks is None else tuple(tasks)
        groups = {group, *among}
        means = [self._of_task(group, task, groups) for task in wanted]
        return np.mean(means, axis=0) if means else np.full(self.n_boot + 1, np.nan)

    def gain(self, first: Group, second: Group, tasks: Iterable[str] | None = None) -> Estimate:
        """The first group minus the second in points, over the samples that both have."""
        wanted = self.tasks if tasks is None else tuple(tasks)
        a, b = (self.mean(x, wanted, (first, second)) for x in (first, second))
        return Estimate.of(100 * (a - b))

    def _common(self, task: str, groups: Iterable[Group]) -> np.ndarray:
        """Which rows of a task's samples all groups have; none if a group lacks the task."""
        scores = self._scores.get(task, np.empty((0, 0)))
        common = np.full(len(scores), True)
        for group in groups:
            mine = [i for i, _ in self._columns.get(task, {}).get(group, ())]
            common &= bool(mine) & ~np.isnan(scores[:, mine]).any(axis=1)
        return common

    def _of_task(self, group: Group, task: str, groups: Iterable[Group]) -> np.ndarray:
        rows = self._common(task, groups)
        if not rows.any():
            return np.full(self.n_boot + 1, np.nan)
        key = (task, rows.tobytes())
        if key not in self._cache:  # of all columns at once; NaN where one lacks some of the rows
            counts = sample_counts(task, int(rows.sum()), self.n_boot, self.seed)
            self._cache[key] = counts @ self._scores[task][rows] / rows.sum()
        mine, numbers = zip(*self._columns[task][group], strict=True)
        means = self._cache[key][:, list(mine)]
        return over_trainings(means, numbers, self.trainings[group], self.seed)


def sample_counts(task: str, n: int, n_boot: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often a resample draws each of a task's n samples: (n_boot + 1, n), float64.

    Row 0 has every sample once, so that `counts @ scores / n` is the estimate, then its resamples.
    A task, n and seed always have the same draws.
    """
    return _draws(n, n_boot, (seed, *task.encode())).astype(float)


def over_trainings(
    means: np.ndarray, numbers: Sequence[int], drawn: Iterable[int], seed: int = 0
) -> np.ndarray:
    """The mean over trainings in every resample of them.

    Args:
        means: (n_boot + 1, trainings, …), of the trainings `numbers`.
        drawn: the trainings that are drawn from; where `numbers` lacks some of them, the mean is
            over the others, NaN in a resample without any.
    """
    order = sorted(drawn)
    counts = _draws(len(order), len(means) - 1, (seed, len(order), *order))
    weights = counts[:, [order.index(n) for n in numbers]] / len(order)
    with np.errstate(invalid="ignore"):
        weights = weights / weights.sum(axis=1, keepdims=True)
    return np.einsum("rt,rt...->r...", weights, means)


@lru_cache(maxsize=24)
def _draws(n: int, n_boot: int, entropy: tuple[int, ...]) -> np.ndarray:
    assert 0 < n < 1 << 16
    generator = np.random.default_rng(entropy)
    draws = generator.multinomial(n, np.full(n, 1 / n), size=n_boot).astype(np.uint16)
    return np.concatenate((np.ones((1, n), np.uint16), draws))


class Spread(NamedTuple):
    """A mean and its standard deviation (n − 1; NaN of one value); seeds: the most per training."""

    mean: float
    std: float
    trainings: int
    seeds: int


def spread(cells: pd.DataFrame, accuracy: str) -> Spread:
    """Of cells that differ in training, seed, selector seed and task alone; tasks weigh alike.

    The deviation is over trainings, seeds averaged, or over the seeds where there is one training.
    A training or a seed that lacks one of the frame's tasks does not count.
    """
    by_seed = cells.groupby(["training", "seed", "selector_seed"])[accuracy].agg(["mean", "size"])
    whole = by_seed.loc[by_seed["size"] == cells["task"].nunique(), "mean"]
    if whole.empty:
        mean = cells.groupby("task")[accuracy].mean().mean()
        return Spread(float(mean), np.nan, cells["training"].nunique(), len(by_seed))
    of_training = whole.groupby("training")
    values = of_training.mean() if of_training.ngroups > 1 else whole
    deviation = float(values.std())
    return Spread(float(values.mean()), deviation, of_training.ngroups, of_training.size().max())


def rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's, of each row of a (R, S) with b (S,) or with the same row of b (R, S).

    Ties share their mean rank; NaN where one side is constant.
    """
    ranks = [pd.DataFrame(np.atleast_2d(x)).rank(axis=1).to_numpy() for x in (a, b)]
    first, second = (x - x.mean(axis=1, keepdims=True) for x in ranks)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.sqrt((first**2).sum(1) * (second**2).sum(1))
        return (first * second).sum(1) / scale
