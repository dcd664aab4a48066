"""`selection.select` inside a Triton kernel, on scores that sit in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sortable(scores):
    """fp32 as int32 of the same order."""
    scores = tl.where(scores == 0, 0.0, scores)  # −0 ties with 0
    bits = scores.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def ranks(scores, free):
    """How many of the free ones of scores (N,) fp32 come before each one, ties by index: (N,).

    All pairs: the least latency for few scores.
    """
    key, index = _sortable(scores), tl.arange(0, scores.shape[0])
    other, ours = key[None, :], key[:, None]
    first = (other > ours) | ((other == ours) & (index[None, :] < index[:, None]))
    return tl.sum((first & free[None, :]).to(tl.int32), axis=1)


@triton.jit
def select_blocks(scores, own, top_k):
    """scores (R, N) fp32 of R queries, own (R,) their own blocks: (R, N) bool, what is selected.

    A binary search over the scores' bits, read as integers of the same order, finds each row's k-th
    best among the blocks that are not forced: exact, at most 32 counts, no sort.
    """
    # How many free ones to take: min(top_k, own + 1) in all, the forced (one or two) among them.
    wanted = tl.minimum(top_k, own + 1) - tl.minimum(own + 1, 2)
    block = tl.arange(0, scores.shape[1])[None, :]
    forced = (block == 0) | (block == own[:, None])
    free = (block > 0) & (block < own[:, None])
    key = tl.where(free, _sortable(scores), -2147483647)  # below −inf

    # At least `wanted` keys reach low, fewer reach high.
    high = tl.max(key, axis=1) + 1
    low = tl.where(wanted > 0, tl.min(tl.where(free, key, 2147483647), axis=1), high)
    while tl.max((low + 1 < high).to(tl.int32), axis=0) > 0:
        middle = (low & high) + ((low ^ high) >> 1)  # their mean without overflow
        count = tl.sum((key >= middle[:, None]).to(tl.int32), axis=1)
        low = tl.where(count >= wanted, middle, low)
        high = tl.where(count > wanted, high, tl.where(count == wanted, middle + 1, middle))

    above = key > low[:, None]
    tied = key == low[:, None]
    left = wanted - tl.sum(above.to(tl.int32), axis=1)
    if tl.max(tl.sum(tied.to(tl.int32), axis=1) - left, axis=0) > 0:
        tied = tied & (tl.cumsum(tied.to(tl.int32), axis=1) <= left[:, None])
    return forced | above | tied
