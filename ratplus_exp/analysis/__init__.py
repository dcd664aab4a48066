"""Analysis: frames of the store's cells in, frames and estimates out; one bootstrap."""

from ratplus_exp.analysis.bootstrap import Estimate, difference, mean_std, resample
from ratplus_exp.analysis.frame import (
    BACKBONES,
    SCORERS,
    TASKS,
    accuracies,
    sample_scores,
    select,
    tidy,
)

__all__ = [
    "BACKBONES",
    "SCORERS",
    "TASKS",
    "Estimate",
    "accuracies",
    "difference",
    "mean_std",
    "resample",
    "sample_scores",
    "select",
    "tidy",
]
