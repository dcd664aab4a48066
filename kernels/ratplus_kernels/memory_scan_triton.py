"""Triton form of Eq. 1: one pass over z, k and v, sequential over tiles of tokens.

A program walks over the tokens of BD channels of one head, a tile at a time (memory_scan_tiles.py),
for K and V at once. Where batch and heads give too few programs for the GPU, the sequence is cut
into chunks: a first kernel finds what each chunk does to a state ("totals"), and every program of
the second starts by carrying the initial state over the chunks before its own. The backward pass is
the same walk from the end, over tokens loaded in reverse, since Triton's own reverse scan has open
bugs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ratplus_kernels.memory_scan_tiles import (
    block_statistics,
    carry,
    load,
    load_gradients,
    load_inputs,
    rows,
    states,
    store,
    totals_kernel,
)


class Plan(NamedTuple):
    """How a scan is cut up: a tile's tokens, channels and segments; chunks of the sequence; launch
    options."""

    block_t: int
    block_d: int
    segments: int
    chunks: int = 1
    warps: int = 4
    stages: int = 3

    def tile(self, block_t: int = 0) -> dict[str, int]:
        """The kernels' constants; block_t: tokens in place of the plan's."""
        segments = min(self.segments, block_t or self.block_t)
        vector = segments * self.block_d // (32 * self.warps)  # channels of one thread
        return {
            "W": segments, "L": (block_t or self.block_t) // segments, "BD": self.block_d,
            "VECTOR": min(max(vector, 1), 8), "STAGES": self.stages, "num_warps": self.warps,
        }  # fmt: skip


def default_plan(k: Tensor, columns: int, backward: bool = False) -> Plan:
    """The plan for k (B, T, H, D) where a program takes its channels from the first `columns` of D
    (half of them with RoPE, when it also takes their partners). Measured on an H100
    (`--only plans`)."""
    batch, length, heads, dim = k.shape
    if not k.is_cuda:  # the interpreter: cost grows with the elements of a tile
        return Plan(4, min(4, triton.next_power_of_2(columns)), segments=2, stages=1)
    processors = torch.cuda.get_device_properties(k.device).multi_processor_count
    narrow = backward or columns < dim
    block_d = min(16 if narrow else 32, triton.next_power_of_2(columns))
    tiles = batch * heads * triton.cdiv(columns, block_d)
    chunks = 1
    if tiles < 0.75 * processors:
        chunks = min(triton.cdiv(2 * processors, tiles), triton.cdiv(length, 256))
    return Plan(64, block_d, 16 if narrow else 8, max(chunks, 1))


def forward(
    z: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    rope: tuple[Tensor, Tensor] | None = None,
    block_size: int = 0,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k̃ (rotated, if rope is given), ṽ, the final state, and the blocks' statistics (B, H, N, 3 D):
    minimum, maximum and mean of k̃ over block_size tokens each; N is 0 for block_size 0."""
    batch, length, heads, dim = k.shape
    columns = dim // 2 if rope else dim
    plan = plan or default_plan(k, columns)
    block_t = block_size or plan.block_t
    z, k, v = map(_rows, (z, k, v))
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    v_out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final = torch.empty(2, batch, heads, dim, dtype=torch.float32, device=k.device)
    blocks = triton.cdiv(length, block_size) if block_size else 0
    statistics = torch.empty(batch, heads, blocks, 3 * dim, dtype=k.dtype, device=k.device)
    chunk, chunks = _chunking(length, block_t, plan.chunks)
    tiles = batch * heads * triton.cdiv(columns, plan.block_d)
    totals = _totals((z, k, v), chunk, chunks, False, block_t, plan)
    cos, sin = rope or (z, z)
    _forward_kernel[tiles, chunks](
        z, k, v, z if initial is None else initial, totals, cos, sin,
        k_out, v_out, final, statistics,
        length, chunk, heads, batch * heads * dim, blocks,
        *z.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        cos.stride(0) if len(cos) > 1 else 0, cos.stride(1),
        D=dim, COLUMNS=columns, HAS_START=initial is not None, ROPE=rope is not None,
        BLOCKS=block_size > 0, WHOLE=length % block_t == 0 and columns % plan.block_d == 0,
        **plan.tile(block_t),
    )  # fmt: skip
    return k_out, v_out, final, statistics


