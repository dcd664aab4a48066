"""The Triton scan as operators of PyTorch, which torch.compile takes as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from ratplus_kernels.memory_scan_triton import backward, forward


@torch.library.custom_op(
    "ratplus_exp::memory_scan",
    mutates_args=(),
    schema="(Tensor z, Tensor k, Tensor v, Tensor? initial) -> (Tensor, Tensor, Tensor)",
)
def scan(z: Tensor, k: Tensor, v: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """memory_scan(z, k, v, initial) on Triton; initial (2, B, H, D) fp32 or None."""
    return forward(z, k, v, initial)[:3]


@scan.register_fake
def _(z: Tensor, k: Tensor, v: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, heads, dim = k.shape
    final = k.new_empty(2, batch, heads, dim, dtype=torch.float32)
    return k.new_empty(k.shape), v.new_empty(v.shape), final


@torch.library.custom_op(
    "ratplus_exp::memory_scan_backward",
    mutates_args=(),
    schema=(
        "(Tensor z, Tensor k, Tensor v, Tensor? initial, Tensor k_out, Tensor v_out, "
        "Tensor dk_out, Tensor dv_out, Tensor d_final) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _scan_backward(
    z: Tensor, k: Tensor, v: Tensor, initial: Tensor | None, *rest: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dz, dk, dv, d_initial = backward(None, z, k, v, initial, *rest)
    return dz, dk, dv, z.new_empty(0) if d_initial is None else d_initial


@_scan_backward.register_fake
def _(
    z: Tensor, k: Tensor, v: Tensor, initial: Tensor | None, *rest: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_initial = z.new_empty(0) if initial is None else torch.empty_like(initial)
    return z.new_empty(z.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_initial


def _keep(ctx, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[:2])


def _differentiate(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
    *gradients, d_initial = _scan_backward(*ctx.saved_tensors, *grads)
    return *gradients, d_initial if ctx.needs_input_grad[3] else None


scan.register_autograd(_differentiate, setup_context=_keep)
