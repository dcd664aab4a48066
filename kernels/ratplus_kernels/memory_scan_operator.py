"""The Triton scan as operators of PyTorch, which torch.compile takes as they are."""

import torch
from torch import Tensor

from ratplus_kernels.memory_scan_triton import backward, forward


@torch.library.custom_op("ratplus_exp::memory_scan", mutates_args=())
def scan(z: Tensor, k: Tensor, v: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """memory_scan(z, k, v, initial) on Triton; initial (2, B, H, D) fp32 or None."""
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
