"""Eq. 1 of P1: the exponentially decaying memory over keys and values, as one linear scan.

    k̃_t = g_t ⊙ k̃_{t-1} + (1 − g_t) ⊙ k_t        ṽ_t = g_t ⊙ ṽ_{t-1} + (1 − g_t) ⊙ v_t

with g_t = sigmoid(z_t). The torch forms are the definition. They process one token after the other,
in one operation for all batches, heads and channels of K and V. They cut the sequence into tiles
that fit into a core's cache, which is faster than parallel scans, as these touch every number
several times (docs/kernels.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ratplus_kernels.dispatch import use_triton

_TILE = 128 * 1024  # numbers of K's and V's states in a tile: it stays in a core's L2 cache
_OPERATION = 8 * 1024  # numbers that make one operation worth its launch
LARGEST = 128  # tokens of a block; the prefill kernel keeps a block with both halves of D


class Blocks(NamedTuple):
    """Representatives of the keys' N blocks; the last block may be partial."""

    bounds: Tensor  # (B, H, N, 2 D), Quest's per-channel minima, then maxima
    mean: Tensor  # (B, H, N, D), MoBA's


def memory_scan(
    z: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run Eq. 1 over a sequence.

    Args:
        z: gate logits, (B, T, H, D), any strides. One gate per channel, shared by K and V.
        k, v: keys (before RoPE) and values, (B, T, H, D).
        initial_state: (2, B, H, D) fp32, k̃ and ṽ of the token before the first; zeros if None.

    Returns:
        k̃ and ṽ, (B, T, H, D) in the dtype of k and v, and the final state (2, B, H, D) in fp32.
        The recurrence itself runs in fp32 (fp64 for fp64 inputs).
    """
    _same_shapes(z, k, v)
    if use_triton(z, k, v) and k.numel():
        from ratplus_kernels import memory_scan_triton

        if initial_state is not None:
            initial_state = initial_state.float().contiguous()
        return memory_scan_triton.scan(z, k, v, initial_state)
    dtype = torch.promote_types(k.dtype, torch.float32)
    if initial_state is None:
        initial_state = z.new_zeros(2, len(z), *z.shape[2:], dtype=dtype)
    if not z.numel():
        return k, v, initial_state.to(dtype)
    k_out, v_out = _Scan.apply(*(x.to(dtype) for x in (z, k, v, initial_state)))
    # A copy, since a view would keep the states of all tokens alive in a cache.
    final_state = torch.stack((k_out[:, -1], v_out[:, -1]))
    return k_out.to(k.dtype), v_out.to(v.dtype), final_state


def memory_step(z: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One token of Eq. 1, for decoding: z, k, v (B, H, D), state (2, B, H, D) fp32.

    Returns k̃ and ṽ (B, H, D) in the dtype of k and v, and the new state.
    """
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in (z, k, v, state))
    if use_triton(z, k, v) and not learning:
        from ratplus_kernels import memory_scan_triton

        return memory_scan_triton.step(z, k, v, state.float().contiguous())
    k_out, v_out, state = memory_scan(z[:, None], k[:, None], v[:, None], state)
    return k_out[:, 0], v_out[:, 0], state


@torch.no_grad()
def memory_prefill(
    z: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor], block_size: int
) -> tuple[Tensor, Tensor, Tensor, Blocks]:
    """Eq. 1 over a prompt, RoPE on k̃, and the blocks' representatives, in one pass, no gradients.

    Args:
        z, k, v: as in `memory_scan`.
        rope: cosines and sines, (B or 1, T, 1, D), of the half-rotation form: channel d turns with
            channel d + D/2, by the same angle.
        block_size: tokens per block, a power of two; block 0 starts at the first token given.

    Returns:
        The rotated k̃ and ṽ (B, T, H, D), the final state (before RoPE), and the `Blocks` of the
        rotated k̃.
    """
    _same_shapes(z, k, v)
    if block_size < 1 or block_size & (block_size - 1):
        raise ValueError(
            f"memory_prefill needs a block_size that is a power of 2, not {block_size}"
        )
    dim = k.shape[-1]
    if dim % 2:
        raise ValueError(f"RoPE needs an even head size, got {dim}")
    if use_triton(z, k, v) and k.numel() and block_size <= LARGEST:
        from ratplus_kernels import memory_scan_triton

        rope = (rope[0].contiguous(), rope[1].contiguous())
        k_out, v_out, state, statistics = memory_scan_triton.forward(
            z, k, v, None, rope, block_size
        )
        return k_out, v_out, state, Blocks(*statistics.split((2 * dim, dim), dim=-1))
    wide = torch.promote_types(k.dtype, torch.float32)
    k_out, v_out, state = memory_scan(z, k.to(wide), v.to(wide))
    first, second = k_out.chunk(2, dim=-1)
    k_out = k_out * rope[0].to(wide) + torch.cat((-second, first), dim=-1) * rope[1].to(wide)
    blocks = k_out.split(block_size, dim=1)
    bounds = [torch.cat((block.amin(1), block.amax(1)), dim=-1) for block in blocks]
    means = [block.mean(1) for block in blocks]
    representatives = Blocks(*(torch.stack(x, dim=2).to(k.dtype) for x in (bounds, means)))
    return k_out.to(k.dtype), v_out.to(v.dtype), state, representatives


