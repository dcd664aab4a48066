"""Training: a plain PyTorch loop that knows tokens and losses, not papers."""

from ratplus_exp.training.divergence import LossDiverged
from ratplus_exp.training.loop import Stopped, Trainer
from ratplus_exp.training.settings import Batch, Schedule, TrainSettings

__all__ = ["Batch", "LossDiverged", "Schedule", "Stopped", "TrainSettings", "Trainer"]
