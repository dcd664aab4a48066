"""The memory scan's Triton kernels and their parts, on tiles of (W, L, BD) in fp32.

A tile is W consecutive segments of L tokens, and BD channels. A thread has all tokens of its
segments, so that most of a scan stays in its registers; threads exchange one pair (product of
gates, state) per segment. A token outside the sequence has gate 1 and input 0, so the state passes
over it unchanged.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def combine(a1, x1, y1, a2, x2, y2):
    """First (a1, ·), then (a2, ·): h → a h + x, for two streams that share the gate."""
    return a1 * a2, a2 * x1 + x2, a2 * y1 + y2


@triton.jit
def combine_with_before(
    a1, x1, y1, before_a1, before_x1, before_y1, a2, x2, y2, before_a2, before_x2, before_y2
):
    """`combine`, and the same without the last segment: the state before each segment. The first
    one's must be (1, 0, 0)."""
    return (
        a1 * a2, a2 * x1 + x2, a2 * y1 + y2,
        a1 * before_a2, before_a2 * x1 + before_x2, before_a2 * y1 + before_y2,
    )  # fmt: skip


@triton.jit
def add(a1, x1, y1, a2, x2, y2):
    return a1 + a2, x1 + x2, y1 + y2


@triton.jit
def last(a, x, y, is_last, AXIS: tl.constexpr):
    """a, x and y at the place is_last of an axis. (tl.reduce by `combine` would be wrong, since it
    may take any order.)"""
    return tl.reduce(
        (tl.where(is_last, a, 0.0), tl.where(is_last, x, 0.0), tl.where(is_last, y, 0.0)), AXIS, add
    )


@triton.jit
def walk(a, x, y, W: tl.constexpr, L: tl.constexpr):
    """Of a tile: the maps h → a h + x from before each segment to after each of its tokens, from
    before the tile to before each segment (W, BD), and over the tile (BD)."""
    a, x, y = tl.associative_scan((a, x, y), 1, combine)
    token = tl.arange(0, L)[None, :, None]
    total_a, total_x, total_y = last(a, x, y, token == L - 1, 1)
    none = tl.zeros_like(total_a)
    total_a, total_x, total_y, before_a, before_x, before_y = tl.associative_scan(
        (total_a, total_x, total_y, none + 1.0, none, none), 0, combine_with_before
    )
    segment = tl.arange(0, W)[:, None]
    total_a, total_x, total_y = last(total_a, total_x, total_y, segment == W - 1, 0)
    return a, x, y, before_a, before_x, before_y, total_a, total_x, total_y


@triton.jit
def states(a, x, y, state_x, state_y, W: tl.constexpr, L: tl.constexpr):
    """The states after every token of a tile that is entered with (state_x, state_y), and the
    states it is left with."""
    a, x, y, before_a, before_x, before_y, total_a, total_x, total_y = walk(a, x, y, W, L)
    before_x += before_a * state_x[None, :]
    before_y += before_a * state_y[None, :]
    x += a * before_x[:, None, :]
    y += a * before_y[:, None, :]
    return x, y, total_a * state_x + total_x, total_a * state_y + total_y


@triton.jit
def load(ptr, stride, first, row, d, seen, other, WHOLE: tl.constexpr, VECTOR: tl.constexpr):
    """The tokens `row` (W, L, 1), counted from `first`, of channels d (BD); `other` where not
    `seen`. WHOLE: all are seen."""
    # Caps the channels of one thread: with more of them, threads would have to share a segment.
    at = tl.max_contiguous(row * stride + d[None, None, :], [1, 1, VECTOR])
    ptr += first.to(tl.int64) * stride
    if WHOLE:
        tile = tl.load(ptr + at)
    else:
        tile = tl.load(ptr + at, mask=seen, other=other)
    return tile.to(tl.float32)


@triton.jit
def store(ptr, tile, stride, first, row, d, seen, WHOLE: tl.constexpr, VECTOR: tl.constexpr):
    at = tl.max_contiguous(row * stride + d[None, None, :], [1, 1, VECTOR])
    ptr += first.to(tl.int64) * stride
    if WHOLE:
        tl.store(ptr + at, tile)
    else:
        tl.store(ptr + at, tile, mask=seen)


