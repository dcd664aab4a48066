"""`selection.select` of blocks inside a Triton kernel, on scores in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _flip(bits):
    """The bits of a float as an integer of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _sortable(scores):
    """fp32 as int32 of the same order."""
    scores = tl.where(scores == 0, 0.0, scores)  # −0 ties with 0
    return _flip(scores.to(tl.int32, bitcast=True))


@triton.jit
def ranks(scores, free):
    """For each of scores (N,) fp32, how many free ones rank before it, ties by index: (N,).

    All pairs are compared: the least latency for few scores.
    """
    key, index = _sortable(scores), tl.arange(0, scores.shape[0])
    other, ours = key[None, :], key[:, None]
    first = (other > ours) | ((other == ours) & (index[None, :] < index[:, None]))
    return tl.sum((first & free[None, :]).to(tl.int32), axis=1)


@triton.jit
def select_blocks(scores, own, top_k):
    """The selection (R, N) bool by scores (R, N) fp32 of R queries, own (R,) their local blocks.

    Bisection finds a threshold for each row: a score that exactly `wanted` blocks reach or, where
    ties prevent that, the highest one that more reach. It is exact and needs no sort. It halves the
    range of the scores for 16 steps, then that of their bits, read as integers of the same order,
    for at most 32 more.
    """
    block = tl.arange(0, scores.shape[1])[None, :]
    forced = (block == 0) | (block == own[:, None])
    free = (block > 0) & (block < own[:, None])
    # Forced blocks are above inf, blocks after the local one below −inf.
    key = tl.where(free, _sortable(scores), tl.where(forced, 2147483647, -2147483647))

    # At least `wanted` keys reach low, fewer reach high, or no free one does.
    wanted = tl.minimum(top_k, own + 1)
    low = tl.min(tl.where(key == -2147483647, 2147483647, key), axis=1)
    high = tl.max(tl.where(key == 2147483647, -2147483647, key), axis=1) + 1
    low = tl.where(wanted > 2, low, high)
    high = tl.where(wanted <= own, high, low + 1)
    step = 0
    while tl.max((low + 1 < high).to(tl.int32), axis=0) > 0:
        if step < 16:
            score = 0.5 * _flip(low).to(tl.float32, bitcast=True)
            score += 0.5 * _flip(high).to(tl.float32, bitcast=True)
            middle = _flip(score.to(tl.int32, bitcast=True))
            middle = tl.maximum(tl.minimum(middle, high - 1), tl.minimum(low + 1, high - 1))
        else:
            middle = (low & high) + ((low ^ high) >> 1)  # their mean without overflow
        count = tl.sum((key >= middle[:, None]).to(tl.int32), axis=1)
        low = tl.where(count >= wanted, middle, low)
        high = tl.where(count > wanted, high, tl.where(count == wanted, middle + 1, middle))
        step += 1

    selected = key >= low[:, None]
    excess = tl.sum(selected.to(tl.int32), axis=1) - wanted
    if tl.max(excess, axis=0) > 0:
        # `end` is the block after the last selected one of equal keys, also by bisection: a
        # cumulative sum would take more registers and shared memory than all of the above.
        tied = key == low[:, None]
        room = tl.sum(tied.to(tl.int32), axis=1) - excess
        few, end = tl.zeros_like(own), tl.full(own.shape, scores.shape[1], tl.int32)
        while tl.max((few + 1 < end).to(tl.int32), axis=0) > 0:
            middle = (few + end) >> 1
            count = tl.sum((tied & (block < middle[:, None])).to(tl.int32), axis=1)
            few = tl.where(count < room, middle, few)
            end = tl.where(count < room, end, middle)
        selected = selected & (~tied | (block < end[:, None]))
    return selected
