"""SnapKV's operations after a prompt: the attention mass that the last W queries (the observation
window) give every token, and a gather of the kept tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ratplus_kernels.dispatch import use_triton
from ratplus_kernels.selection import inner_products


def attention_mass(q: Tensor, k: Tensor) -> Tensor:
    """The attention that the window gives each token, over its queries and a group's heads.

    Args:
        q: the window's queries, (B, H, W, D), as attention sees them (after RoPE). The last one
            belongs to the last of the T tokens.
        k: the prompt's keys, (B, K, T, D), any strides; H is a multiple of K.

    Returns:
        (B, K, T), fp32 or wider. No gradients through the kernel.
    """
    if q.shape[1] % k.shape[1] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"attention_mass needs q (B, H, W, D) and k (B, K, T, D) with K dividing H; got "
            f"{tuple(q.shape)} and {tuple(k.shape)}"
        )
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"a window of {q.shape[2]} queries needs as many keys, got {k.shape[2]}")
    if use_triton(q, k):
        from ratplus_kernels import snapkv_triton

        return snapkv_triton.attention_mass(q, k)
    return window_logits(q, k).softmax(-1).sum(3).sum(2)


def window_logits(q: Tensor, k: Tensor) -> Tensor:
    """Causal q · k / √D of the window, (B, K, G, W, T) for G query heads per KV head."""
    queries = q.unflatten(1, (k.shape[1], -1))
    logits = inner_products(queries, k.unsqueeze(2)) / math.sqrt(q.shape[-1])
    token = torch.arange(k.shape[2], device=q.device)
    return logits.masked_fill(token > token[-q.shape[2] :, None], -torch.inf)


def gather_tokens(k: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens `index` (B, K, C) int64 of k and v (B, K, T, D), any strides: two (B, K, C, D).

    No gradients through the kernel.
    """
    if use_triton(k, v):
        from ratplus_kernels import snapkv_triton

        return snapkv_triton.gather(k, v, index)
    index = index[..., None].expand(-1, -1, -1, k.shape[-1])
    return k.gather(2, index), v.gather(2, index)
