"""`moba_prefill` in Triton: gate, union, attention; no matrix of scores is ever stored.

1. The gate keeps the scores of 16 queries for all blocks in registers, selects there, and writes
   one bit a query and block: T · N / 8 bytes a head.
2. Each tile of queries lists the blocks that any of them selected.
3. Attention walks over a tile's list, every row masked by its own bits. How fast it is depends on
   how far the queries of a tile agree: the tile computes its whole list.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ratplus_kernels.selection_triton import select_blocks

ROWS = 16  # queries that a program gates at a time
SEGMENT = 128  # blocks up to which gates of shorter reach don't pay (a multiple of 32)


def moba_prefill_triton(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, top_k: int, means: Tensor | None = None
) -> Tensor:
    batch, heads, length, dim = q.shape
    group = heads // k.shape[1]
    blocks, complete = triton.cdiv(length, block_size), length // block_size
    if means is None:
        means = k[:, :, : complete * block_size].unflatten(2, (complete, block_size)).mean(3)
    padded_dim = max(16, triton.next_power_of_2(dim))  # 16: the least that tl.dot takes
    # fp32 is for tests: its exact products take no tensor cores, and much shared memory.
    tile, warps, stages = (128, 8, 3) if q.dtype.itemsize == 2 else (32, 4, 1)

    words = triton.cdiv(blocks, 32)
    bits = torch.empty(batch * heads, words, length, dtype=torch.int32, device=q.device)
    gates, tiles = triton.cdiv(length, ROWS), triton.cdiv(length, tile)
    unions = torch.empty(batch * heads, gates, words, dtype=torch.int32, device=q.device)
    # Queries early in the context have few blocks before them, so they are gated among few.
    start, reach = 0, SEGMENT
    while start < gates:
        end = min(gates, reach * block_size // ROWS)
        _gate[(end - start, batch * heads)](
            q, means, bits, unions, *q.stride(), *means.stride(),
            start, length, complete, heads, group, words, gates, block_size, top_k,
            D=dim, PADDED_D=padded_dim, ROWS=ROWS, BLOCKS=reach,
            num_warps=min(16, max(4, reach // 128)), num_stages=min(2, stages),
        )  # fmt: skip
        start, reach = end, 2 * reach

    lists = torch.empty(batch * heads, tiles, blocks, dtype=torch.int32, device=q.device)
    counts = torch.empty(batch * heads, tiles, dtype=torch.int32, device=q.device)
    _unite[(tiles, batch * heads)](
        unions, lists, counts, length, blocks, words, gates, block_size,
        TILE=tile, ROWS=ROWS, BLOCKS=triton.next_power_of_2(blocks),
    )  # fmt: skip

    # Heads inside, as the model wants them next.
    out = q.new_empty(batch, length, heads, dim).transpose(1, 2)
    part = min(64, max(16, triton.next_power_of_2(block_size)))
    _attend[(tiles, batch * heads)](
        q, k, v, bits, lists, counts, out,
        *q.stride(), *k.stride(), *v.stride(), *out.stride(),
        length, heads, group, blocks, words, math.log2(math.e) / math.sqrt(dim),
        SIZE=block_size, PART=part, TILE=tile, D=dim, PADDED_D=padded_dim,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


@triton.jit
def _pack(selected):
    """(R, N) bool to (R, N / 32) int32: bit n % 32 of word n // 32 is column n."""
    WORDS: tl.constexpr = selected.shape[1] // 32
    bit = tl.reshape(selected, [selected.shape[0], WORDS, 32]).to(tl.int32)
    return tl.sum(bit << tl.arange(0, 32)[None, None, :], axis=2)


