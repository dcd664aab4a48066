"""Training: a plain PyTorch loop that knows tokens and losses, not papers."""

from ratplus_exp.training.loop import LossDiverged, Schedule, Trainer, TrainSettings

__all__ = ["LossDiverged", "Schedule", "TrainSettings", "Trainer"]
