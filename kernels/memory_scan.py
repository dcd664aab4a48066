"""Eq. 1 of P1: the exponentially decaying memory over keys and values, as one linear scan.

    k̃_t = g_t ⊙ k̃_{t-1} + (1 − g_t) ⊙ k_t        ṽ_t = g_t ⊙ ṽ_{t-1} + (1 − g_t) ⊙ v_t

with g_t = sigmoid(z_t). The torch forms below are the definition; on a GPU the Triton kernels of
memory_scan_triton.py run instead. `memory_scan_torch` walks over tokens, all batches,
heads and channels of K and V in one operation a token: on a CPU this beats log-depth and chunked
scans, because it touches each number once and needs no product of gates (so a long run of small
gates underflows to the right answer, zero, instead of to 0/0).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import use_triton


class Blocks(NamedTuple):
    """What methods need to know of the keys' N blocks; a partial last one counts what it has.

    bounds: (B, H, N, 2 D), Quest's per-channel minima, then maxima.
    mean: (B, H, N, D), MoBA's.
    """

    bounds: Tensor
    mean: Tensor


def memory_scan(
    z: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run Eq. 1 over a sequence.

    Args:
        z: gate logits, (B, T, H, D), any strides. One gate a channel, shared by K and V.
        k, v: keys (before RoPE) and values, (B, T, H, D).
        initial_state: (2, B, H, D) fp32, k̃ and ṽ of the token before the first; zeros if None.

    Returns:
        k̃ and ṽ, (B, T, H, D) in the dtype of k and v, and the final state (2, B, H, D) in fp32.
        The recurrence itself runs in fp32 (fp64 for fp64 inputs).
    """
    _same_shapes(z, k, v)
    if not use_triton(z, k, v) or not k.numel():
        return memory_scan_torch(z, k, v, initial_state)
    from kernels import memory_scan_triton

    if initial_state is not None:
        initial_state = initial_state.float().contiguous()
    return memory_scan_triton.Scan.apply(z, k, v, initial_state)


