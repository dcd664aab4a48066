"""Twilight over Quest: of Quest's candidates, the smallest set with enough attention mass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ratplus_exp.methods.exact import TopKTokens
from ratplus_exp.methods.quest import Quest
from ratplus_exp.settings import Positive
from ratplus_kernels.selection import select


@dataclass(frozen=True)
class Twilight(TopKTokens):
    """Top-p: of the tokens of Quest's blocks, by attention, as many as make up the mass p.

    p is the same for all heads of a layer: at each step the one with which they select top_k tokens
    on average, so that the measured budget is the nominal one. The original fixes p and estimates
    the mass with 4-bit keys, here it is exact.
    page: tokens of Quest's blocks; candidates: how many times the budget they are.
    """

    paper: ClassVar[str] = "Lin et al., 2025, arXiv 2502.02770"
    reads: ClassVar[str] = "minima and maxima of all blocks, keys of the candidates"
    pooled: ClassVar[bool] = True
    page: Positive = 64
    candidates: Positive = 4

    def rank(
        self, scores: Tensor, queries: Tensor, representatives: Tensor, allowed: Tensor
    ) -> Tensor:
        """Minus the mass of the likelier candidates; where it is below p, a token is selected."""
        chosen = self._of_quest(queries, representatives, allowed)
        mass = scores.masked_fill(~chosen, -torch.inf).softmax(-1)
        order = mass.sort(dim=-1, descending=True, stable=True)
        before = order.values.cumsum(-1) - order.values
        ranked = torch.zeros_like(mass).scatter(-1, order.indices, -before)
        return ranked.masked_fill(~chosen, -torch.inf)

    def _of_quest(self, queries: Tensor, keys: Tensor, allowed: Tensor) -> Tensor:
        """The tokens of Quest's blocks, a bool of the shape of the scores."""
        room = -keys.shape[2] % self.page
        quest = Quest(self.page, max(2, -(-self.candidates * self.top_k // self.page)))
        blocks = F.pad(keys, (0, 0, 0, room)).unflatten(2, (-1, self.page))
        scores = quest.score(queries, quest.represent(blocks))
        there = F.pad(allowed, (0, room)).unflatten(-1, (-1, self.page)).any(-1)
        block, own = torch.arange(there.shape[-1], device=keys.device), there.sum(-1, True) - 1
        forced = (block == 0) | (block == own)
        chosen = select(scores, quest.top_k, allowed=there, forced=forced)
        return chosen.repeat_interleave(self.page, -1)[..., : keys.shape[2]] & allowed

    def choosing(self, positions: Tensor, dim: int, layer: int = 0) -> Tensor:
        there = positions + 1
        keys = there.clamp(max=self.candidates * self.top_k) * dim
        numbers = 2 * dim * there / self.page + keys + 2 * there.clamp(max=self.top_k)
        return numbers / (2 * dim)
