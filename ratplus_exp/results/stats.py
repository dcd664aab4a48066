"""Uncertainty of a measured difference: over samples (bootstrap) and over seeds (mean and std)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

RESAMPLES = 10_000
"""Of every bootstrap interval."""


def paired_bootstrap(
    a: pd.Series, b: pd.Series, n_boot: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of a − b with its percentile bootstrap interval, paired by sample.

    Args:
        a, b: scores, in any unit, indexed by sample id; or by (task, id), and then samples are
            drawn again within each task and the statistic is the mean of the tasks' means, as in
            P1's mean over tasks. Samples that only one of the two has are left out.
        n_boot: number of resamples.
        seed: of the generator made here; the same inputs give the same interval.
        level: of the two-sided interval.

    Returns:
        (difference, low, high) in the unit of the scores.

    Raises:
        ValueError: a and b share no sample, or have tasks that the other one lacks.
    """
    assert a.index.is_unique and b.index.is_unique, "one score a sample"
    difference = (a - b).dropna()
    tasks = _strata(difference)
    if not tasks or not len(tasks) == len(_strata(a)) == len(_strata(b)):
        raise ValueError(
            "paired_bootstrap needs samples with the same id on both sides, in every task; "
            "evaluate both on the same task, seed and n"
        )
    generator = np.random.default_rng(seed)
    resampled = np.zeros(n_boot)
    for scores in tasks:
        # Scores take few distinct values (0, 1/4, … 1), so drawing how often each one occurs is
        # the same resampling as drawing samples, in a fraction of the time.
        values, counts = np.unique(scores, return_counts=True)
        n = len(scores)
        resampled += generator.multinomial(n, counts / n, size=n_boot) @ values / n
    low, high = np.quantile(resampled / len(tasks), ((1 - level) / 2, (1 + level) / 2))
    return float(np.mean([scores.mean() for scores in tasks])), float(low), float(high)


def mean_std(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n − 1) over seeds; the deviation of one seed is NaN."""
    array = np.asarray(list(values), dtype=float)
    assert array.size, "mean_std of no value"
    return float(array.mean()), float(array.std(ddof=1)) if array.size > 1 else float("nan")


def _strata(scores: pd.Series) -> list[np.ndarray]:
    """One array of scores a task; a plain index is one task."""
    if scores.empty:
        return []
    if scores.index.nlevels == 1:
        return [scores.to_numpy()]
    return [group.to_numpy() for _, group in scores.groupby(level=0, sort=True)]


def resamplings(n: int, n_boot: int, generator: np.random.Generator) -> np.ndarray:
    """Bootstrap weights (n_boot + 1, n) of n samples: how often each one is drawn, over n.

    Row 0 has every sample once, so that `weights @ scores` is the estimate, then its resamplings.
    """
    draws = generator.multinomial(n, np.full(n, 1 / n), size=n_boot)
    return np.concatenate((np.ones((1, n)), draws)) / n


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % percentile interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, resampled: np.ndarray) -> Estimate:
        """From (n_boot + 1,): the estimate, then its resamplings; NaN resamplings are left out."""
        rest = resampled[1:][np.isfinite(resampled[1:])]
        low, high = np.quantile(rest, (0.025, 0.975)) if len(rest) else (np.nan, np.nan)
        return cls(float(resampled[0]), float(low), float(high))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's, of each row of a (R, S) with b (S,) or with the same row of b (R, S).

    Ties share their mean rank; NaN where one side is constant.
    """
    ranks = [pd.DataFrame(np.atleast_2d(x)).rank(axis=1).to_numpy() for x in (a, b)]
    first, second = (x - x.mean(axis=1, keepdims=True) for x in ranks)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.sqrt((first**2).sum(1) * (second**2).sum(1))
        return (first * second).sum(1) / scale
