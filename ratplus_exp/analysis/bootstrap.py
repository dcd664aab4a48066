"""The resamples of all intervals: over samples, within each task, and over trainings.

Samples are drawn with replacement. Trainings are too few for that: of three, the lowest and the
highest would be the ends of a 95 % interval, which then covers 75 %. Their mean is moved by its
standard error times a draw from Student's distribution instead. Groups with the same samples or
trainings share these draws, so differences are paired by prompt and training. A training that one
of two groups lacks does not count in their difference.
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
        """From (n_boot + 1,): the estimate, then its resamples, of which NaN is ignored."""
        finite = resampled[1:][np.isfinite(resampled[1:])]
        ends = ((1 - level) / 2, (1 + level) / 2)
        low, high = np.quantile(finite, ends) if len(finite) else (np.nan, np.nan)
        return cls(float(resampled[0]), float(low), float(high))


class Bootstrap:
    """Resampled means of groups of samples; each is (n_boot + 1,), the estimate first.

    samples: rows with task, id, training, score and the columns `by`, whose values are a group.
        Rows of one sample, training and group (seeds of a random selector) are averaged.
    """

    def __init__(
        self, samples: pd.DataFrame, score: str, by: Sequence[str], n_boot: int = RESAMPLES
    ) -> None:
        self.n_boot = n_boot
        columns = [*by, "training"]
        rows = samples[["task", "id", *columns, score]]
        self._scores: dict[str, np.ndarray] = {}  # of a task: (samples, columns)
        self._columns: dict[str, dict[Group, list[tuple[int, int]]]] = {}
        for task, of_task in rows.groupby("task", sort=False):
            wide = of_task.pivot_table(score, "id", columns, aggfunc="mean", sort=False)
            self._scores[task] = wide.to_numpy()
            self._columns[task] = {}
            for i, (*group, training) in enumerate(wide.columns):
                self._columns[task].setdefault(tuple(group), []).append((i, training))
        self.tasks = tuple(self._scores)
        groups = rows.sort_values("training", kind="stable")[[*by]].drop_duplicates()
        self.groups = [*groups.itertuples(index=False, name=None)]
        self._cache: dict[tuple[str, bytes], np.ndarray] = {}

    def count(self, task: str, groups: Iterable[Group]) -> int:
        """The number of a task's samples that the groups share in all their common trainings."""
        groups = set(groups)
        return int(self._common(task, groups, self._trainings([task], groups)).sum())

    def mean(
        self, group: Group, tasks: Iterable[str] | None = None, among: Iterable[Group] = ()
    ) -> np.ndarray:
        """(n_boot + 1,): the mean over trainings, samples and tasks (default: all), in the unit
        of the score; NaN if the group lacks a task. A training without one of the tasks is left
        out.

        among: use only the samples and trainings that these groups have as well.
        """
        groups = {group, *among}
        tasks = self.tasks if tasks is None else tuple(tasks)
        trainings = self._trainings(tasks, groups)
        means = [self._of_task(group, task, groups, trainings) for task in tasks]
        return np.mean(means, axis=0) if means else np.full(self.n_boot + 1, np.nan)

    def gain(self, first: Group, second: Group, tasks: Iterable[str] | None = None) -> Estimate:
        """The first group minus the second in points, over the samples and trainings of both."""
        tasks = self.tasks if tasks is None else tuple(tasks)
        a, b = (self.mean(x, tasks, (first, second)) for x in (first, second))
        return Estimate.of(100 * (a - b))

    def _trainings(self, tasks: Iterable[str], groups: Iterable[Group]) -> set[int]:
        """The trainings that all groups have in all tasks."""
        columns = [self._columns.get(t, {}).get(g, ()) for t in tasks for g in groups]
        numbers = [{number for _, number in x} for x in columns]
        return set.intersection(*numbers) if numbers else set()

    def _common(self, task: str, groups: Iterable[Group], trainings: set[int]) -> np.ndarray:
        """Which rows of a task's samples all groups have in these trainings; none without any."""
        scores = self._scores.get(task, np.empty((0, 0)))
        common = np.full(len(scores), bool(trainings))
        for group in groups if trainings else ():
            columns = [i for i, number in self._columns[task][group] if number in trainings]
            common &= ~np.isnan(scores[:, columns]).any(axis=1)
        return common

    def _of_task(
        self, group: Group, task: str, groups: Iterable[Group], trainings: set[int]
    ) -> np.ndarray:
        rows = self._common(task, groups, trainings)
        if not rows.any():
            return np.full(self.n_boot + 1, np.nan)
        key = (task, rows.tobytes())
        if key not in self._cache:  # all columns together; NaN if a column lacks some of the rows
            counts = sample_counts(task, int(rows.sum()), self.n_boot)
            self._cache[key] = counts @ self._scores[task][rows] / rows.sum()
        kept = [x for x in self._columns[task][group] if x[1] in trainings]
        columns, numbers = zip(*kept, strict=True)
        return over_trainings(self._cache[key][:, list(columns)], numbers)


