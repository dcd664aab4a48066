"""Twilight over Quest: of Quest's candidates, the smallest set with enough attention mass."""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ratplus_exp.methods.exact import TopKTokens
from ratplus_exp.methods.quest import Quest
from ratplus_exp.methods.selection import Selection
from ratplus_exp.methods.selectors import any_in_block
from ratplus_exp.settings import Positive
from ratplus_kernels.selection import select


@dataclass(frozen=True)
class Twilight(TopKTokens):
    """Top-p: of the tokens in Quest's blocks, those with the most attention, up to the mass p.

    All heads of a layer share p, which is set at each step so that they select top_k tokens on
    average: the measured budget is the nominal one. The original fixes p and estimates the mass
    with 4-bit keys; here it is exact.
    page: Quest's block size; candidates: the size of Quest's selection, in budgets.
    """

    paper = "Lin et al., 2025, arXiv 2502.02770"
    reads = "minima and maxima of all blocks, keys of the candidates"
    pooled = True
    page: Positive = 64
    candidates: Annotated[int, Field(ge=2, le=10**6)] = 4  # with 1 a partial block has too few

    def rank(
        self, scores: Tensor, queries: Tensor, representatives: Tensor, allowed: Tensor
    ) -> Tensor:
        """Minus the mass of the candidates with more attention: tokens above −p are selected."""
        candidates = self._quest(queries, representatives, allowed)
        mass = scores.masked_fill(~candidates, -torch.inf).softmax(-1)
        order = mass.sort(dim=-1, descending=True, stable=True)
        before = order.values.cumsum(-1) - order.values
        ranked = torch.zeros_like(mass).scatter(-1, order.indices, -before)
        return ranked.masked_fill(~candidates, -torch.inf)

    def _quest(self, queries: Tensor, keys: Tensor, allowed: Tensor) -> Tensor:
        """The tokens of Quest's blocks, a bool of the shape of the scores."""
        quest = Quest(self.page, max(2, -(-self.candidates * self.top_k // self.page)))
        scores = quest.score(queries, Selection(quest).block_representatives(keys))
        allowed_blocks = any_in_block(allowed, self.page, scores.shape[-1])
        block = torch.arange(scores.shape[-1], device=keys.device)
        forced = (block == 0) | (block == allowed_blocks.sum(-1, True) - 1)
        selected = select(scores, quest.top_k, allowed=allowed_blocks, forced=forced)
        return selected.repeat_interleave(self.page, -1)[..., : keys.shape[2]] & allowed

    def choosing(self, positions: Tensor, dim: int, layer: int = 0) -> Tensor:
        tokens = positions + 1
        keys = tokens.clamp(max=self.candidates * self.top_k) * dim
        numbers = 2 * dim * tokens / self.page + keys + 2 * tokens.clamp(max=self.top_k)
        return numbers / (2 * dim)
