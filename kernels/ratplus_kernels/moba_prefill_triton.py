"""`moba_prefill` in Triton: only the selected pairs are computed.

1. The gate keeps the scores of 16 queries for all blocks in registers, selects there, and writes
   one bit per query and block: T · N / 8 bytes per head.
2. Every block between a query's first and its own lists the queries that selected it.
3. A block attends for its list, gathered into tiles: one partial output and log Σ exp per pair.
4. Queries attend to block 0 and their own, and add their partial outputs.

Partial outputs take T · k · D elements per head, so steps 2 to 4 process as many heads at a time as
fit into `Plan.room`, or a span of one head's queries.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ratplus_kernels.selection_triton import select_blocks

ROWS = 16  # queries that a program gates at a time
SEGMENT = 128  # blocks up to which gates over fewer blocks are not faster (a multiple of 32)
TILE = 64  # queries that a program lists, and whose outputs it adds, at a time
SHARES = 4  # programs among which a block's list is divided


class Plan(NamedTuple):
    """tile: queries of a block's list that are handled together; room: bytes of partial outputs at
    a time."""

    tile: int
    warps: int
    stages: int
    room: int = 1 << 30


PLAN = Plan(64, 4, 3)


def moba_prefill_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor | None,
    block_size: int,
    top_k: int,
    plan: Plan = PLAN,
) -> Tensor:
    batch, heads, length, dim = q.shape
    group, sequences = heads // k.shape[1], batch * heads
    blocks, complete = triton.cdiv(length, block_size), length // block_size
    if means is None:
        means = k[:, :, : complete * block_size].unflatten(2, (complete, block_size)).mean(3)
    padded_dim = max(16, triton.next_power_of_2(dim))  # 16: the least that tl.dot takes
    half = q.dtype.itemsize == 2
    # fp32 is for tests: its exact products take no tensor cores, and much shared memory.
    plan, tile = (plan, TILE) if half else (Plan(32, 4, 1, plan.room), 32)

    words = triton.cdiv(blocks, 32)
    bits = torch.empty(sequences, length, words, dtype=torch.int32, device=q.device)
    gates = triton.cdiv(length, ROWS)
    # Queries early in the context have few blocks before them, so they are gated among few.
    start, reach = 0, SEGMENT
    while start < gates:
        end = min(gates, reach * block_size // ROWS)
        _gate[(end - start, sequences)](
            q, means, bits, *q.stride(), *means.stride(),
            start, length, complete, heads, group, words, block_size, top_k,
            D=dim, PADDED_D=padded_dim, ROWS=ROWS, BLOCKS=reach,
            num_warps=min(16, max(4, reach // 64)), num_stages=2 if half else 1,
        )  # fmt: skip
        start, reach = end, 2 * reach

    picks = max(0, min(top_k, blocks) - 2)  # besides the forced
    most = max(tile, plan.room // (max(1, picks) * dim * q.dtype.itemsize))  # queries at a time
    count = min(sequences, max(1, most // length))
    span = min(triton.cdiv(length, tile), most // tile) * tile
    parts = q.new_empty(count, picks, span, dim)
    shares = torch.empty(count, picks, span, dtype=torch.float32, device=q.device)
    entries = torch.empty(count * picks * span, dtype=torch.int32, device=q.device)
    # Keys at a time: a whole block if registers have room, so that it is loaded once.
    few = 64 if half else 32
    part = max(16, triton.next_power_of_2(block_size))
    part = part if half and part <= 128 else min(part, few)
    # Heads inside: the model's next layout.
    out = q.new_empty(batch, length, heads, dim).transpose(1, 2)
    sizes = {"SIZE": block_size, "D": dim, "PADDED_D": padded_dim}
    scale = math.log2(math.e) / math.sqrt(dim)
    for first in range(0, sequences, count):
        here = min(count, sequences - first)
        for start in range(0, length, span):
            place = (first, start, span, length, picks)
            tiles, lists = (triton.cdiv(min(span, length - start), size) for size in (tile, ROWS))
            if picks:
                counts = torch.zeros(here, blocks, dtype=torch.int32, device=q.device)
                pairs, width = (*place, blocks, words, block_size), triton.next_power_of_2(words)
                kinds = {"ROWS": ROWS, "WORDS": width, "num_warps": min(4, max(1, width // 8))}
                _list[(lists, here)](bits, counts, *pairs, entries, FILL=False, **kinds)
                ends = counts.view(-1).cumsum(0, dtype=torch.int32)
                cursors = ends - counts.view(-1)
                _list[(lists, here)](bits, cursors, *pairs, entries, FILL=True, **kinds)
                # Only its own queries select the last block: no list is of an unfinished one.
                _attend[(blocks - 1, SHARES, here)](
                    q, k, v, counts, ends, entries, parts, shares,
                    *q.stride(), *k.stride(), *v.stride(),
                    *place, heads, group, blocks, scale, TILE=plan.tile, SHARES=SHARES, PART=part,
                    **sizes, num_warps=plan.warps, num_stages=plan.stages,
                )  # fmt: skip
            _combine[(tiles, here)](
                q, k, v, parts, shares, out,
                *q.stride(), *k.stride(), *v.stride(), *out.stride(),
                *place, heads, group, scale, TILE=tile, PART=min(part, few), **sizes,
                num_warps=4, num_stages=1,
            )  # fmt: skip
    return out


@triton.jit
def _gate(
    q, means, bits,
    q_b, q_h, q_t, q_d, m_b, m_h, m_n, m_d,
    start, length, complete, heads, group, words, block_size, top_k,
    D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    gate, sequence = start + tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = sequence // heads, sequence % heads
    row = tl.minimum(gate * ROWS + tl.arange(0, ROWS), length - 1)
    block = tl.arange(0, BLOCKS)
    q_ptr = q + batch * q_b + head * q_h + row[:, None].to(tl.int64) * q_t
    m_ptr = means + batch * m_b + head // group * m_h + block[None, :].to(tl.int64) * m_n
    score = tl.zeros([ROWS, BLOCKS], tl.float32)
    # A slice of channels at a time, since the means of all blocks share the program's memory.
    for first in range(0, PADDED_D, 16):
        d = first + tl.arange(0, 16)
        query = tl.load(q_ptr + d[None, :] * q_d, mask=d[None, :] < D, other=0.0)
        there = (block[None, :] < complete) & (d[:, None] < D)
        mean = tl.load(m_ptr + d[:, None] * m_d, mask=there, other=0.0)
        score = tl.dot(query, mean, score, input_precision="ieee")
    selected = select_blocks(score, row // block_size, top_k)

    # Bit n % 32 of word n // 32 is block n.
    bit = tl.reshape(selected, [ROWS, BLOCKS // 32, 32]).to(tl.int32)
    word = tl.arange(0, BLOCKS // 32)[None, :]
    bit_ptr = bits + (sequence * length + row[:, None]) * words + word
    tl.store(bit_ptr, tl.sum(bit << tl.arange(0, 32)[None, None, :], axis=2), mask=word < words)


@triton.jit
def _list(
    bits, cursors, first, start, span, length, picks, blocks, words, block_size, entries,
    FILL: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Count in cursors (sequences, N), or write from there on, the pairs of a block and a query.

    A pair's entry is the place of its partial output: pick · span + (query − start).
    """
    local = tl.program_id(1)
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    row = start + at
    own = row // block_size
    word = tl.arange(0, WORDS)[None, :]
    # A gate has not written words for blocks after its queries.
    there = (row < length) & (at < span) & (word <= own // 32) & (word < words)
    row_ptr = bits + ((first + local).to(tl.int64) * length + row) * words
    left = tl.load(row_ptr + word, mask=there, other=0)
    left = tl.where(word == 0, left & -2, left)  # without the forced
    left = tl.where(word == own // 32, left & ~(1 << (own % 32)), left)
    taken = tl.zeros([ROWS, 1], tl.int32)
    while tl.max(tl.max((left != 0).to(tl.int32), axis=1), axis=0) > 0:
        some = left != 0
        lowest = left & -left
        # A power of two has its exponent in the upper bits of its float.
        power = lowest.to(tl.uint32, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
        block = word * 32 + (power >> 23) - 127
        cursor = cursors + local * blocks + block
        place = tl.atomic_add(cursor, 1, mask=some, sem="relaxed")
        if FILL:
            one = some.to(tl.int32)
            pick = taken + tl.cumsum(one, axis=1) - 1
            taken += tl.sum(one, axis=1, keep_dims=True)
            tl.store(entries + place, pick * span + at, mask=some)
        left = left & ~lowest


@triton.jit
def _states(k_ptr, v_ptr, there, channels):
    """Keys (D, S) and values (S, D)."""
    key = tl.load(k_ptr, mask=there[None, :] & channels[:, None], other=0.0)
    value = tl.load(v_ptr, mask=there[:, None] & channels[None, :], other=0.0)
    return key, value


@triton.jit
def _add(query, key, value, seen, scale, values, total, peak):
    """A step of the online softmax; the first one's rows must see some key."""
    logit = tl.dot(query, key, input_precision="ieee") * scale
    logit = tl.where(seen, logit, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(logit, axis=1))
    weight, rescale = tl.exp2(logit - new_peak[:, None]), tl.exp2(peak - new_peak)
    total = total * rescale + tl.sum(weight, axis=1)
    values = tl.dot(
        weight.to(value.dtype), value, values * rescale[:, None], input_precision="ieee"
    )
    return values, total, new_peak


@triton.jit
def _attend(
    q, k, v, counts, ends, entries, parts, shares,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d,
    first, start, span, length, picks, heads, group, blocks, scale,
    TILE: tl.constexpr, SHARES: tl.constexpr, SIZE: tl.constexpr, PART: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr,
):  # fmt: skip
    block, local = tl.program_id(0), tl.program_id(2)  # one head's after the other
    sequence = (first + local).to(tl.int64)
    batch, head = sequence // heads, sequence % heads
    count = tl.load(counts + local * blocks + block)
    entry_ptr = entries + tl.load(ends + local * blocks + block) - count
    d, offset = tl.arange(0, PADDED_D), tl.arange(0, PART)
    token = block.to(tl.int64) * SIZE + offset
    q_ptr = q + batch * q_b + head * q_h + d[None, :] * q_d
    k_ptr = k + batch * k_b + head // group * k_h + token[None, :] * k_t + d[:, None] * k_d
    v_ptr = v + batch * v_b + head // group * v_h + token[:, None] * v_t + d[None, :] * v_d
    place = local.to(tl.int64) * picks * span
    if SIZE <= PART:  # for all tiles
        key, value = _states(k_ptr, v_ptr, offset < SIZE, d < D)
    for tile in range(tl.program_id(1) * TILE, count, SHARES * TILE):
        index = tile + tl.arange(0, TILE)
        entry = tl.load(entry_ptr + index, mask=index < count, other=0)
        wanted = (index < count)[:, None] & (d < D)[None, :]
        row = (start + entry % span).to(tl.int64)
        query = tl.load(q_ptr + row[:, None] * q_t, mask=wanted, other=0.0)
        values = tl.zeros([TILE, PADDED_D], tl.float32)
        total = tl.zeros([TILE], tl.float32)
        peak = tl.full([TILE], -float("inf"), tl.float32)
        for part in range(0, SIZE, PART):
            there = part + offset < SIZE
            if SIZE > PART:
                key, value = _states(k_ptr + part * k_t, v_ptr + part * v_t, there, d < D)
            values, total, peak = _add(
                query, key, value, there[None, :], scale, values, total, peak
            )
        at = place + entry
        result = (values / total[:, None]).to(parts.dtype.element_ty)
        tl.store(parts + at[:, None] * D + d[None, :], result, mask=wanted)
        tl.store(shares + at, peak + tl.log2(total), mask=index < count)


@triton.jit
def _combine(
    q, k, v, parts, shares, out,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, o_b, o_h, o_t, o_d,
    first, start, span, length, picks, heads, group, scale,
    TILE: tl.constexpr, SIZE: tl.constexpr, PART: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr,
):  # fmt: skip
    local = tl.program_id(1)
    sequence = (first + local).to(tl.int64)
    batch, head = sequence // heads, sequence % heads
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    begin = start + tl.program_id(0) * TILE
    row = begin + tl.arange(0, TILE)
    d, offset = tl.arange(0, PADDED_D), tl.arange(0, PART)
    wanted = (row < length)[:, None] & (d < D)[None, :]
    row_offset = row[:, None].to(tl.int64)
    q_ptr = q + batch * q_b + head * q_h + row_offset * q_t + d[None, :] * q_d
    query = tl.load(q_ptr, mask=wanted, other=0.0)
    k_ptr = k + batch * k_b + head // group * k_h + d[:, None] * k_d
    v_ptr = v + batch * v_b + head // group * v_h + d[None, :] * v_d

    values = tl.zeros([TILE, PADDED_D], tl.float32)
    total = tl.zeros([TILE], tl.float32)
    peak = tl.full([TILE], -float("inf"), tl.float32)
    # The keys of block 0, then those from the first query's own block on.
    FIRST: tl.constexpr = (SIZE + PART - 1) // PART
    own = tl.maximum(begin // SIZE, 1) * SIZE
    last = tl.minimum(begin + TILE, length)
    for i in range(FIRST + tl.cdiv(tl.maximum(last - own, 0), PART)):
        base = tl.where(i < FIRST, i * PART, own + (i - FIRST) * PART)
        token = base + offset
        there = (token < tl.where(i < FIRST, SIZE, last)) & (token < length)
        token_offset = token.to(tl.int64)
        key, value = _states(
            k_ptr + token_offset[None, :] * k_t, v_ptr + token_offset[:, None] * v_t, there, d < D
        )
        near = (i < FIRST) | (token[None, :] // SIZE == row[:, None] // SIZE)
        seen = near & there[None, :] & (token[None, :] <= row[:, None])
        # Every row sees the first token.
        values, total, peak = _add(query, key, value, seen, scale, values, total, peak)

    place = local.to(tl.int64) * picks * span + at
    free = tl.minimum(row // SIZE - 1, picks)  # selected blocks between the first and the own
    for pick in tl.range(0, tl.minimum((last - 1) // SIZE - 1, picks), num_stages=3):
        there = (row < length) & (pick < free)
        share = tl.load(shares + place + pick * span, mask=there, other=-float("inf"))
        part_ptr = parts + (place + pick * span)[:, None] * D + d[None, :]
        part = tl.load(part_ptr, mask=there[:, None] & (d < D)[None, :], other=0.0)
        new_peak = tl.maximum(peak, share)
        weight, rescale = tl.exp2(share - new_peak), tl.exp2(peak - new_peak)
        total = total * rescale + weight
        values = values * rescale[:, None] + weight[:, None] * part.to(tl.float32)
        peak = new_peak
    out_ptr = out + batch * o_b + head * o_h + row_offset * o_t + d[None, :] * o_d
    tl.store(out_ptr, (values / total[:, None]).to(out.dtype.element_ty), mask=wanted)
