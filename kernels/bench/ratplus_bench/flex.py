"""FlexAttention over selected blocks, as a baseline: block masks built from indices.

`create_block_mask` would evaluate H · T² pairs, so masks are made with `from_kv_blocks`. The
selection itself is done in setup and is not part of the baseline's time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ratplus_exp.methods import Engine, MoBA, Quest

TILE = 128  # queries that FlexAttention, and our kernel in bf16, handle together


def attend(q: Tensor, k: Tensor, v: Tensor, mask: object) -> Tensor:
    return _compiled()(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def window_lse(q: Tensor, k: Tensor) -> Tensor:
    """log Σ exp of the last queries' causal logits, (B, H, W) fp32, head by head."""
    groups = q.shape[1] // k.shape[1]
    token = torch.arange(k.shape[2], device=q.device)
    future = token > token[-q.shape[2] :, None]
    rows = []
    for head in range(q.shape[1]):
        logits = q[:, head].float() @ k[:, head // groups].float().transpose(-1, -2)
        logits = (logits / math.sqrt(q.shape[-1])).masked_fill(future, -torch.inf)
        rows.append(logits.logsumexp(-1))
    return torch.stack(rows, dim=1)


def decode_inputs(size: int, top_k: int) -> Callable[..., tuple]:
    """setup for one query a head: q, k, v and a mask over Quest's choice."""

    def setup(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, positions: Tensor) -> tuple:
        from torch.nn.attention.flex_attention import BlockMask

        engine = Engine(Quest(size, top_k))
        chosen = engine.select_blocks(q, bounds, positions, 0).flatten(1, 2)  # (B, H, 1, N)
        count, index = _indices(chosen)
        mask = BlockMask.from_kv_blocks(
            torch.zeros_like(count), index, count, index,
            BLOCK_SIZE=(TILE, size), seq_lengths=(1, k.shape[2]),
        )  # fmt: skip
        return q, k, v, mask

    return setup


def prefill_inputs(size: int, top_k: int) -> Callable[..., tuple]:
    """setup for a prompt: tiles of queries over the union of their choices, and a bit a pair."""

    def setup(q: Tensor, k: Tensor, v: Tensor, means: Tensor) -> tuple:
        from torch.nn.attention.flex_attention import BlockMask

        length = q.shape[2]
        bits = selected(q, means, size, top_k)
        count, index = _indices(bits.unflatten(2, (-1, TILE)).any(3))

        def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return bits[b, h, query, key // size] & (key <= query)

        mask = BlockMask.from_kv_blocks(
            count, index, BLOCK_SIZE=(TILE, size), mask_mod=seen, seq_lengths=(length, length)
        )
        return q, k, v, mask

    return setup


def selected(q: Tensor, means: Tensor, size: int, top_k: int, unite: bool = False) -> Tensor:
    """MoBA's choice for every query, (B, H, T, N) bool; united, what any of a tile's queries
    selects, (B, H, T / TILE, N): the blocks that a kernel computes for that tile."""
    engine = Engine(MoBA(size, top_k))
    position = torch.arange(q.shape[2], device=q.device)
    chosen = []
    for queries, at in zip(q.split(8 * TILE, dim=2), position.split(8 * TILE), strict=True):
        bits = engine.select_blocks(queries, means, at[None], 0).flatten(1, 2)
        if unite:
            tiles = [tile.any(2, keepdim=True) for tile in bits.split(TILE, dim=2)]
            bits = torch.cat(tiles, dim=2)
        chosen.append(bits)
    return torch.cat(chosen, dim=2)


def _indices(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks are chosen, and which: the chosen ones first."""
    index = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), index.to(torch.int32)


@cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
