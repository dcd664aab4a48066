"""Selectors: the ranking behind the top-k of Eq. 3. H2 changes only the selector.

A selector maps a method's scores (B, K, G, Q, N) to the scores that the engine ranks. The engine
forces the first and the local candidates and takes the k best, so that all selectors select equally
many.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor


class Candidates(NamedTuple):
    """The candidates of the scores.

    positions: (B or 1, Q) of the queries. Candidate i is the tokens [i · block_size,
        (i + 1) · block_size), or the token tokens[:, :, i] (B, K, N).
    """

    layer: int
    positions: Tensor
    block_size: int
    tokens: Tensor | None = None


class Selector:
    def __call__(self, scores: Tensor, candidates: Candidates) -> Tensor:
        """Scores to rank by, of the same shape."""
        return scores

    def rows(self, index: Tensor) -> Self:
        """The selector for some samples of its batch."""
        return self


@dataclass(frozen=True)
class TopK(Selector):
    """The method's choice."""


@dataclass(frozen=True, eq=False)
class Random(Selector):
    """Uniformly random candidates (H2), drawn separately for every layer, head and query.

    seeds: (B,) int64, one per sample. The draw is a hash of (seed, layer, head, query position,
        candidate), so that it depends neither on the batch nor on earlier draws.
    """

    seeds: Tensor

    def __call__(self, scores: Tensor, candidates: Candidates) -> Tensor:
        batch, kv_heads, group, queries, count = scores.shape
        layer, positions, _, tokens = candidates
        device = scores.device
        head = torch.arange(kv_heads * group, device=device).view(1, kv_heads, group, 1, 1)
        index = torch.arange(count, device=device) if tokens is None else tokens[:, :, None, None]
        noise = _mix(self.seeds.to(device).view(batch, 1, 1, 1, 1) & _MASK)
        for part in (layer, head, positions.view(-1, 1, 1, queries, 1), index):
            noise = _mix(noise ^ _mix(part + 0x9E3779B9))
        return noise.to(torch.float64)

    def rows(self, index: Tensor) -> Self:
        return replace(self, seeds=self.seeds[index.to(self.seeds.device)])


@dataclass(frozen=True, eq=False)
class Oracle(Selector):
    """Candidates that hold gold positions first, then the method's choice.

    gold: (B, T) bool, true at every token of every gold value.
    heads: the (layer, head) pairs that prefer gold; empty: all. A head is a KV head where a group
        of query heads shares the selection.
    """

    gold: Tensor
    heads: tuple[tuple[int, int], ...] = ()

    def __call__(self, scores: Tensor, candidates: Candidates) -> Tensor:
        layer, _, size, tokens = candidates
        if tokens is None:
            blocks = any_in_block(self.gold, size, scores.shape[-1])
            gold = blocks.to(scores.device)[:, None, None, None]
        else:
            padded = F.pad(self.gold, (0, 1)).to(scores.device)  # answer tokens are not gold
            index = tokens.clamp(max=padded.shape[1] - 1)
            by_head = padded[:, None].expand(-1, tokens.shape[1], -1)
            gold = by_head.gather(2, index)[:, :, None, None]
        if self.heads:
            head = torch.arange(scores.shape[1:3].numel(), device=scores.device)
            uses = torch.zeros_like(head, dtype=torch.bool)
            for _, number in (pair for pair in self.heads if pair[0] == layer):
                uses |= head == number
            gold = gold & uses.view(1, *scores.shape[1:3], 1, 1)
        return scores.masked_fill(gold, torch.finfo(scores.dtype).max)

    def rows(self, index: Tensor) -> Self:
        return replace(self, gold=self.gold[index.to(self.gold.device)])


def any_in_block(tokens: Tensor, size: int, count: int) -> Tensor:
    """Whether each of `count` blocks of `size` has a true token: tokens (..., T) bool."""
    return F.pad(tokens, (0, count * size - tokens.shape[-1])).unflatten(-1, (-1, size)).any(-1)


_MASK = 0xFFFFFFFF


def _mix(x: Any) -> Any:
    """A 32-bit integer hash (Mueller's) of an int or an int64 tensor, high bits cut off."""
    for _ in range(2):
        x = (((x >> 16) ^ x) * 0x45D9F3B) & _MASK
    return ((x >> 16) ^ x) & _MASK
