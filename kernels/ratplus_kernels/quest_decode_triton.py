"""`quest_decode` in Triton: two launches for a short context, else three.

1. Scores of all blocks, read once for all query heads of a KV head (long contexts).
2. Each query head's selection, as block indices (short contexts are scored here).
3. Attention over the selected blocks, divided among many programs, so that a small batch fills the
   GPU and loads of one program hide the waits of others; the last program of a query to finish
   combines the partial results.

The host never waits for a number from the GPU, so a step can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ratplus_kernels.selection_triton import ranks, select_blocks

FUSED = 128  # up to this many blocks the selection scores them itself


class Plan(NamedTuple):
    """How the work is divided.

    programs: how many to aim for in the attention; tile, warps, stages: of each one, the tokens at
        a time, the warps, and the stages of its loads.
    scored: blocks of a long context that a program scores.
    """

    programs: int = 1024
    tile: int = 64
    warps: int = 4
    stages: int = 2
    scored: int = 32


PLAN = Plan()


def quest_decode_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    representatives: Tensor,
    positions: Tensor,
    block_size: int,
    top_k: int,
    plan: Plan | None = None,
) -> Tensor:
    plan = plan or PLAN
    batch, heads, queries, dim = q.shape
    kv_heads, blocks = representatives.shape[1:3]
    group, rows = heads // kv_heads, batch * heads * queries
    positions = positions.expand(batch, queries).contiguous()
    top_k = min(top_k, blocks)

    scored = blocks > FUSED
    share = triton.cdiv(top_k * rows, plan.programs)
    if share > top_k // 2:
        share = top_k
    splits = triton.cdiv(top_k, share)
    sizes = {"SIZE": block_size, "D": dim, "PADDED_D": triton.next_power_of_2(dim)}
    padded_blocks = triton.next_power_of_2(blocks)

    scores = q.new_empty(rows if scored else 0, blocks, dtype=torch.float32)
    if scored:
        _score[(batch * kv_heads, triton.cdiv(blocks, plan.scored))](
            q, representatives, scores, *q.stride(), *representatives.stride(),
            kv_heads, group, queries, blocks,
            D=dim, PADDED_D=sizes["PADDED_D"], TILE=plan.scored,
        )  # fmt: skip
    chosen = torch.empty(rows, top_k, dtype=torch.int32, device=q.device)
    arrived = torch.empty(rows, dtype=torch.int32, device=q.device)
    _select[(rows,)](
        q, representatives, scores, positions, chosen, arrived,
        *q.stride(), *representatives.stride(), heads, group, queries, blocks, top_k,
        **sizes, PADDED_BLOCKS=padded_blocks, SCORED=scored,
        # One warp finds a threshold without barriers; scoring needs many loads at once.
        num_warps=max(1, min(16, padded_blocks // 512)) if scored else 8,
    )  # fmt: skip

    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    partial = q.new_empty(rows, splits if splits > 1 else 0, dim, dtype=torch.float32)
    weights = q.new_empty(2, rows, splits, dtype=torch.float32)
    _attend[(rows, splits)](
        q, k, v, positions, chosen, arrived, out, partial, weights[0], weights[1],
        *q.stride(), *k.stride(), *v.stride(), heads, group, queries, top_k,
        share, math.log2(math.e) / math.sqrt(dim),
        **sizes, TILE=min(plan.tile, triton.next_power_of_2(share * block_size)),
        STAGES=plan.stages, SPLITS=splits, PADDED_SPLITS=triton.next_power_of_2(splits),
        COMBINED=min(32, triton.next_power_of_2(splits)), num_warps=plan.warps,
    )  # fmt: skip
    return out


@triton.jit
def _bounds(block_ptr, block, blocks, r_n, r_d, D: tl.constexpr, PADDED_D: tl.constexpr):
    """Minima and maxima of the blocks `block` (N,): two (N, PADDED_D)."""
    d = tl.arange(0, PADDED_D)
    pointer = block_ptr + block[:, None].to(tl.int64) * r_n + d[None, :] * r_d
    inside = (block < blocks)[:, None] & (d < D)[None, :]
    low = tl.load(pointer, mask=inside, other=0.0)
    return low, tl.load(pointer + D * r_d, mask=inside, other=0.0)


@triton.jit
def _upper_bounds(query_ptr, low, high, q_d, D: tl.constexpr, PADDED_D: tl.constexpr):
    """Σ_d max(q_d · min_d, q_d · max_d) of one query and low, high (N, PADDED_D): (N,) fp32."""
    d = tl.arange(0, PADDED_D)
    query = tl.load(query_ptr + d * q_d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    return tl.sum(tl.maximum(query * low.to(tl.float32), query * high.to(tl.float32)), axis=1)


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
    low, high = _bounds(block_ptr, block, blocks, r_n, r_d, D, PADDED_D)
    for i in range(group * queries):
        head, query = kv_head * group + i // queries, i % queries
        query_ptr = q + batch * q_b + head * q_h + query * q_t
        bound = _upper_bounds(query_ptr, low, high, q_d, D, PADDED_D)
        row = (batch * kv_heads * group + head) * queries + query
        tl.store(scores + row * blocks + block, bound, mask=block < blocks)


@triton.jit
def _select(
    q, representatives, scores, positions, chosen, arrived,
    q_b, q_h, q_t, q_d, r_b, r_h, r_n, r_d,
    heads, group, queries, blocks, top_k,
    SIZE: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, PADDED_BLOCKS: tl.constexpr,
    SCORED: tl.constexpr,
):  # fmt: skip
    """Write one query head's selection, in any order."""
    row = tl.program_id(0).to(tl.int64)
    query = row % queries
    head = row // queries % heads
    batch = row // (queries * heads)
    own = (tl.load(positions + batch * queries + query) // SIZE).to(tl.int32)
    block = tl.arange(0, PADDED_BLOCKS)
    if SCORED:
        score = tl.load(scores + row * blocks + block, mask=block < blocks, other=0.0)
        selected = select_blocks(score[None, :], own + tl.zeros([1], tl.int32), top_k)
        place = tl.cumsum(selected.to(tl.int32), axis=1) - 1
        tl.store(chosen + row * top_k + place, block[None, :], mask=selected)
    else:
        query_ptr = q + batch * q_b + head * q_h + query * q_t
        block_ptr = representatives + batch * r_b + head // group * r_h
        low, high = _bounds(block_ptr, block, blocks, r_n, r_d, D, PADDED_D)
        score = _upper_bounds(query_ptr, low, high, q_d, D, PADDED_D)
        place = tl.where(block == 0, 0, 2 + ranks(score, (block > 0) & (block < own)))
        place = tl.where((block == own) & (own > 0), 1, place)
        tl.store(chosen + row * top_k + place, block, mask=(block <= own) & (place < top_k))
    tl.store(arrived + row, 0)  # none of the attending programs of this query has finished yet


@triton.jit
def _attend(
    q, k, v, positions, chosen, arrived, out, partial, peaks, totals,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d,
    heads, group, queries, top_k, share, scale,
    SIZE: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr, SPLITS: tl.constexpr, PADDED_SPLITS: tl.constexpr,
    COMBINED: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    query = row % queries
    head = row // queries % heads
    batch = row // (queries * heads)
    position = tl.load(positions + batch * queries + query)
    end = tl.minimum(split * share + share, position // SIZE + 1)  # of the slots of `chosen`
    end = tl.minimum(end, top_k)
    d = tl.arange(0, PADDED_D)
    inside = d < D
    query_ptr = q + batch * q_b + head * q_h + query * q_t
    query_row = tl.load(query_ptr + d * q_d, mask=inside, other=0.0).to(tl.float32) * scale
    k_ptr = k + batch * k_b + head // group * k_h + d[None, :] * k_d
    v_ptr = v + batch * v_b + head // group * v_h + d[None, :] * v_d

    # Softmax with a running maximum, in powers of two.
    result = tl.zeros([PADDED_D], tl.float32)
    total = tl.zeros([TILE], tl.float32)
    peak = -1e30  # finite: a program's share may have no selected block
    chosen += row * top_k
    first = split * share * SIZE
    for start in tl.range(first, first + share * SIZE, TILE, num_stages=STAGES):
        place = start + tl.arange(0, TILE)  # a token's number among those of the selected blocks
        slot = place // SIZE
        # Not masked by `end`, so that this load need not wait for that of the position.
        block = tl.load(chosen + tl.minimum(slot, top_k - 1)).to(tl.int64)
        token = block * SIZE + place % SIZE
        seen = (slot < end) & (token <= position)
        readable = seen[:, None] & inside[None, :]
        key = tl.load(k_ptr + token[:, None] * k_t, mask=readable, other=0.0)
        value = tl.load(v_ptr + token[:, None] * v_t, mask=readable, other=0.0)
        logit = tl.sum(query_row[None, :] * key.to(tl.float32), axis=1)
        logit = tl.where(seen, logit, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(logit, axis=0))
        weight, rescale = tl.exp2(logit - new_peak), tl.exp2(peak - new_peak)
        result = result * rescale + tl.sum(weight[:, None] * value.to(tl.float32), axis=0)
        total = total * rescale + weight
        peak = new_peak
    mass = tl.sum(total, axis=0)

    out_ptr = out + row * D + d
    if SPLITS == 1:
        tl.store(out_ptr, (result / mass).to(out.dtype.element_ty), mask=inside)
    else:
        place = row * SPLITS + split
        tl.store(partial + place * D + d, result, mask=inside)
        tl.store(peaks + place, peak)
        tl.store(totals + place, mass)
        tl.debug_barrier()  # all threads store before one counts the program
        if tl.atomic_add(arrived + row, 1, sem="acq_rel") == SPLITS - 1:
            # From the shared cache: other multiprocessors wrote these.
            every = tl.arange(0, PADDED_SPLITS)
            there = every < SPLITS
            partial_maxima = tl.load(
                peaks + row * SPLITS + every, there, -float("inf"), cache_modifier=".cg"
            )
            peak = tl.max(partial_maxima, axis=0)
            result, mass = tl.zeros_like(result), 0.0
            for first_part in range(0, SPLITS, COMBINED):
                part = first_part + tl.arange(0, COMBINED)
                parts, valid = row * SPLITS + part, part < SPLITS
                partial_max = tl.load(peaks + parts, valid, -float("inf"), cache_modifier=".cg")
                masses = tl.load(totals + parts, valid, 0.0, cache_modifier=".cg")
                numbers = parts[:, None] * D + d[None, :]
                both = valid[:, None] & inside[None, :]
                results = tl.load(partial + numbers, both, 0.0, cache_modifier=".cg")
                weight = tl.exp2(partial_max - peak)
                result += tl.sum(weight[:, None] * results, axis=0)
                mass += tl.sum(weight * masses, axis=0)
            tl.store(out_ptr, (result / mass).to(out.dtype.element_ty), mask=inside)