def _same_shapes(z: Tensor, k: Tensor, v: Tensor) -> None:
    if not z.shape == k.shape == v.shape:
        raise ValueError(
            f"memory_scan needs z, k and v of one shape (B, T, H, D); got {tuple(z.shape)}, "
            f"{tuple(k.shape)} and {tuple(v.shape)}"
        )


class _Scan(torch.autograd.Function):
    """h_t = g_t h_{t-1} + (1 − g_t) x_t for K and V, time-major inside: h is (T, 2, B, H, D)."""

    @staticmethod
    def forward(ctx, z: Tensor, k: Tensor, v: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        gate = z.new_empty(z.shape[1] + 1, *initial.shape[1:])
        gate[-1] = 0  # nothing comes after the last token
        states = z.new_empty(z.shape[1], *initial.shape)
        state = initial
        for tile, segments in _tiles(z.shape[1], initial.numel()):
            z_t, k_t, v_t = (x[:, tile].movedim(1, 0) for x in (z, k, v))
            torch.sigmoid(z_t, out=gate[tile])
            keep = torch.sigmoid(-z_t)  # 1 − g, exact where g rounds to 1
            torch.mul(k_t, keep, out=states[tile, 0])
            torch.mul(v_t, keep, out=states[tile, 1])
            state = _recur(gate[tile], states[tile], state, segments)
        ctx.save_for_backward(z, k, v, gate, states, initial)
        return states[:, 0].movedim(0, 1), states[:, 1].movedim(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z, k, v, gate, states, initial = ctx.saved_tensors
        dz, dk, dv = (torch.empty_like(gate[:-1]) for _ in range(3))
        d = torch.zeros_like(initial)
        for tile, segments in reversed(list(_tiles(z.shape[1], initial.numel()))):
            z_t, k_t, v_t, *grads_t = (x[:, tile].movedim(1, 0) for x in (z, k, v, *grads))
            # D_t = dh_t + g_{t+1} D_{t+1}: the same recurrence, walked backwards.
            steps = torch.stack(grads_t, dim=1)
            following = gate[tile.start + 1 : tile.stop + 1]
            d = _recur(following, steps, d, segments, backwards=True)
            dk_t, dv_t = steps.unbind(1)
            before = initial if tile.start == 0 else states[tile.start - 1]
            previous = torch.cat((before[None], states[tile][:-1]))  # h_{t-1}
            keep = torch.sigmoid(-z_t)
            change = dk_t * (previous[:, 0] - k_t) + dv_t * (previous[:, 1] - v_t)
            torch.mul(change, keep.mul(gate[tile]), out=dz[tile])
            torch.mul(dk_t, keep, out=dk[tile])
            torch.mul(dv_t, keep, out=dv[tile])
        return *(x.movedim(0, 1) for x in (dz, dk, dv)), gate[0] * d


def _tiles(length: int, row: int) -> Iterator[tuple[slice, int]]:
    """`length` tokens of `row` numbers cut into tiles of whole segments: (tokens, segments)."""
    segments = min(max(_OPERATION // row, 1), 16)
    size = max(_TILE // row // segments, 16) * segments
    start = 0
    while start < length:
        left = min(size, length - start)
        if left >= 8 * segments:
            left -= left % segments
        else:
            segments = 1
        yield slice(start, start + left), segments
        start += left


def _recur(
    gate: Tensor, h: Tensor, state: Tensor, segments: int, backwards: bool = False
) -> Tensor:
    """h_t += g_t h_{t-1} in place, from the first token or (backwards) from the last; state is the
    h before it. Returns the h it ends with.

    gate (T, B, H, D), h (T, 2, B, H, D), state (2, B, H, D). All segments of tokens step together,
    since one token may be too few numbers for an operation. Then each segment adds the state before
    it, times the product of its gates (no quotients, which would overflow).
    """
    order = slice(None, None, -1) if backwards else slice(None)
    first = -1 if backwards else 0
    gate = gate.unsqueeze(1).unflatten(0, (segments, -1))
    h = h.unflatten(0, (segments, -1))  # (segments, tokens, 2, B, H, D)
    gates, steps = gate.unbind(1)[order], h.unbind(1)[order]
    steps[0][first].addcmul_(gates[0][first], state)
    for g, before, step in zip(gates[1:], steps, steps[1:], strict=False):
        step.addcmul_(g, before)
    if segments > 1:
        product = gate.clone()
        products = product.unbind(1)[order]
        for before, step in pairwise(products):
            step.mul_(before)
        whole = zip(product.unbind(0)[order], h.unbind(0)[order], strict=True)
        for (_, before), (decay, segment) in pairwise(whole):
            segment.addcmul_(decay, before[-1 - first])
    return steps[-1][-1 - first]
