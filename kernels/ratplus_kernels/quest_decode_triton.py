"""`quest_decode` in Triton: two launches for a short context, three for a long one.

1. Scores of all blocks, read once for all query heads of a KV head (long contexts).
2. Each query head's selection, as ascending block indices (short contexts are scored here).
3. Attention over the selected blocks, which are shared out over several programs so that a small
   batch fills the GPU; the last program of a query to finish combines what all have found.

Nothing depends on a number that only the GPU knows, so a step can be captured in a CUDA graph.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ratplus_kernels.selection_triton import select_blocks

FUSED = 128  # up to this many blocks the selection scores them itself
SCORE_TILE = 32  # blocks that a program scores at a time
PROGRAMS = 512  # how many programs shall attend, about four a multiprocessor


def quest_decode_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    representatives: Tensor,
    positions: Tensor,
    block_size: int,
    top_k: int,
) -> Tensor:
    batch, heads, queries, dim = q.shape
    kv_heads, blocks = representatives.shape[1:3]
    group, rows = heads // kv_heads, batch * heads * queries
    padded_blocks, padded_dim = triton.next_power_of_2(blocks), triton.next_power_of_2(dim)
    positions = positions.expand(batch, queries).contiguous()
    top_k = min(top_k, blocks)

    scored = blocks > FUSED
    scores = q.new_empty(rows if scored else 0, blocks, dtype=torch.float32)
    if scored:
        _score[(batch * kv_heads, triton.cdiv(blocks, SCORE_TILE))](
            q, representatives, scores, *q.stride(), *representatives.stride(),
            kv_heads, group, queries, blocks,
            D=dim, PADDED_D=padded_dim, TILE=SCORE_TILE,
        )  # fmt: skip
    chosen = torch.empty(rows, top_k, dtype=torch.int32, device=q.device)
    arrived = torch.empty(rows, dtype=torch.int32, device=q.device)
    _select[(rows,)](
        q, representatives, scores, positions, chosen, arrived,
        *q.stride(), *representatives.stride(),
        heads, group, queries, blocks, block_size, top_k,
        D=dim, PADDED_D=padded_dim, PADDED_BLOCKS=padded_blocks, SCORED=scored,
        num_warps=8 if blocks > (2048 if scored else 64) else 4,
    )  # fmt: skip

    share = triton.cdiv(top_k * rows, PROGRAMS)
    splits = triton.cdiv(top_k, share)
    tile = min(64, triton.next_power_of_2(block_size))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    partial = q.new_empty(rows, splits if splits > 1 else 0, dim, dtype=torch.float32)
    weights = q.new_empty(2, rows, splits, dtype=torch.float32)
    _attend[(rows, splits)](
        q, k, v, positions, chosen, out, partial, weights[0], weights[1], arrived,
        *q.stride(), *k.stride(), *v.stride(),
        heads, group, queries, top_k, share, math.log2(math.e) / math.sqrt(dim),
        SIZE=block_size, TILE=tile, D=dim, PADDED_D=padded_dim,
        SPLITS=splits, PADDED_SPLITS=triton.next_power_of_2(splits),
    )  # fmt: skip
    return out


@triton.jit
def _upper_bounds(
    query_ptr, block_ptr, block, blocks, q_d, r_n, r_d, D: tl.constexpr, PADDED_D: tl.constexpr
):
    """Σ_d max(q_d · min_d, q_d · max_d) of one query and the blocks `block` (N,): (N,) fp32."""
    d = tl.arange(0, PADDED_D)
    query = tl.load(query_ptr + d * q_d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    pointer = block_ptr + block[:, None].to(tl.int64) * r_n + d[None, :] * r_d
    inside = (block < blocks)[:, None] & (d < D)[None, :]
    low = tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(pointer + D * r_d, mask=inside, other=0.0).to(tl.float32)
    return tl.sum(tl.maximum(query * low, query * high), axis=1)


@triton.jit
def _score(
    q, representatives, scores,
    q_b, q_h, q_t, q_d, r_b, r_h, r_n, r_d,
    kv_heads, group, queries, blocks,
    D: tl.constexpr, PADDED_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(0) % kv_heads
    block = tl.program_id(1) * TILE + tl.arange(0, TILE)
    block_ptr = representatives + batch * r_b + kv_head * r_h
    for i in range(group * queries):
        head, query = kv_head * group + i // queries, i % queries
        query_ptr = q + batch * q_b + head * q_h + query * q_t
        bound = _upper_bounds(query_ptr, block_ptr, block, blocks, q_d, r_n, r_d, D, PADDED_D)
        row = (batch * kv_heads * group + head) * queries + query
        tl.store(scores + row * blocks + block, bound, mask=block < blocks)


@triton.jit
def _select(
    q, representatives, scores, positions, chosen, arrived,
    q_b, q_h, q_t, q_d, r_b, r_h, r_n, r_d,
    heads, group, queries, blocks, block_size, top_k,
    D: tl.constexpr, PADDED_D: tl.constexpr, PADDED_BLOCKS: tl.constexpr, SCORED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    query = row % queries
    head = row // queries % heads
    batch = row // (queries * heads)
    own = (tl.load(positions + batch * queries + query) // block_size).to(tl.int32)
    block = tl.arange(0, PADDED_BLOCKS)
    if SCORED:
        score = tl.load(scores + row * blocks + block, mask=block < blocks, other=0.0)
    else:
        query_ptr = q + batch * q_b + head * q_h + query * q_t
        block_ptr = representatives + batch * r_b + head // group * r_h
        score = _upper_bounds(query_ptr, block_ptr, block, blocks, q_d, r_n, r_d, D, PADDED_D)
    selected = select_blocks(score[None, :], own + tl.zeros([1], tl.int32), top_k)
    rank = tl.cumsum(selected.to(tl.int32), axis=1) - 1
    tl.store(chosen + row * top_k + rank, block[None, :], mask=selected)
    tl.store(arrived + row, 0)  # none of the attending programs of this query has finished yet


@triton.jit
def _attend(
    q, k, v, positions, chosen, out, partial, peaks, totals, arrived,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d,
    heads, group, queries, top_k, share, scale,
    SIZE: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    SPLITS: tl.constexpr, PADDED_SPLITS: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    query = row % queries
    head = row // queries % heads
    batch = row // (queries * heads)
    position = tl.load(positions + batch * queries + query)
    selected = tl.minimum(top_k, position // SIZE + 1).to(tl.int32)
    d = tl.arange(0, PADDED_D)
    inside = d < D
    query_ptr = q + batch * q_b + head * q_h + query * q_t
    query_row = tl.load(query_ptr + d * q_d, mask=inside, other=0.0).to(tl.float32) * scale
    k_ptr = k + batch * k_b + head // group * k_h + d[None, :] * k_d
    v_ptr = v + batch * v_b + head // group * v_h + d[None, :] * v_d

    # Softmax with a running maximum, in powers of two. Sums over tokens are left to the end.
    offset = tl.arange(0, TILE)
    values = tl.zeros([TILE, PADDED_D], tl.float32)
    total = tl.zeros([TILE], tl.float32)
    peak = -float("inf")
    TILES: tl.constexpr = (SIZE + TILE - 1) // TILE
    first = split * share
    for i in range(first * TILES, tl.minimum(first + share, selected) * TILES):
        block = tl.load(chosen + row * top_k + i // TILES).to(tl.int64)
        within = i % TILES * TILE + offset
        token = block * SIZE + within
        seen = (within < SIZE) & (token <= position)
        readable = seen[:, None] & inside[None, :]
        key = tl.load(k_ptr + token[:, None] * k_t, mask=readable, other=0.0).to(tl.float32)
        value = tl.load(v_ptr + token[:, None] * v_t, mask=readable, other=0.0).to(tl.float32)
        logit = tl.where(seen, tl.sum(query_row[None, :] * key, axis=1), -float("inf"))
        # A selected block's first tile has a token that the query sees, so this is finite.
        new_peak = tl.maximum(peak, tl.max(logit, axis=0))
        weight, fade = tl.exp2(logit - new_peak), tl.exp2(peak - new_peak)
        values = values * fade + weight[:, None] * value
        total = total * fade + weight
        peak = new_peak
    result, mass = tl.sum(values, axis=0), tl.sum(total, axis=0)

    out_ptr = out + row * D + d
    if SPLITS == 1:
        tl.store(out_ptr, (result / mass).to(out.dtype.element_ty), mask=inside)
    else:
        place = row * SPLITS + split
        tl.store(partial + place * D + d, result, mask=inside)
        tl.store(peaks + place, peak)
        tl.store(totals + place, mass)
        tl.debug_barrier()  # all threads have stored before one of them says so
        if tl.atomic_add(arrived + row, 1, sem="acq_rel") == SPLITS - 1:
            part = tl.arange(0, PADDED_SPLITS)
            there = part < SPLITS
            parts = row * SPLITS + part
            # From the shared cache: other multiprocessors wrote these.
            crest = tl.load(peaks + parts, mask=there, other=-float("inf"), cache_modifier=".cg")
            masses = tl.load(totals + parts, mask=there, other=0.0, cache_modifier=".cg")
            results = tl.load(
                partial + parts[:, None] * D + d[None, :],
                mask=there[:, None] & inside[None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            share_of = tl.exp2(crest - tl.max(crest, axis=0))
            result = tl.sum(share_of[:, None] * results, axis=0)
            result = result / tl.sum(share_of * masses, axis=0)
            tl.store(out_ptr, result.to(out.dtype.element_ty), mask=inside)
