"""P2's dilated attention: a fixed pattern, used for joint training and dilated inference."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from ratplus_exp.methods.base import Method


@dataclass(frozen=True)
class Dilated(Method):
    """Query t sees position j <= t when (j + 1) mod D = 0, or t − j <= W, or j < I.

    dilation: D; 0 leaves only the local window and the initial positions, which is how P2 trains
        the attention twin of a jointly trained RAT+.
    local: W, how far back the local window reaches.
    initial: I, the number of initial positions that every query sees.
    """

    dilation: int = 64
    local: int = 64
    initial: int = 1

    def fraction(self, length: int) -> Fraction:
        """1/D, as P2 counts, which leaves the local window and the initial positions out."""
        return Fraction(1, self.dilation) if self.dilation else Fraction(self.local, length)

    def pattern(self, query: Tensor, key: Tensor) -> Tensor:
        seen = (query - key <= self.local) | (key < self.initial)
        if self.dilation:
            seen = seen | ((key + 1) % self.dilation == 0)
        return seen
