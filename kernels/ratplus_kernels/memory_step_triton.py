"""Triton form of one decoding step of Eq. 1: one launch, a channel a thread."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHANNELS = 256  # a program


def step(z: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """memory_step in one launch: z, k, v (B, H, D), state (2, B, H, D) fp32 and contiguous."""
    _, heads, dim = k.shape
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    v_out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    new = torch.empty_like(state)
    _step_kernel[(triton.cdiv(k.numel(), _CHANNELS),)](
        z, k, v, state, k_out, v_out, new, heads, dim, k.numel(),
        *z.stride(), *k.stride(), *v.stride(), BLOCK=_CHANNELS,
    )  # fmt: skip
    return k_out, v_out, new


@triton.jit
def _step_kernel(
    z_ptr, k_ptr, v_ptr, state_ptr, k_out_ptr, v_out_ptr, new_ptr, H, D, plane,
    z_b, z_h, z_d, k_b, k_h, k_d, v_b, v_h, v_d, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < plane
    d = at % D
    h = (at // D) % H
    b = at // (D * H)
    z = tl.load(z_ptr + b * z_b + h * z_h + d * z_d, mask=inside, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + b * k_b + h * k_h + d * k_d, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + b * v_b + h * v_h + d * v_d, mask=inside, other=0.0).to(tl.float32)
    gate = 1.0 / (1.0 + tl.exp(-z))
    keep = 1.0 / (1.0 + tl.exp(z))
    x = gate * tl.load(state_ptr + at, mask=inside, other=0.0) + keep * k
    y = gate * tl.load(state_ptr + plane + at, mask=inside, other=0.0) + keep * v
    tl.store(new_ptr + at, x, mask=inside)
    tl.store(new_ptr + plane + at, y, mask=inside)
    tl.store(k_out_ptr + at, x, mask=inside)
    tl.store(v_out_ptr + at, y, mask=inside)