def sample_counts(task: str, n: int, n_boot: int = RESAMPLES) -> np.ndarray:
    """How often a resample draws each of a task's n samples: (n_boot + 1, n), float64.

    Row 0 has every sample once: `counts @ scores / n` is the estimate, then its resamples. The
    draws are a function of task and n.
    """
    return _small_counts(task, n, n_boot).astype(float)


@lru_cache(maxsize=24)
def _small_counts(task: str, n: int, n_boot: int) -> np.ndarray:
    assert 0 < n < 1 << 16
    generator = np.random.default_rng((0, *task.encode()))
    draws = generator.multinomial(n, np.full(n, 1 / n), size=n_boot).astype(np.uint16)
    return np.concatenate((np.ones((1, n), np.uint16), draws))


def over_trainings(means: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
    """The mean over trainings in every resample of them.

    means: (n_boot + 1, trainings, …), of the trainings `numbers`.
    """
    weights = _training_weights(tuple(numbers), len(means) - 1)
    return np.einsum("rt,rt...->r...", weights, means)


@lru_cache(maxsize=24)
def _training_weights(numbers: tuple[int, ...], n_boot: int) -> np.ndarray:
    """(n_boot + 1, trainings), rows of sum 1, the first one uniform: means of T values weighted by
    the others deviate from the plain mean by t(T − 1) times its standard error."""
    count = len(numbers)
    weights = np.full((n_boot + 1, count), 1 / count)
    if count > 1:
        normal = [np.random.default_rng((1, number)).standard_normal(n_boot) for number in numbers]
        deviations = np.stack(normal, axis=1) - np.mean(normal, axis=0)[:, None]
        squares = np.random.default_rng((2, *sorted(numbers))).chisquare(count - 1, (n_boot, 1))
        weights[1:] += deviations / np.sqrt(count * squares)
    return weights


class Spread(NamedTuple):
    """A mean and its standard deviation (n − 1; NaN of one value); seeds: the most per training."""

    mean: float
    std: float
    trainings: int
    seeds: int


def spread(cells: pd.DataFrame, accuracy: str) -> Spread:
    """Of cells that differ in training, seed, selector seed and task; tasks have equal weight.

    The deviation is over trainings, seeds averaged, or over the seeds of a single training. A
    training or a seed that lacks one of the frame's tasks does not count.
    """
    by_seed = cells.groupby(["training", "seed", "selector_seed"])[accuracy].agg(["mean", "size"])
    complete = by_seed.loc[by_seed["size"] == cells["task"].nunique(), "mean"]
    if complete.empty:
        mean = cells.groupby("task")[accuracy].mean().mean()
        return Spread(float(mean), np.nan, cells["training"].nunique(), len(by_seed))
    of_training = complete.groupby("training")
    values = of_training.mean() if of_training.ngroups > 1 else complete
    deviation = float(values.std())
    return Spread(float(values.mean()), deviation, of_training.ngroups, of_training.size().max())


def rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's, of each row of a (R, S) with b (S,) or with the same row of b (R, S); ties have
    their mean rank; NaN if one side is constant."""
    first, second = (pd.DataFrame(np.broadcast_to(x, a.shape)).rank(axis=1) for x in (a, b))
    return first.corrwith(second, axis=1).to_numpy()
