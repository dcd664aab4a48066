"""StreamingLLM: the first and the last tokens."""

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Self

from ratplus_exp.budget import Budget
from ratplus_exp.methods.dilated import Dilated
from ratplus_exp.settings import Whole


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Dilated):
    """Query t sees position j <= t when j < I or t − j <= W, with I + W + 1 tokens in all.

    This applies to prompt and answer. RoPE's positions are those in the text; the original uses
    positions in the cache.
    """

    paper = "Xiao et al., 2023, arXiv 2309.17453"
    not_set = Dilated.not_set | {"dilation", "local"}
    dilation: Whole = 0
    initial: Whole = 4

    attend_prefill = Dilated.attend_prefill
    attend_decode = Dilated.attend_decode

    def fraction(self, length: int) -> Fraction:
        return Fraction(self.initial + self.local + 1, length)

    def with_budget(self, budget: Budget, length: int) -> Self:
        local = budget.tokens(length) - self.initial - 1
        if local < 0:
            raise ValueError(
                f"budget {budget} has no room for {self.initial} initial tokens and the query's "
                "own: raise the budget or lower method.initial"
            )
        return replace(self, local=local)
