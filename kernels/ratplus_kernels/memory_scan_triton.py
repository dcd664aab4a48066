"""Triton form of Eq. 1: one pass over z, k and v, sequential over tiles of tokens.

A program walks over the tokens of BD channels of one head, a tile at a time (memory_scan_tiles.py),
for K and V at once. Where batch and heads give too few programs for the GPU, the sequence is cut
into chunks: a first kernel computes each chunk's map of a state ("totals"), and every program of
the second first applies the maps of all earlier chunks to the initial state. The backward pass is
the same walk from the end, over tokens loaded in reverse, since Triton's own reverse scan has open
bugs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ratplus_kernels.memory_scan_tiles import backward_kernel, forward_kernel, totals_kernel

_CHANNELS = 256  # of a program of the step


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
        """The kernels' constants; block_t: tokens instead of the plan's. A larger tile has more
        warps, so that a thread's part of it still fits its registers."""
        block_t = block_t or self.block_t
        segments = min(self.segments, block_t)
        warps = self.warps * max(block_t // self.block_t, 1)
        vector = segments * self.block_d // (32 * warps)  # channels of one thread
        return {
            "W": segments, "L": block_t // segments, "BD": self.block_d,
            "VECTOR": min(max(vector, 1), 8), "STAGES": self.stages, "num_warps": warps,
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
    """k̃, ṽ, the final state, and statistics of blocks. With rope, which comes with a block_size, k̃
    is rotated, and statistics (B, H, N, 3 D) are its minimum, maximum and mean over each block."""
    batch, length, heads, dim = k.shape
    columns = dim // 2 if rope else dim
    plan = plan or default_plan(k, columns)
    block_t = block_size or plan.block_t
    z, k, v = map(_rows, (z, k, v))
    k_out, v_out = k.new_empty(k.shape), v.new_empty(v.shape)
    final = k.new_empty(2, batch, heads, dim, dtype=torch.float32)
    blocks = triton.cdiv(length, block_size) if block_size else 0
    statistics = k.new_empty(batch, heads, blocks, 3 * dim)
    totals, chunk = _totals(z, k, v, plan, block_t, reverse=False)
    cos, sin = rope or (z, z)
    forward_kernel[batch * heads * triton.cdiv(columns, plan.block_d), len(totals) + 1](
        z, k, v, z if initial is None else initial, totals, cos, sin,
        k_out, v_out, final, statistics,
        length, chunk, heads, batch * heads * dim, blocks,
        *z.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        cos.stride(0) if len(cos) > 1 else 0, cos.stride(1),
        D=dim, COLUMNS=columns, HAS_START=initial is not None, ROPE=rope is not None,
        WHOLE=length % block_t == 0 and columns % plan.block_d == 0,
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
    dz, dk, dv = (x.new_empty(x.shape) for x in (z, k, v))
    z, k, v, dk_out, dv_out = map(_rows, (z, k, v, dk_out, dv_out))
    d_initial = None if initial is None else torch.empty_like(initial)
    totals, chunk = _totals(z, dk_out, dv_out, plan, plan.block_t, reverse=True)
    backward_kernel[batch * heads * triton.cdiv(dim, plan.block_d), len(totals) + 1](
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


def _totals(
    z: Tensor, x: Tensor, y: Tensor, plan: Plan, block_t: int, reverse: bool
) -> tuple[Tensor, int]:
    """Gate product and states of every chunk but the last, (chunks − 1, 3, B, H, D) fp32, and the
    tokens of a chunk, whole tiles of block_t."""
    batch, length, heads, dim = z.shape
    chunk = triton.cdiv(triton.cdiv(length, plan.chunks), block_t) * block_t
    shape = (triton.cdiv(length, chunk) - 1, 3, batch, heads, dim)
    totals = z.new_empty(shape, dtype=torch.float32)
    if len(totals):
        totals_kernel[batch * heads * triton.cdiv(dim, plan.block_d), len(totals)](
            z, x, y, totals, length, chunk, heads, batch * heads * dim,
            *z.stride()[:3], *x.stride()[:3], *y.stride()[:3],
            D=dim, REVERSE=reverse, WHOLE=dim % plan.block_d == 0, **plan.tile(block_t),
        )  # fmt: skip
    return totals, chunk


def step(z: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`memory_step` in one launch, one channel per thread; state is contiguous."""
    _, heads, dim = k.shape
    k_out, v_out, new = k.new_empty(k.shape), v.new_empty(v.shape), torch.empty_like(state)
    _step_kernel[(triton.cdiv(k.numel(), _CHANNELS),)](
        z, k, v, state, k_out, v_out, new, heads, dim, k.numel(),
        *z.stride(), *k.stride(), *v.stride(), BLOCK=_CHANNELS,
    )  # fmt: skip
    return k_out, v_out, new


@torch.library.custom_op("ratplus_exp::memory_scan", mutates_args=())
def scan(z: Tensor, k: Tensor, v: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`memory_scan` as an operator, which torch.compile does not change."""
    return forward(z, k, v, initial)[:3]


@scan.register_fake
def _(z: Tensor, k: Tensor, v: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, heads, dim = k.shape
    final = k.new_empty(2, batch, heads, dim, dtype=torch.float32)
    return k.new_empty(k.shape), v.new_empty(v.shape), final


@torch.library.custom_op("ratplus_exp::memory_scan_backward", mutates_args=())
def _scan_backward(
    z: Tensor, k: Tensor, v: Tensor, initial: Tensor | None, k_out: Tensor, v_out: Tensor,
    dk_out: Tensor, dv_out: Tensor, d_final: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads = backward(None, z, k, v, initial, k_out, v_out, dk_out, dv_out, d_final)
    return *grads[:3], z.new_empty(0) if grads[3] is None else grads[3]


@_scan_backward.register_fake
def _(z: Tensor, k: Tensor, v: Tensor, initial: Tensor | None, *_: Tensor) -> tuple[Tensor, ...]:
    d_initial = z.new_empty(0) if initial is None else torch.empty_like(initial)
    return z.new_empty(z.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_initial


def _keep(ctx, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[:2])


def _differentiate(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
    *gradients, d_initial = _scan_backward(*ctx.saved_tensors, *grads)
    return *gradients, d_initial if ctx.needs_input_grad[3] else None


scan.register_autograd(_differentiate, setup_context=_keep)


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
