"""Analysis: frames of the store's cells in, frames and estimates out; one bootstrap."""

from ratplus_exp.analysis.bootstrap import Estimate
from ratplus_exp.analysis.frame import BACKBONES, TASKS, accuracies, sample_scores, tidy

__all__ = ["BACKBONES", "TASKS", "Estimate", "accuracies", "sample_scores", "tidy"]
