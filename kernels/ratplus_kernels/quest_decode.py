"""Quest's decoding step (P1, Eq. 3 and 4; Tang et al., 2024): score blocks, select, attend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ratplus_kernels.dispatch import use_triton
from ratplus_kernels.selection import check_top_k, inner_products, select_blocks


def quest_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    representatives: Tensor,
    positions: Tensor,
    *,
    block_size: int,
    top_k: int,
) -> Tensor:
    """Attention of new tokens to the blocks that Quest selects for each query head.

    Args:
        q: queries, (B, H, Q, D), any strides (as of all tensors here).
        k, v: keys and values that hold the new tokens already, (B, K, T, D) with K dividing H;
            row b's token t lies in slot t, and what lies behind its last token is not read.
        representatives: (B, K, N, 2 D), the per-channel minima of each block's keys, then their
            maxima. That of a query's own block is not read, so it may be unfinished.
        positions: (B, Q) int64, which token of its row each query is.
        block_size, top_k: how many tokens a block has, and how many blocks a query attends to:
            block 0 and its own, which are forced and count, then the highest
            Σ_d max(q_d · min_d, q_d · max_d), ties to the lowest index.

    Returns:
        (B, H, Q, D) in the dtype of q. No gradients: this is for decoding.
    """
    check_top_k(top_k)
    if use_triton(q, k, v, representatives):
        from ratplus_kernels.quest_decode_triton import quest_decode_triton as form
    else:
        form = quest_decode_torch
    return form(q, k, v, representatives, positions, block_size, top_k)


def quest_decode_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    representatives: Tensor,
    positions: Tensor,
    block_size: int,
    top_k: int,
) -> Tensor:
    """The definition, with a mask over all tokens."""
    grouped = q.unflatten(1, (k.shape[1], -1))  # (B, K, G, Q, D)
    # max(q·min, q·max) is q·max where q > 0 and q·min elsewhere.
    halves = torch.cat((grouped.clamp(max=0), grouped.clamp(min=0)), dim=-1)
    scores = inner_products(halves, representatives.unsqueeze(2)).flatten(1, 2)
    selected = select_blocks(scores, positions, block_size=block_size, top_k=top_k)
    seen = selected.repeat_interleave(block_size, dim=-1)[..., : k.shape[2]]
    token = torch.arange(k.shape[2], device=k.device)
    seen = seen & (token <= positions[:, None, :, None])
    return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=q.shape[1] != k.shape[1])
