"""MoBA's prefill (P1, Eq. 3 and 4; Lu et al., 2025): every prompt token attends to few blocks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ratplus_kernels.dispatch import use_triton
from ratplus_kernels.selection import check_top_k, inner_products

MAX_BLOCKS = 2048  # the kernel keeps a query's scores of all blocks in registers
PAIRS = 1 << 17  # (query, block) pairs that the torch form has in memory at a time
SLOTS = 1 << 12  # pairs that it computes at a time, in a core's cache
PAIR = 100  # a pair takes about as long as this many keys of attention with the engine's masks


def moba_prefill(
    q: Tensor, k: Tensor, v: Tensor, *, block_size: int, top_k: int, means: Tensor | None = None
) -> Tensor | None:
    """Causal attention of a prompt to itself, block-sparse with each query head's own choice.

    Args:
        q: queries, (B, H, T, D), any strides (as of all tensors here).
        k, v: keys and values, (B, K, T, D) with K dividing H.
        block_size, top_k: how many tokens a block has, and how many blocks a query attends to:
            block 0 and its own (causally), which are forced and count, then the highest
            q · mean of the block's keys, ties to the lowest index.
        means: (B, K, N, D), the mean of each block's keys, as from `memory_prefill` (None: computed
            here). Those of unfinished blocks are not read.

    Returns:
        (B, H, T, D) in the dtype of q. None where the caller should use the masks of `Engine` in
        ratplus_exp, the definition: where q, k or v need a gradient, on a GPU beyond MAX_BLOCKS
        blocks, and elsewhere where the masks are faster.
    """
    check_top_k(top_k)
    blocks = -(-q.shape[2] // block_size)
    differentiates = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if differentiates or (q.is_cuda and blocks > MAX_BLOCKS):
        return None
    if not use_triton(q, k, v):
        if (top_k - 2) * PAIR > q.shape[2]:
            return None
        return moba_prefill_torch(q, k, v, block_size, top_k, means)
    from ratplus_kernels.moba_prefill_triton import moba_prefill_triton

    return moba_prefill_triton(q, k, v, means, block_size, top_k)


@torch.no_grad()
def moba_prefill_torch(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, top_k: int, means: Tensor | None = None
) -> Tensor:
    """`moba_prefill` by blocks: all queries that selected a block attend to it together.

    Shapes: N blocks of S tokens, G query heads per KV head.
    """
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    length, kv_heads = q.shape[2], k.shape[1]
    blocks = -(-length // block_size)
    if missing := blocks * block_size - length:
        q, k, v = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, v))
    q, k, v = (x.unflatten(2, (blocks, -1)) for x in (q, k, v))
    means = k.mean(3) if means is None else means
    q, k, v = (x.to(wide) for x in (q, k, v))
    q = q.unflatten(1, (kv_heads, -1)).transpose(2, 3)  # (B, K, N, G, S, D)
    pairs = q[:, :, 0, :, :, 0].numel() * max(1, top_k - 2)  # of a block of queries
    step = max(1, PAIRS // pairs)
    out = [
        _attend(q[:, :, first : first + step], first, k, v, means, top_k - 2)
        for first in range(0, blocks, step)
    ]
    joined = torch.cat(out, dim=2).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return joined[:, :, :length].to(dtype)


def _attend(q: Tensor, first: int, k: Tensor, v: Tensor, means: Tensor, picks: int) -> Tensor:
    """Attention of the queries of some blocks, the first of them `first`, in the shape of q.

    q (B, K, n, G, S, D), k and v (B, K, N, S, D), means (B, K, N, D); picks: how many blocks a
    query selects between block 0 and its local block.
    """
    count, last = q.shape[2], first + q.shape[2] - 1
    local = torch.arange(first, last + 1, device=q.device)
    unscaled, q = q, q / math.sqrt(q.shape[-1])
    forced, forced_lse = _attend_forced(q, local, k, v)
    candidates = min(last, k.shape[2]) - 1  # blocks 1 … last − 1
    if min(picks, candidates) < 1:
        return forced
    k, v, means = (x[:, :, 1:last] for x in (k, v, means))
    scores = inner_products(unscaled.flatten(2, 4), means).unflatten(2, (count, -1))
    not_before = torch.arange(1, last, device=q.device) >= local[:, None, None]
    values, index = _best(scores.masked_fill_(not_before, -torch.inf), picks)
    valid = values > -torch.inf
    selected, selected_lse, slots = _attend_selected(
        q, k.flatten(0, 2), v.flatten(0, 2), index, valid
    )
    weights = torch.cat((forced_lse.view(-1, 1), selected_lse), dim=1).softmax(-1)
    out = F.embedding_bag(slots, selected, per_sample_weights=weights[:, 1:], mode="sum")
    return out.addcmul_(forced.view_as(out), weights[:, :1]).view(q.shape)


def _attend_forced(q: Tensor, local: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to block 0 and the local block, in the shape of q, and log Σ exp (B, K, n, G S).

    local (n,): the block of the queries, as consecutive numbers.
    """
    size, blocks = q.shape[4], slice(int(local[0]), int(local[-1]) + 1)
    keys, values = (
        torch.cat((x[:, :, :1].expand(-1, -1, len(local), -1, -1), x[:, :, blocks]), dim=3)
        for x in (k, v)
    )
    token = torch.arange(size, device=q.device)
    seen = torch.cat(
        (
            (local > 0).view(-1, 1, 1).expand(-1, size, size),
            (token <= token[:, None]).expand(len(local), -1, -1),
        ),
        dim=2,
    )
    logits = q.flatten(3, 4) @ keys.mT
    logits.unflatten(3, (-1, size)).masked_fill_(~seen[:, None], -torch.inf)
    shares, lse = _softmax(logits)
    return (shares @ values).view(q.shape), lse


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Over the last dimension, and log Σ exp, in fewer passes than logsumexp takes."""
    shares = logits.softmax(-1)
    return shares, logits.amax(-1) - shares.amax(-1).log()


def _best(scores: Tensor, picks: int) -> tuple[Tensor, Tensor]:
    """The `picks` highest of each query and their candidates, ties to the lowest, (..., picks)."""
    picks = min(picks, scores.shape[-1])
    values, index = scores.topk(min(picks + 1, scores.shape[-1]))
    # topk leaves open which of two equal candidates it takes.
    last, following = values[..., picks - 1 : picks], values[..., picks:]
    if ((last == following) & (last > -torch.inf)).any():
        values, index = scores.sort(dim=-1, descending=True, stable=True)
    return values[..., :picks], index[..., :picks]


def _attend_selected(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of queries to each of the blocks that they selected.

    q (B, K, n, G, S, D), k and v (B K M, S, D) the M candidates of every KV head, index and valid
    (B, K, n, G S, picks): the selected candidates; an invalid one is no block. Pairs of a query and
    a block are sorted by block and cut into tiles, so that a tile attends to one block.

    Returns outputs (slots, D), one per pair; for each query, in order, log Σ exp (·, picks), −∞ for
    invalid candidates, and the slots of its pairs (·, picks).
    """
    size, dim = q.shape[-2:]
    picks, groups, tile = index.shape[-1], len(k), max(size, 16)
    heads = torch.arange(q.shape[0] * q.shape[1], device=q.device).view(*q.shape[:2], 1, 1, 1)
    block = index + heads * (groups // heads.numel())
    block = block.masked_fill_(~valid, groups).flatten()
    pairs = torch.bincount(block, minlength=groups + 1)[:groups]
    block, order = block.to(torch.int32).sort(stable=True)  # in int32 by digits, which is faster
    block, order = (x[: int(pairs.sum())] for x in (block, order))
    tiles = (pairs + tile - 1) // tile
    shift = (tiles.cumsum(0) - tiles) * tile - (pairs.cumsum(0) - pairs)
    slot = torch.arange(len(order), device=q.device) + shift[block]
    block_of_tile = torch.repeat_interleave(tiles)
    query = slot.new_zeros(len(block_of_tile) * tile).index_put_((slot,), order // picks)
    slots = slot.new_zeros(index.numel()).index_put_((order,), slot).view(-1, picks)
    q, out, lse = q.reshape(-1, dim), q.new_empty(len(query), dim), q.new_empty(len(query))
    step = max(1, SLOTS // tile)
    for start in range(0, len(block_of_tile), step):
        blocks = block_of_tile[start : start + step]
        part = slice(start * tile, (start + step) * tile)
        states = q[query[part]].view(-1, tile, dim)
        shares, part_lse = _softmax(states @ k[blocks].mT)
        out[part], lse[part] = (shares @ v[blocks]).view(-1, dim), part_lse.flatten()
    return out, lse[slots].masked_fill_(~valid.view(-1, picks), -torch.inf), slots
