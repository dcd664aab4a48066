"""Who picks the top-k of Eq. 3. H2 swaps the selector and nothing else.

A selector turns a method's scores (B, K, G, Q, N) into the scores that the engine ranks. The engine
then forces the first and the local candidates and takes the k best, so every selector selects
equally many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Selector(Protocol):
    def __call__(
        self,
        scores: Tensor,
        *,
        layer: int,
        positions: Tensor,
        block_size: int,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """Scores to rank by, of the same shape.

        positions (B, Q) are the queries' token positions; candidate i covers the tokens
        [i · block_size, (i + 1) · block_size), or is the token tokens[:, :, i] (B, K, N).
        """
        ...

    def rows(self, index: Tensor) -> Selector:
        """The selector for some samples of its batch."""
        ...


@dataclass(frozen=True)
class TopK:
    """The method's own choice."""

    def __call__(
        self,
        scores: Tensor,
        *,
        layer: int,
        positions: Tensor,
        block_size: int,
        tokens: Tensor | None = None,
    ) -> Tensor:
        return scores

    def rows(self, index: Tensor) -> TopK:
        return self


@dataclass(frozen=True, eq=False)
class Random:
    """Uniformly random candidates (H2), drawn anew for every layer, head and query.

    seeds: (B,) int64, one a sample. The draw is a hash of (seed, layer, head, query position,
    candidate), so it depends neither on the batch a sample happens to be in nor on what was drawn
    before: a resumed run draws the same.
    """

    seeds: Tensor

    def __call__(
        self,
        scores: Tensor,
        *,
        layer: int,
        positions: Tensor,
        block_size: int,
        tokens: Tensor | None = None,
    ) -> Tensor:
        batch, kv_heads, group, queries, candidates = scores.shape
        device = scores.device
        head = torch.arange(kv_heads * group, device=device).view(1, kv_heads, group, 1, 1)
        candidate = torch.arange(candidates, device=device)
        if tokens is not None:
            candidate = tokens[:, :, None, None]
        noise = _mix(self.seeds.to(device).view(batch, 1, 1, 1, 1) & _MASK)
        for part in (layer, head, positions.view(-1, 1, 1, queries, 1), candidate):
            noise = _mix(noise ^ _mix(part + 0x9E3779B9))
        return noise.to(torch.float64)

    def rows(self, index: Tensor) -> Random:
        return Random(self.seeds[index.to(self.seeds.device)])


@dataclass(frozen=True, eq=False)
class Oracle:
    """Candidates that hold gold positions first, then the method's own choice.

    gold: (B, T) bool, true at every token of every gold value.
    heads: the (layer, head) that are told; empty: all. Heads are those that select: KV heads where
        a group of query heads shares what is kept.
    """

    gold: Tensor
    heads: tuple[tuple[int, int], ...] = ()

    def __call__(
        self,
        scores: Tensor,
        *,
        layer: int,
        positions: Tensor,
        block_size: int,
        tokens: Tensor | None = None,
    ) -> Tensor:
        candidates = scores.shape[-1]
        gold = self.gold[:, : candidates * block_size]
        gold = torch.nn.functional.pad(gold, (0, candidates * block_size - gold.shape[1]))
        holds_gold = gold.view(len(gold), candidates, block_size).any(-1)
        told = holds_gold.to(scores.device)[:, None, None, None]
        if tokens is not None:
            gold = torch.nn.functional.pad(self.gold, (0, 1)).to(scores.device)  # of later tokens
            there = tokens.clamp(max=gold.shape[1] - 1)
            told = gold[:, None].expand(-1, tokens.shape[1], -1).gather(2, there)[:, :, None, None]
        if self.heads:
            head = torch.arange(scores.shape[1] * scores.shape[2], device=scores.device)
            knows = torch.zeros_like(head, dtype=torch.bool)
            for place, number in self.heads:
                if place == layer:
                    knows |= head == number
            told = told & knows.view(1, *scores.shape[1:3], 1, 1)
        return scores.masked_fill(told, torch.finfo(scores.dtype).max)

    def rows(self, index: Tensor) -> Oracle:
        return Oracle(self.gold[index.to(self.gold.device)], self.heads)


_MASK = 0xFFFFFFFF


def _mix(x: Any) -> Any:
    """A 32-bit integer hash (Mueller's) of an int or an int64 tensor, high bits cut off."""
    for _ in range(2):
        x = (((x >> 16) ^ x) * 0x45D9F3B) & _MASK
    return ((x >> 16) ^ x) & _MASK
