"""Quest's decoding step (P1, Eq. 3 and 4; Tang et al., 2024): score blocks, select, attend."""

from __future__ import annotations

from torch import Tensor

from ratplus_kernels.dispatch import use_triton
from ratplus_kernels.selection import check_top_k


def quest_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    representatives: Tensor,
    positions: Tensor,
    *,
    block_size: int,
    top_k: int,
) -> Tensor | None:
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
        (B, H, Q, D) in the dtype of q, without gradients; None where no kernel runs. The masks of
        `Engine` in ratplus_exp are the definition.
    """
    check_top_k(top_k)
    if not use_triton(q, k, v, representatives):
        return None
    from ratplus_kernels.quest_decode_triton import quest_decode_triton

    return quest_decode_triton(q, k, v, representatives, positions, block_size, top_k)
