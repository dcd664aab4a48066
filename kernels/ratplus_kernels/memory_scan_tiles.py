"""What the memory scan's Triton kernels are made of: tiles of (BT tokens, BD channels) in fp32.

A token outside the sequence has gate 1 and input 0, so the state passes over it unchanged.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def combine(a1, x1, y1, a2, x2, y2):
    """First (a1, ·), then (a2, ·): h → a h + x, for two streams that share the gate."""
    return a1 * a2, a2 * x1 + x2, a2 * y1 + y2


@triton.jit
def last_row(tile, BT: tl.constexpr):
    row = tl.arange(0, BT)[:, None]
    return tl.sum(tl.where(row == BT - 1, tile, 0.0), axis=0)


@triton.jit
def walk(a, x, y, state_x, state_y, BT: tl.constexpr):
    """The states after every token of a tile that is entered with (state_x, state_y), and the
    states it is left with."""
    a, x, y = tl.associative_scan((a, x, y), 0, combine)
    x += a * state_x[None, :]
    y += a * state_y[None, :]
    return x, y, last_row(x, BT), last_row(y, BT)


@triton.jit
def load_inputs(
    z_ptr, k_ptr, v_ptr, z_t, k_t, v_t, z_d, k_d, v_d, first, d, inside, T, BT: tl.constexpr
):
    """g, (1 − g) k and (1 − g) v of the BT tokens from `first` on."""
    row = tl.arange(0, BT)[:, None]
    column = d[None, :]
    seen = (first + row < T) & inside[None, :]
    start = first.to(tl.int64)
    z_at = z_ptr + start * z_t + (row * z_t + column * z_d)
    k_at = k_ptr + start * k_t + (row * k_t + column * k_d)
    v_at = v_ptr + start * v_t + (row * v_t + column * v_d)
    z = tl.load(z_at, mask=seen, other=float("inf")).to(tl.float32)
    k = tl.load(k_at, mask=seen, other=0.0).to(tl.float32)
    v = tl.load(v_at, mask=seen, other=0.0).to(tl.float32)
    keep = 1.0 / (1.0 + tl.exp(z))  # 1 − g, exact where g rounds to 1
    return 1.0 / (1.0 + tl.exp(-z)), keep * k, keep * v


@triton.jit
def load_reversed(ptr, stride_t, stride_d, t, d, inside):
    """A tile at tokens t (BT, 1); zero where t < 0."""
    at = ptr + t.to(tl.int64) * stride_t + d[None, :] * stride_d
    return tl.load(at, mask=(t >= 0) & inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def load_gradients(
    z_ptr, dk_ptr, dv_ptr, z_t, dk_t, dv_t, z_d, dk_d, dv_d, back, d, inside, T, BT: tl.constexpr
):
    """g_{t+1} and the gradients of k̃_t and ṽ_t, at t = T − 1 − back and before."""
    t = (T - 1 - back - tl.arange(0, BT))[:, None]
    seen = (t >= 0) & (t < T - 1) & inside[None, :]
    z_at = z_ptr + (t + 1).to(tl.int64) * z_t + d[None, :] * z_d
    z = tl.load(z_at, mask=seen, other=float("inf")).to(tl.float32)
    dk = load_reversed(dk_ptr, dk_t, dk_d, t, d, inside)
    dv = load_reversed(dv_ptr, dv_t, dv_d, t, d, inside)
    return 1.0 / (1.0 + tl.exp(-z)), dk, dv


@triton.jit
def carry(
    start_ptr, totals_ptr, state, plane, chunk, inside, HAS_START: tl.constexpr, BD: tl.constexpr
):
    """The state that a chunk is entered with: the initial one, carried over the chunks before."""
    x = tl.zeros([BD], tl.float32)
    y = tl.zeros([BD], tl.float32)
    if HAS_START:
        x = tl.load(start_ptr + state, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(start_ptr + plane + state, mask=inside, other=0.0).to(tl.float32)
    for i in range(chunk):
        total = totals_ptr + i * 3 * plane + state
        a = tl.load(total, mask=inside, other=1.0)
        x = a * x + tl.load(total + plane, mask=inside, other=0.0)
        y = a * y + tl.load(total + 2 * plane, mask=inside, other=0.0)
    return x, y


@triton.jit
def block_statistics(tile, seen, left, ptr, D, inside, BT: tl.constexpr):
    """Store minimum, maximum and mean over a tile's tokens, of which `left` are in the sequence."""
    tl.store(ptr, tl.min(tl.where(seen, tile, float("inf")), axis=0), mask=inside)
    tl.store(ptr + D, tl.max(tl.where(seen, tile, float("-inf")), axis=0), mask=inside)
    mean = tl.sum(tl.where(seen, tile, 0.0), axis=0) / tl.minimum(left, BT).to(tl.float32)
    tl.store(ptr + 2 * D, mean, mask=inside)


@triton.jit
def totals_kernel(
    z_ptr, x_ptr, y_ptr, totals_ptr, T, chunk_length, H, plane,
    z_b, z_t, z_h, z_d, x_b, x_t, x_h, x_d, y_b, y_t, y_h, y_d,
    D: tl.constexpr, REVERSE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """What each chunk does to a state: h → a h + x. Chunks count from the end where REVERSE."""
    tiles: tl.constexpr = (D + BD - 1) // BD
    head = tl.program_id(0) // tiles
    chunk = tl.program_id(1)
    b = (head // H).to(tl.int64)
    h = head % H
    d = (tl.program_id(0) % tiles) * BD + tl.arange(0, BD)
    inside = d < D
    z_ptr += b * z_b + h * z_h
    x_ptr += b * x_b + h * x_h
    y_ptr += b * y_b + h * y_h
    total_a = tl.full([BD], 1.0, tl.float32)
    total_x = tl.zeros([BD], tl.float32)
    total_y = tl.zeros([BD], tl.float32)
    begin = chunk * chunk_length  # never the last chunk, so it is whole
    for t in tl.range(begin, begin + chunk_length, BT, num_stages=STAGES):
        first = t
        if REVERSE:
            a, x, y = load_gradients(
                z_ptr, x_ptr, y_ptr, z_t, x_t, y_t, z_d, x_d, y_d, first, d, inside, T, BT
            )
        else:
            a, x, y = load_inputs(
                z_ptr, x_ptr, y_ptr, z_t, x_t, y_t, z_d, x_d, y_d, first, d, inside, T, BT
            )
        a, x, y = tl.associative_scan((a, x, y), 0, combine)
        tile_a = last_row(a, BT)
        total_x = tile_a * total_x + last_row(x, BT)
        total_y = tile_a * total_y + last_row(y, BT)
        total_a = tile_a * total_a
    total = totals_ptr + chunk * 3 * plane + head * D + d
    tl.store(total, total_a, mask=inside)
    tl.store(total + plane, total_x, mask=inside)
    tl.store(total + 2 * plane, total_y, mask=inside)