def backward(
    plan: Plan | None, z: Tensor, k: Tensor, v: Tensor, initial: Tensor | None,
    k_out: Tensor, v_out: Tensor, dk_out: Tensor, dv_out: Tensor, d_final: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of z, k, v and the initial state from those of k̃, ṽ and the final state."""
    batch, length, heads, dim = k.shape
    plan = plan or default_plan(k, dim, backward=True)
    dz, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (z, k, v))
    z, k, v, dk_out, dv_out = map(_rows, (z, k, v, dk_out, dv_out))
    d_initial = None if initial is None else torch.empty_like(initial)
    chunk, chunks = _chunking(length, plan.block_t, plan.chunks)
    tiles = batch * heads * triton.cdiv(dim, plan.block_d)
    totals = _totals((z, dk_out, dv_out), chunk, chunks, True, plan.block_t, plan)
    _backward_kernel[tiles, chunks](
        z, k, v, k_out, v_out, dk_out, dv_out, d_final.contiguous(),
        z if initial is None else initial, totals,
        dz, dk, dv, z if d_initial is None else d_initial,
        length, chunk, heads, batch * heads * dim,
        *z.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *dk_out.stride()[:3], *dv_out.stride()[:3],
        D=dim, HAS_START=initial is not None,
        WHOLE=length % plan.block_t == 0 and dim % plan.block_d == 0, **plan.tile(),
    )  # fmt: skip
    return dz, dk, dv, d_initial


def _rows(x: Tensor) -> Tensor:
    """With channels one after the other, as kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _chunking(length: int, block_t: int, chunks: int) -> tuple[int, int]:
    """Tokens a chunk, a whole number of tiles, and how many chunks that makes."""
    chunk = triton.cdiv(triton.cdiv(length, chunks), block_t) * block_t
    return chunk, triton.cdiv(length, chunk)


def _totals(
    inputs: tuple[Tensor, Tensor, Tensor],
    chunk: int,
    chunks: int,
    reverse: bool,
    block_t: int,
    plan: Plan,
) -> Tensor:
    """(chunks − 1, 3, B, H, D) fp32: gate product and states of every chunk but the last."""
    batch, length, heads, dim = inputs[0].shape
    shape = (chunks - 1, 3, batch, heads, dim)
    totals = torch.empty(shape, dtype=torch.float32, device=inputs[0].device)
    if chunks > 1:
        tiles = batch * heads * triton.cdiv(dim, plan.block_d)
        z, x, y = inputs
        totals_kernel[tiles, chunks - 1](
            z, x, y, totals, length, chunk, heads, batch * heads * dim,
            *z.stride()[:3], *x.stride()[:3], *y.stride()[:3],
            D=dim, REVERSE=reverse, WHOLE=dim % plan.block_d == 0, **plan.tile(block_t),
        )  # fmt: skip
    return totals


@triton.jit
def _forward_kernel(
    z_ptr, k_ptr, v_ptr, start_ptr, totals_ptr, cos_ptr, sin_ptr,
    k_out_ptr, v_out_ptr, final_ptr, statistics_ptr,
    T, chunk_length, H, plane, N,
    z_b, z_t, z_h, k_b, k_t, k_h, v_b, v_t, v_h, rope_b, rope_t,
    D: tl.constexpr, COLUMNS: tl.constexpr, HAS_START: tl.constexpr, ROPE: tl.constexpr,
    BLOCKS: tl.constexpr, WHOLE: tl.constexpr, W: tl.constexpr, L: tl.constexpr,
    BD: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (COLUMNS + BD - 1) // BD
    head = tl.program_id(0) // tiles
    chunk = tl.program_id(1)
    b = (head // H).to(tl.int64)
    h = head % H
    # RoPE turns channel d together with d + D / 2, so a program then has both: d2 is the partner.
    d = (tl.program_id(0) % tiles) * BD + tl.arange(0, BD)
    inside = d < COLUMNS
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
            if BLOCKS:
                block_statistics(kt2, seen, T - first, block + d2, D, inside, W * L)
        store(k_out_ptr + own, kt, H * D, first, row, d, seen, WHOLE, VECTOR)
        if BLOCKS:
            block_statistics(kt, seen, T - first, block + d, D, inside, W * L)
    if end == T:
        tl.store(final_ptr + state, x, mask=inside)
        tl.store(final_ptr + plane + state, y, mask=inside)
        if ROPE:
            tl.store(final_ptr + state + COLUMNS, x2, mask=inside)
            tl.store(final_ptr + plane + state + COLUMNS, y2, mask=inside)


@triton.jit
def _backward_kernel(
    z_ptr, k_ptr, v_ptr, k_out_ptr, v_out_ptr, dk_out_ptr, dv_out_ptr, d_final_ptr,
    start_ptr, totals_ptr, dz_ptr, dk_ptr, dv_ptr, d_start_ptr,
    T, chunk_length, H, plane,
    z_b, z_t, z_h, k_b, k_t, k_h, v_b, v_t, v_h, dk_b, dk_t, dk_h, dv_b, dv_t, dv_h,
    D: tl.constexpr, HAS_START: tl.constexpr, WHOLE: tl.constexpr,
    W: tl.constexpr, L: tl.constexpr, BD: tl.constexpr, VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (D + BD - 1) // BD
    head = tl.program_id(0) // tiles
    chunk = tl.program_id(1)  # counted from the end of the sequence
    b = (head // H).to(tl.int64)
    h = head % H
    d = (tl.program_id(0) % tiles) * BD + tl.arange(0, BD)
    inside = d < D
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
            z_ptr,
            dk_out_ptr,
            dv_out_ptr,
            z_t,
            dk_t,
            dv_t,
            last_token,
            row,
            d,
            seen,
            T,
            WHOLE,
            VECTOR,
        )
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
