"""MoBA's prefill (P1, Eq. 3 and 4; Lu et al., 2025): every prompt token attends to few blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ratplus_kernels.dispatch import use_triton
from ratplus_kernels.selection import check_top_k

MAX_BLOCKS = 2048  # a query's scores stay in registers, which have room for this many


def moba_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    top_k: int,
    means: Tensor | None = None,
) -> Tensor | None:
    """Causal attention of a prompt to itself, block-sparse with each query head's own choice.

    Args:
        q: queries, (B, H, T, D), any strides (as of all tensors here).
        k, v: keys and values, (B, K, T, D) with K dividing H.
        block_size, top_k: how many tokens a block has, and how many blocks a query attends to:
            block 0 and its own (causally), which are forced and count, then the highest
            q · mean of the block's keys, ties to the lowest index.
        means: (B, K, N, D), the mean of each block's keys where something has it already, as
            `memory_prefill` does; found here if None. Those of unfinished blocks are not read.

    Returns:
        (B, H, T, D) in the dtype of q; None where no kernel runs: on a CPU, in float64, beyond
        MAX_BLOCKS, and where q, k or v need a gradient, which the kernel, made for inference, has
        not. The masks of `Engine` in ratplus_exp are the definition.
    """
    check_top_k(top_k)
    blocks = -(-q.shape[2] // block_size)
    differentiates = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if not use_triton(q, k, v) or blocks > MAX_BLOCKS or differentiates:
        return None
    from ratplus_kernels.moba_prefill_triton import moba_prefill_triton

    return moba_prefill_triton(q, k, v, block_size, top_k, means)