def memory_step(z: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One token of Eq. 1, for decoding: z, k, v (B, H, D), state (2, B, H, D) fp32.

    Returns k̃ and ṽ (B, H, D) in the dtype of k and v, and the new state.
    """
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in (z, k, v, state))
    if use_triton(z, k, v) and not learning:
        from kernels import memory_step_triton

        return memory_step_triton.step(z, k, v, state.float().contiguous())
    k_out, v_out, state = memory_scan(z[:, None], k[:, None], v[:, None], state)
    return k_out[:, 0], v_out[:, 0], state


@torch.no_grad()
def memory_prefill(
    z: Tensor,
    k: Tensor,
    v: Tensor,
    rope: tuple[Tensor, Tensor],
    block_size: int,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Blocks]:
    """Eq. 1 over a prompt, RoPE on k̃, and the blocks' representatives, in one pass, for inference.

    Args:
        z, k, v, initial_state: as in `memory_scan`.
        rope: cosines and sines, (B or 1, T, 1, D), of the half-rotation form: channel d turns with
            channel d + D/2, by the same angle.
        block_size: tokens a block, a power of two; block 0 starts at the first token given.

    Returns:
        The rotated k̃ and ṽ (B, T, H, D), the final state (before RoPE), and the `Blocks` of the
        rotated k̃. No gradients.
    """
    _same_shapes(z, k, v)
    if block_size < 1 or block_size & (block_size - 1):
        raise ValueError(
            f"memory_prefill needs a block_size that is a power of 2, not {block_size}"
        )
    dim = k.shape[-1]
    if dim % 2:
        raise ValueError(f"RoPE needs an even head size, got {dim}")
    if not use_triton(z, k, v) or not k.numel():
        return memory_prefill_torch(z, k, v, rope, block_size, initial_state)
    from kernels import memory_scan_triton

    if initial_state is not None:
        initial_state = initial_state.float().contiguous()
    rope = (rope[0].contiguous(), rope[1].contiguous())
    k_out, v_out, final_state, statistics = memory_scan_triton.forward(
        z, k, v, initial_state, rope, block_size
    )
    return k_out, v_out, final_state, Blocks(*statistics.split((2 * dim, dim), dim=-1))


def memory_scan_torch(
    z: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of `memory_scan`."""
    dtype = torch.promote_types(k.dtype, torch.float32)
    batch, length, heads, dim = z.shape
    if initial_state is None:
        initial_state = z.new_zeros(2, batch, heads, dim, dtype=dtype)
    kv = torch.stack((k, v)).to(dtype)  # (2, B, T, H, D)
    memory = _Scan.apply(z.to(dtype), kv, initial_state.to(dtype))  # (2, B, T, H, D)
    # A copy, since a view would keep the states of all tokens alive in a cache.
    final_state = memory[:, :, -1].clone() if length else initial_state
    return memory[0].to(k.dtype), memory[1].to(v.dtype), final_state


@torch.no_grad()
def memory_prefill_torch(
    z: Tensor,
    k: Tensor,
    v: Tensor,
    rope: tuple[Tensor, Tensor],
    block_size: int,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Blocks]:
    """The definition of `memory_prefill`."""
    wide = torch.promote_types(k.dtype, torch.float32)
    k_out, v_out, state = memory_scan_torch(z, k.to(wide), v.to(wide), initial_state)
    first, second = k_out.chunk(2, dim=-1)
    k_out = k_out * rope[0].to(wide) + torch.cat((-second, first), dim=-1) * rope[1].to(wide)
    blocks = k_out.split(block_size, dim=1)
    bounds = [torch.cat((block.amin(1), block.amax(1)), dim=-1) for block in blocks]
    means = [block.mean(1) for block in blocks]
    statistics = Blocks(*(torch.stack(x, dim=2).to(k.dtype) for x in (bounds, means)))
    return k_out.to(k.dtype), v_out.to(v.dtype), state, statistics


def _same_shapes(z: Tensor, k: Tensor, v: Tensor) -> None:
    if not z.shape == k.shape == v.shape:
        raise ValueError(
            f"memory_scan needs z, k and v of one shape (B, T, H, D); got {tuple(z.shape)}, "
            f"{tuple(k.shape)} and {tuple(v.shape)}"
        )


class _Scan(torch.autograd.Function):
    """h_t = g_t h_{t-1} + (1 − g_t) x_t, time-major inside so that each step is contiguous."""

    @staticmethod
    def forward(ctx, z: Tensor, x: Tensor, initial: Tensor) -> Tensor:
        z = z.movedim(1, 0)  # (T, B, H, D)
        x = x.movedim(2, 0)  # (T, 2, B, H, D)
        gate = torch.sigmoid(z).contiguous()
        # 1 − g as sigmoid(−z): exact where g rounds to 1.
        states = torch.mul(x, torch.sigmoid(-z).unsqueeze(1)).contiguous()
        h = initial
        for g_t, h_t in zip(gate.unbind(0), states.unbind(0), strict=True):
            h = h_t.addcmul_(g_t, h)  # h_t held (1 − g_t) x_t
        ctx.save_for_backward(z, x, gate, states, initial)
        return states.movedim(0, 2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, x, gate, states, initial = ctx.saved_tensors
        # D_t = dh_t + g_{t+1} D_{t+1}: the same recurrence, walked backwards, in place.
        d = grad.movedim(2, 0).clone(memory_format=torch.contiguous_format)
        gates, steps = gate.unbind(0), d.unbind(0)
        for t in range(len(steps) - 2, -1, -1):
            steps[t].addcmul_(gates[t + 1], steps[t + 1])
        previous = torch.cat((initial.unsqueeze(0), states[:-1]))  # h_{t-1}
        dx = d * torch.sigmoid(-z).unsqueeze(1)
        dz = (d * (previous - x)).sum(1) * gate * torch.sigmoid(-z)
        return dz.movedim(0, 1), dx.movedim(0, 2), gate[0] * d[0]