@triton.jit
def _gate(
    q, means, bits, unions,
    q_b, q_h, q_t, q_d, m_b, m_h, m_n, m_d,
    start, length, complete, heads, group, words, gates, block_size, top_k,
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

    word = tl.arange(0, BLOCKS // 32)[None, :]
    bit_ptr = bits + (sequence * words + word) * length + row[:, None]
    tl.store(bit_ptr, _pack(selected), mask=word < words)
    union = _pack((tl.max(selected.to(tl.int32), axis=0) > 0)[None, :])
    tl.store(unions + (sequence * gates + gate) * words + word, union, mask=word < words)


@triton.jit
def _unite(
    unions, lists, counts, length, blocks, words, gates, block_size,
    TILE: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    tile, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    found = tl.zeros([BLOCKS], tl.int32)
    for i in range(TILE // ROWS):
        gate = tile * (TILE // ROWS) + i
        last = tl.minimum((gate + 1) * ROWS, length) - 1
        # A gate has not written words for what lies behind its queries.
        there = (gate < gates) & (block <= last // block_size)
        pointer = unions + (sequence * gates + gate) * words + block // 32
        found = found | tl.load(pointer, mask=there, other=0)
    used = (found >> (block % 32)) & 1
    place = sequence * tl.num_programs(0) + tile
    rank = tl.cumsum(used, axis=0) - 1
    tl.store(lists + place * blocks + rank, block, mask=used != 0)
    tl.store(counts + place, tl.sum(used, axis=0))


@triton.jit
def _attend(
    q, k, v, bits, lists, counts, out,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d, o_b, o_h, o_t, o_d,
    length, heads, group, blocks, words, scale,
    SIZE: tl.constexpr, PART: tl.constexpr, TILE: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr,
):  # fmt: skip
    # The last tiles have the longest lists: they start first, so that no straggler remains.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    batch, head = sequence // heads, sequence % heads
    row = tile * TILE + tl.arange(0, TILE)
    d = tl.arange(0, PADDED_D)
    offset = tl.arange(0, PART)
    wanted = (row < length)[:, None] & (d < D)[None, :]
    row_offset = row[:, None].to(tl.int64)
    q_ptr = q + batch * q_b + head * q_h + row_offset * q_t + d[None, :] * q_d
    query = tl.load(q_ptr, mask=wanted, other=0.0)
    k_ptr = k + batch * k_b + head // group * k_h + d[:, None] * k_d
    v_ptr = v + batch * v_b + head // group * v_h + d[None, :] * v_d
    place = sequence * tl.num_programs(0) + tile

    values = tl.zeros([TILE, PADDED_D], tl.float32)
    total = tl.zeros([TILE], tl.float32)
    peak = tl.full([TILE], -float("inf"), tl.float32)
    PARTS: tl.constexpr = (SIZE + PART - 1) // PART
    for i in range(tl.load(counts + place) * PARTS):
        block = tl.load(lists + place * blocks + i // PARTS)
        within = i % PARTS * PART + offset
        token = block * SIZE + within
        there = (within < SIZE) & (token < length)
        token_offset = token.to(tl.int64)
        key = tl.load(
            k_ptr + token_offset[None, :] * k_t,
            mask=there[None, :] & (d < D)[:, None],
            other=0.0,
        )
        logit = tl.dot(query, key, input_precision="ieee") * scale
        # Rows behind the end select all, so that no row is without a token (they aren't stored).
        word_ptr = bits + (sequence * words + block // 32) * length + row
        word = tl.load(word_ptr, mask=row < length, other=-1)
        selected = ((word >> (block % 32)) & 1) != 0
        seen = selected[:, None] & there[None, :] & (token[None, :] <= row[:, None])
        logit = tl.where(seen, logit, -float("inf"))
        # Finite from the first step on: block 0 leads each list, and every row selects it.
        new_peak = tl.maximum(peak, tl.max(logit, axis=1))
        weight, fade = tl.exp2(logit - new_peak[:, None]), tl.exp2(peak - new_peak)
        total = total * fade + tl.sum(weight, axis=1)
        value = tl.load(
            v_ptr + token_offset[:, None] * v_t,
            mask=there[:, None] & (d < D)[None, :],
            other=0.0,
        )
        values = tl.dot(
            weight.to(value.dtype), value, values * fade[:, None], input_precision="ieee"
        )
        peak = new_peak
    out_ptr = out + batch * o_b + head * o_h + row_offset * o_t + d[None, :] * o_d
    tl.store(out_ptr, (values / total[:, None]).to(out.dtype.element_ty), mask=wanted)
