"""Stopping before a loss that explodes reaches the weights."""

from __future__ import annotations

import math
from collections import deque

from ratplus_exp.training.checkpoint import Checkpoints


class LossDiverged(ValueError):
    """The loss is not finite or has jumped; the message names the last good checkpoint."""


class Watch:
    """Looks at every loss and gradient of a training; its memory is part of the checkpoint.

    spike: how many times the mean of the last 100 losses of its kind a loss may be; None: any.
    """

    def __init__(self, spike: float | None, checkpoints: Checkpoints) -> None:
        self.spike, self.checkpoints = spike, checkpoints
        self.recent = {kind: deque[float](maxlen=100) for kind in ("dense", "sparse")}

    def check(self, what: str, value: float, step: int, kind: str | None = None) -> None:
        """Refuse a value that is not finite, or a loss far above the recent ones of its kind."""
        if not math.isfinite(value):
            raise LossDiverged(
                f"the {what} is {value} at step {step}; {self._good()}: lower the learning rate "
                "and run again"
            )
        if kind is None:
            return
        recent = self.recent[kind]
        mean = sum(recent) / max(1, len(recent))
        if self.spike and len(recent) >= 20 and value > self.spike * mean:
            raise LossDiverged(
                f"the {what} rose to {value:.3f} at step {step}, from {mean:.3f} on average; "
                f"{self._good()}: lower the learning rate, or raise optimizer.spike, and run again"
            )
        recent.append(value)

    def state(self) -> dict[str, list[float]]:
        return {kind: list(losses) for kind, losses in self.recent.items()}

    def load(self, state: dict[str, list[float]]) -> None:
        for kind, losses in state.items():
            self.recent[kind] = deque(losses, maxlen=100)

    def _good(self) -> str:
        """In words, also where there is none."""
        if not (kept := self.checkpoints.kept()):
            return "there is no checkpoint yet, so it begins anew"
        newest, *older = reversed(kept)
        text = f"the last good checkpoint is {newest}"
        return text + (f" (delete it to go on from {older[0]})" if older else "")
