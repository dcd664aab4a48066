"""Analysis: frames of the store's cells in, frames and estimates out; one bootstrap."""

from ratplus_exp.analysis.bootstrap import Bootstrap, Estimate
from ratplus_exp.analysis.frame import BACKBONES, SCORERS, TASKS, accuracies, sample_scores, tidy

__all__ = [
    "BACKBONES",
    "SCORERS",
    "TASKS",
    "Bootstrap",
    "Estimate",
    "accuracies",
    "sample_scores",
    "tidy",
]
