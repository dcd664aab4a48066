"""MoBA's prefill (P1, Eq. 3 and 4; Lu et al., 2025): every prompt token attends to few blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ratplus_kernels.dispatch import use_triton
from ratplus_kernels.selection import check_top_k, inner_products, select_blocks

MAX_BLOCKS = 2048  # a query's scores stay in registers, which have room for this many
_CHUNK = 512  # queries whose mask the torch form holds at a time


def moba_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    top_k: int,
    means: Tensor | None = None,
) -> Tensor:
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
        (B, H, T, D) in the dtype of q. The Triton form has no gradients, since P1 uses MoBA at
        inference only; where q, k or v need one, the torch form runs.
    """
    check_top_k(top_k)
    blocks = -(-q.shape[2] // block_size)
    differentiates = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if use_triton(q, k, v) and blocks <= MAX_BLOCKS and not differentiates:
        from ratplus_kernels.moba_prefill_triton import moba_prefill_triton as form
    else:
        form = moba_prefill_torch
    return form(q, k, v, block_size, top_k, means)


def moba_prefill_torch(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, top_k: int, means: Tensor | None = None
) -> Tensor:
    """The definition, with a mask over all tokens for some queries at a time."""
    length, kv_heads = k.shape[2], k.shape[1]
    if means is None:
        # Only a query's own block can be unfinished, and its mean is not read.
        filled = F.pad(k, (0, 0, 0, -length % block_size))
        means = filled.unflatten(2, (-1, block_size)).mean(3)
    means = means.unsqueeze(2)
    token = torch.arange(length, device=q.device)
    out = []
    for queries, position in zip(q.split(_CHUNK, dim=2), token.split(_CHUNK), strict=True):
        scores = inner_products(queries.unflatten(1, (kv_heads, -1)), means).flatten(1, 2)
        selected = select_blocks(scores, position[None], block_size=block_size, top_k=top_k)
        seen = selected.repeat_interleave(block_size, dim=-1)[..., :length]
        seen = seen & (token <= position[:, None])
        out.append(
            F.scaled_dot_product_attention(queries, k, v, seen, enable_gqa=q.shape[1] != kv_heads)
        )
    return torch.cat(out, dim=2)
