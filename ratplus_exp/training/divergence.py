"""Stops a training before an exploding loss reaches the weights."""

from __future__ import annotations

import math
from typing import NoReturn

from ratplus_exp.training.checkpoint import Checkpoints


class LossDiverged(ValueError):
    """The loss is not finite or has jumped; the message names the last good checkpoint."""


class LossMonitor:
    """Checks every loss and gradient norm.

    spike: the largest allowed ratio of a loss to the mean of the last 100 of its kind, "dense" or
        "sparse"; None: any ratio.
    recent: these losses; a part of the checkpoint.
    """

    def __init__(self, spike: float | None, checkpoints: Checkpoints) -> None:
        self.spike, self.checkpoints = spike, checkpoints
        self.recent: dict[str, list[float]] = {"dense": [], "sparse": []}

    def check(self, name: str, value: float, step: int, kind: str | None = None) -> None:
        """LossDiverged if a value is not finite, or far above the recent losses of its kind."""
        if not math.isfinite(value):
            self._stop(f"the {name} is {value} at step {step}", "lower the learning rate")
        if kind is None:
            return
        recent = self.recent[kind]
        mean = sum(recent) / max(1, len(recent))
        if self.spike and len(recent) >= 20 and value > self.spike * mean:
            self._stop(
                f"the {name} rose to {value:.3f} at step {step}, from {mean:.3f} on average",
                "lower the learning rate, or raise optimizer.spike,",
            )
        recent.append(value)
        del recent[:-100]

    def _stop(self, problem: str, remedy: str) -> NoReturn:
        start = "there is no checkpoint yet, so it starts over"
        if kept := self.checkpoints.kept():
            newest, *older = reversed(kept)
            start = f"the last good checkpoint is {newest}"
            start += f" (delete it to resume from {older[0]})" if older else ""
        raise LossDiverged(f"{problem}; {start}: {remedy} and run again")