@triton.jit
def program(H, COLUMNS: tl.constexpr, BD: tl.constexpr):
    """The program's chunk, head (of all batches), batch, head (of H), channels d (BD) of the first
    COLUMNS, and which of them exist."""
    tiles: tl.constexpr = (COLUMNS + BD - 1) // BD
    head = tl.program_id(0) // tiles
    chunk = tl.program_id(1)
    b = (head // H).to(tl.int64)
    h = head % H
    d = (tl.program_id(0) % tiles) * BD + tl.arange(0, BD)
    return chunk, head, b, h, d, d < COLUMNS


@triton.jit
def rows(W: tl.constexpr, L: tl.constexpr):
    """The tokens of a tile, (W, L, 1)."""
    return tl.arange(0, W)[:, None, None] * L + tl.arange(0, L)[None, :, None]


@triton.jit
def load_inputs(
    z_ptr, k_ptr, v_ptr, z_t, k_t, v_t, first, row, d, seen,
    WHOLE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """g, (1 − g) k and (1 − g) v of a tile."""
    z = load(z_ptr, z_t, first, row, d, seen, float("inf"), WHOLE, VECTOR)
    k = load(k_ptr, k_t, first, row, d, seen, 0.0, WHOLE, VECTOR)
    v = load(v_ptr, v_t, first, row, d, seen, 0.0, WHOLE, VECTOR)
    keep = 1.0 / (1.0 + tl.exp(z))  # 1 − g, exact where g rounds to 1
    return 1.0 - keep, keep * k, keep * v


@triton.jit
def load_gradients(
    z_ptr, dk_ptr, dv_ptr, z_t, dk_t, dv_t, last_token, row, d, seen, T,
    WHOLE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """g_{t+1} and the gradients of k̃_t and ṽ_t at t = last_token − row."""
    t = last_token - row
    has_next = (t >= 0) & (t < T - 1)
    after = tl.where(has_next, 1, 0) - row
    z = load(z_ptr, z_t, last_token, after, d, seen, 0.0, WHOLE, VECTOR)
    dk = load(dk_ptr, dk_t, last_token, -row, d, seen, 0.0, WHOLE, VECTOR)
    dv = load(dv_ptr, dv_t, last_token, -row, d, seen, 0.0, WHOLE, VECTOR)
    return tl.where(has_next, 1.0 / (1.0 + tl.exp(-z)), 1.0), dk, dv


@triton.jit
def carry(
    start_ptr, totals_ptr, state, plane, chunk, inside, HAS_START: tl.constexpr, BD: tl.constexpr
):
    """The state before a chunk: the initial one, carried over the chunks before."""
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
def extremes(a1, x1, y1, a2, x2, y2):
    return tl.minimum(a1, a2), tl.maximum(x1, x2), y1 + y2


@triton.jit
def block_statistics(tile, seen, left, ptr, D, inside, BT: tl.constexpr):
    """Store minimum, maximum and mean over a tile's tokens, of which `left` are in the sequence."""
    low = tl.where(seen, tile, float("inf"))
    high = tl.where(seen, tile, float("-inf"))
    sums = tl.where(seen, tile, 0.0)
    low, high, sums = tl.reduce(tl.reduce((low, high, sums), 1, extremes), 0, extremes)
    tl.store(ptr, low, mask=inside)
    tl.store(ptr + D, high, mask=inside)
    tl.store(ptr + 2 * D, sums / tl.minimum(left, BT).to(tl.float32), mask=inside)


@triton.jit
def totals_kernel(
    z_ptr, x_ptr, y_ptr, totals_ptr, T, chunk_length, H, plane,
    z_b, z_t, z_h, x_b, x_t, x_h, y_b, y_t, y_h,
    D: tl.constexpr, REVERSE: tl.constexpr, W: tl.constexpr, L: tl.constexpr, BD: tl.constexpr,
    VECTOR: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The map of a state by each chunk: h → a h + x. Chunks count from the end where REVERSE."""
    chunk, head, b, h, d, inside = program(H, D, BD)
    z_ptr += b * z_b + h * z_h
    x_ptr += b * x_b + h * x_h
    y_ptr += b * y_b + h * y_h
    all_a = tl.full([BD], 1.0, tl.float32)
    all_x = tl.zeros([BD], tl.float32)
    all_y = tl.zeros([BD], tl.float32)
    row = rows(W, L)
    begin = chunk * chunk_length  # never the last chunk, so all its tokens exist
    for t in tl.range(begin, begin + chunk_length, W * L, num_stages=STAGES):
        first = t
        seen = (row >= 0) & inside[None, None, :]  # (W, L, BD)
        if REVERSE:
            a, x, y = load_gradients(
                z_ptr, x_ptr, y_ptr, z_t, x_t, y_t, T - 1 - first, row, d, seen, T, WHOLE, VECTOR
            )
        else:
            a, x, y = load_inputs(
                z_ptr, x_ptr, y_ptr, z_t, x_t, y_t, first, row, d, seen, WHOLE, VECTOR
            )
        _, _, _, _, _, _, a, x, y = walk(a, x, y, W, L)
        all_x = a * all_x + x
        all_y = a * all_y + y
        all_a = a * all_a
    total = totals_ptr + chunk * 3 * plane + head * D + d
    tl.store(total, all_a, mask=inside)
    tl.store(total + plane, all_x, mask=inside)
    tl.store(total + 2 * plane, all_y, mask=inside)


@triton.jit
def forward_kernel(
    z_ptr, k_ptr, v_ptr, start_ptr, totals_ptr, cos_ptr, sin_ptr,
    k_out_ptr, v_out_ptr, final_ptr, statistics_ptr,
    T, chunk_length, H, plane, N,
    z_b, z_t, z_h, k_b, k_t, k_h, v_b, v_t, v_h, rope_b, rope_t,
    D: tl.constexpr, COLUMNS: tl.constexpr, HAS_START: tl.constexpr, ROPE: tl.constexpr,
    WHOLE: tl.constexpr, W: tl.constexpr, L: tl.constexpr, BD: tl.constexpr,
    VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    chunk, head, b, h, d, inside = program(H, COLUMNS, BD)
    # RoPE turns channel d together with d + D / 2, so a program then has both: d2 is the partner.
    d2 = d + COLUMNS
    z_ptr += b * z_b + h * z_h
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    own = b * T * (H * D) + h * D  # of contiguous (B, T, H, D)
    state = head * D + d
    x, y = carry(start_ptr, totals_ptr, state, plane, chunk, inside, HAS_START, BD)
    if ROPE:
        x2, y2 = carry(start_ptr, totals_ptr, state + COLUMNS, plane, chunk, inside, HAS_START, BD)
    row = rows(W, L)
    begin = chunk * chunk_length
    end = tl.minimum(begin + chunk_length, T)
    for t in tl.range(begin, end, W * L, num_stages=STAGES):
        first = t
        seen = (first + row < T) & inside[None, None, :]
        a, kt, vt = load_inputs(
            z_ptr, k_ptr, v_ptr, z_t, k_t, v_t, first, row, d, seen, WHOLE, VECTOR
        )
        kt, vt, x, y = states(a, kt, vt, x, y, W, L)
        store(v_out_ptr + own, vt, H * D, first, row, d, seen, WHOLE, VECTOR)
        block = statistics_ptr + (head.to(tl.int64) * N + first // (W * L)) * (3 * D)
        if ROPE:
            a, kt2, vt2 = load_inputs(
                z_ptr, k_ptr, v_ptr, z_t, k_t, v_t, first, row, d2, seen, WHOLE, VECTOR
            )
            kt2, vt2, x2, y2 = states(a, kt2, vt2, x2, y2, W, L)
            store(v_out_ptr + own, vt2, H * D, first, row, d2, seen, WHOLE, VECTOR)
            angle = b * rope_b
            cos = load(cos_ptr + angle, rope_t, first, row, d, seen, 0.0, WHOLE, VECTOR)
            sin = load(sin_ptr + angle, rope_t, first, row, d, seen, 0.0, WHOLE, VECTOR)
            turned = kt * cos - kt2 * sin
            kt2 = kt2 * cos + kt * sin
            kt = turned
            store(k_out_ptr + own, kt2, H * D, first, row, d2, seen, WHOLE, VECTOR)
            block_statistics(kt2, seen, T - first, block + d2, D, inside, W * L)
        store(k_out_ptr + own, kt, H * D, first, row, d, seen, WHOLE, VECTOR)
        if ROPE:
            block_statistics(kt, seen, T - first, block + d, D, inside, W * L)
    if end == T:
        tl.store(final_ptr + state, x, mask=inside)
        tl.store(final_ptr + plane + state, y, mask=inside)
        if ROPE:
            tl.store(final_ptr + state + COLUMNS, x2, mask=inside)
            tl.store(final_ptr + plane + state + COLUMNS, y2, mask=inside)


@triton.jit
def backward_kernel(
    z_ptr, k_ptr, v_ptr, k_out_ptr, v_out_ptr, dk_out_ptr, dv_out_ptr, d_final_ptr,
    start_ptr, totals_ptr, dz_ptr, dk_ptr, dv_ptr, d_start_ptr,
    T, chunk_length, H, plane,
    z_b, z_t, z_h, k_b, k_t, k_h, v_b, v_t, v_h, dk_b, dk_t, dk_h, dv_b, dv_t, dv_h,
    D: tl.constexpr, HAS_START: tl.constexpr, WHOLE: tl.constexpr,
    W: tl.constexpr, L: tl.constexpr, BD: tl.constexpr, VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    chunk, head, b, h, d, inside = program(H, D, BD)  # chunks count from the end
    z_ptr += b * z_b + h * z_h
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    dk_out_ptr += b * dk_b + h * dk_h
    dv_out_ptr += b * dv_b + h * dv_h
    own = b * T * (H * D) + h * D  # of contiguous (B, T, H, D)
    state = head * D + d
    # D_T is the gradient of the final state, with g_T = 1.
    x, y = carry(d_final_ptr, totals_ptr, state, plane, chunk, inside, True, BD)
    start_k = tl.zeros([BD], tl.float32)
    start_v = tl.zeros([BD], tl.float32)
    if HAS_START:
        start_k += tl.load(start_ptr + state, mask=inside, other=0.0)
        start_v += tl.load(start_ptr + plane + state, mask=inside, other=0.0)
    row = rows(W, L)
    begin = chunk * chunk_length
    end = tl.minimum(begin + chunk_length, T)
    for back in tl.range(begin, end, W * L, num_stages=STAGES):
        last_token = T - 1 - back
        t = last_token - row
        seen = (t >= 0) & inside[None, None, :]
        a, grad_k, grad_v = load_gradients(
            z_ptr, dk_out_ptr, dv_out_ptr, z_t, dk_t, dv_t, last_token, row, d, seen, T,
            WHOLE, VECTOR,
        )  # fmt: skip
        grad_k, grad_v, x, y = states(a, grad_k, grad_v, x, y, W, L)  # D_t of both streams
        z = load(z_ptr, z_t, last_token, -row, d, seen, 0.0, WHOLE, VECTOR)
        k = load(k_ptr, k_t, last_token, -row, d, seen, 0.0, WHOLE, VECTOR)
        v = load(v_ptr, v_t, last_token, -row, d, seen, 0.0, WHOLE, VECTOR)
        at = tl.where(t == 0, 0, -1) - row  # of the token before
        before_k = load(k_out_ptr + own, H * D, last_token, at, d, seen, 0.0, WHOLE, VECTOR)
        before_v = load(v_out_ptr + own, H * D, last_token, at, d, seen, 0.0, WHOLE, VECTOR)
        before_k = tl.where(t == 0, start_k[None, None, :], before_k)
        before_v = tl.where(t == 0, start_v[None, None, :], before_v)
        keep = 1.0 / (1.0 + tl.exp(z))
        dz = (1.0 - keep) * keep * (grad_k * (before_k - k) + grad_v * (before_v - v))
        store(dz_ptr + own, dz, H * D, last_token, -row, d, seen, WHOLE, VECTOR)
        store(dk_ptr + own, keep * grad_k, H * D, last_token, -row, d, seen, WHOLE, VECTOR)
        store(dv_ptr + own, keep * grad_v, H * D, last_token, -row, d, seen, WHOLE, VECTOR)
    if HAS_START and end == T:  # the walk ends with D_0
        z = tl.load(z_ptr + d, mask=inside, other=0.0).to(tl.float32)
        gate = 1.0 / (1.0 + tl.exp(-z))
        tl.store(d_start_ptr + state, gate * x, mask=inside)
        tl.store(d_start_ptr + plane + state, gate * y, mask=inside)
