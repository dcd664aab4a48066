"""Triton form of SnapKV's mass and gather. A token's mass depends on its own key and the window's
log Σ exp (LSE), which a first pass computes in pieces of the sequence."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 64  # keys at a time
_PIECE = 1024  # keys that one program of the LSE pass processes


def attention_mass(q: Tensor, k: Tensor) -> Tensor:
    """Mass of the window q (B, H, W, D) on every key of k (B, K, T, D): (B, K, T) fp32."""
    batch, heads, window, dim = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    sizes = {
        "GROUP": heads // kv_heads,
        "W": window,
        "D": dim,
        # A dot product has no side shorter than 16.
        "BW": max(16, triton.next_power_of_2(window)),
        "BD": max(16, triton.next_power_of_2(dim)),
        "BT": _TILE,
    }
    scale = 1 / math.sqrt(dim)
    pieces = triton.cdiv(length, _PIECE)
    partial = q.new_empty(pieces, batch, heads, window, dtype=torch.float32)
    _lse_kernel[batch * kv_heads, pieces](
        q, k, partial, length, kv_heads, partial.stride(0), scale, *q.stride(), *k.stride(),
        PIECE=_PIECE, **sizes,
    )  # fmt: skip
    mass = q.new_empty(batch, kv_heads, length, dtype=torch.float32)
    _mass_kernel[batch * kv_heads, triton.cdiv(length, _TILE)](
        q, k, partial.logsumexp(0), mass, length, kv_heads, scale, *q.stride(), *k.stride(),
        **sizes,
    )  # fmt: skip
    return mass


def gather(k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `kept` (B, K, C) of k and v (B, K, T, D), both in one launch: two (B, K, C, D)."""
    batch, kv_heads, count = kept.shape
    dim = k.shape[-1]
    k_out, v_out = (x.new_empty(batch, kv_heads, count, dim) for x in (k, v))
    _gather_kernel[batch * kv_heads, triton.cdiv(count, _TILE)](
        k, v, kept.contiguous(), k_out, v_out, count, kv_heads, *k.stride(), *v.stride(),
        D=dim, BD=triton.next_power_of_2(dim), BC=_TILE,
    )  # fmt: skip
    return k_out, v_out


@triton.jit
def _logits(
    q_ptr, k_ptr, q_w, q_d, k_t, k_d, first, T, scale,
    W: tl.constexpr, D: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Scaled q · k of the window and BT keys from `first` on, (BW, BT); −inf where unseen."""
    w = tl.arange(0, BW)[:, None]
    t = first + tl.arange(0, BT)
    d = tl.arange(0, BD)
    q = tl.load(q_ptr + w * q_w + d[None, :] * q_d, mask=(w < W) & (d < D)[None, :], other=0.0)
    k = tl.load(
        k_ptr + t.to(tl.int64)[None, :] * k_t + d[:, None] * k_d,
        mask=(t < T)[None, :] & (d < D)[:, None],
        other=0.0,
    )
    logits = tl.dot(q, k, input_precision="ieee") * scale
    seen = (t[None, :] <= T - W + w) & (w < W)
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def _lse_kernel(
    q_ptr, k_ptr, out_ptr, T, K, plane, scale, q_b, q_h, q_w, q_d, k_b, k_h, k_t, k_d,
    GROUP: tl.constexpr, W: tl.constexpr, D: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr,
    BT: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    piece = tl.program_id(1)
    b = (head // K).to(tl.int64)
    q_ptr += b * q_b + (head % K) * GROUP * q_h
    k_ptr += b * k_b + (head % K) * k_h
    w = tl.arange(0, BW)
    begin = piece * PIECE
    end = tl.minimum(begin + PIECE, T)
    for g in range(GROUP):
        top = tl.full([BW], -1e30, tl.float32)  # finite: a row may see nothing of a piece
        total = tl.zeros([BW], tl.float32)
        for first in range(begin, end, BT):
            logits = _logits(
                q_ptr + g * q_h, k_ptr, q_w, q_d, k_t, k_d, first, T, scale, W, D, BW, BD, BT
            )
            higher = tl.maximum(top, tl.max(logits, axis=1))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher[:, None]), axis=1)
            top = higher
        out = out_ptr + piece * plane + (head * GROUP + g) * W + w
        tl.store(out, top + tl.log(total), mask=w < W)


@triton.jit
def _mass_kernel(
    q_ptr, k_ptr, lse_ptr, out_ptr, T, K, scale, q_b, q_h, q_w, q_d, k_b, k_h, k_t, k_d,
    GROUP: tl.constexpr, W: tl.constexpr, D: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    tile = tl.program_id(1)
    b = (head // K).to(tl.int64)
    q_ptr += b * q_b + (head % K) * GROUP * q_h
    k_ptr += b * k_b + (head % K) * k_h
    w = tl.arange(0, BW)
    first = tile * BT
    mass = tl.zeros([BT], tl.float32)
    for g in range(GROUP):
        logits = _logits(
            q_ptr + g * q_h, k_ptr, q_w, q_d, k_t, k_d, first, T, scale, W, D, BW, BD, BT
        )
        lse = tl.load(lse_ptr + (head * GROUP + g) * W + w, mask=w < W, other=0.0)
        mass += tl.sum(tl.exp(logits - lse[:, None]), axis=0)
    t = first + tl.arange(0, BT)
    tl.store(out_ptr + head.to(tl.int64) * T + t, mass, mask=t < T)


@triton.jit
def _gather_kernel(
    k_ptr, v_ptr, kept_ptr, k_out_ptr, v_out_ptr, C, K, k_b, k_h, k_t, k_d, v_b, v_h, v_t, v_d,
    D: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    b = (head // K).to(tl.int64)
    h = head % K
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    d = tl.arange(0, BD)[None, :]
    row = head.to(tl.int64) * C + c
    t = tl.load(kept_ptr + row, mask=c < C, other=0)[:, None]  # int64
    inside = (c < C)[:, None] & (d < D)
    k = tl.load(k_ptr + b * k_b + h * k_h + t * k_t + d * k_d, mask=inside)
    v = tl.load(v_ptr + b * v_b + h * v_h + t * v_t + d * v_d, mask=inside)
    out = row[:, None] * D + d
    tl.store(k_out_ptr + out, k, mask=inside)
    tl.store(v_out_ptr + out, v, mask=inside)
