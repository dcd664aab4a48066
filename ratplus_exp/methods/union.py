"""The union of a selection and a dilated pattern."""

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Self

from torch import Tensor

from ratplus_exp.budget import Budget
from ratplus_exp.methods.base import BlockMethod
from ratplus_exp.methods.moba import MoBA
from ratplus_exp.methods.quest import Quest
from ratplus_exp.settings import Positive


@dataclass(frozen=True)
class WithDilation(BlockMethod):
    """Every D-th token and the selected blocks; both count within the budget.

    P2's setting is D = 64 and 8 blocks of 64 tokens: 1/8 + 1/64 of 4096.
    """

    paper = "Wei and Gulcehre, 2026, arXiv 2602.18196"
    dilation: Positive = 64

    def pattern(self, query: Tensor, key: Tensor) -> Tensor:
        return (key + 1) % self.dilation == 0

    def fraction(self, length: int) -> Fraction:
        return super().fraction(length) + Fraction(1, self.dilation)

    def with_budget(self, budget: Budget, length: int) -> Self:
        left = budget.fraction - Fraction(1, self.dilation)
        if left <= 0:
            raise ValueError(f"budget {budget} leaves no room besides method.dilation: raise one")
        if (left * length / self.block_size).denominator != 1:
            raise ValueError(
                f"budget {budget} less 1/{self.dilation} of {length} tokens is not a whole number "
                f"of blocks of {self.block_size}: change the budget or method.dilation"
            )
        return replace(self, top_k=Budget(left).blocks(length, self.block_size))


@dataclass(frozen=True)
class QuestDilated(WithDilation, Quest):
    """Quest's blocks and every D-th token, at every decoding step."""


@dataclass(frozen=True)
class MoBADilated(WithDilation, MoBA):
    """MoBA's blocks and every D-th token, for every prompt token."""
