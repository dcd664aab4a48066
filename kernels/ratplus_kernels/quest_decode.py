"""Quest's decoding step (P1, Eq. 3 and 4; Tang et al., 2024): score blocks, select, attend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ratplus_kernels.dispatch import use_triton
from ratplus_kernels.selection import check_top_k, inner_products, select


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
        k, v: keys and values, those of the new tokens included, (B, K, T, D) with K dividing H. A
            row's token t is in slot t; slots after its last token are not read.
        representatives: (B, K, N, 2 D), the per-channel minima of each block's keys, then their
            maxima. Those of a query's own block are not read, so it may be unfinished.
        positions: (B, Q) int64, which token of its row each query is.
        block_size, top_k: how many tokens a block has, and how many blocks a query attends to:
            block 0 and its own, which are forced and count, then the highest
            Σ_d max(q_d · min_d, q_d · max_d), ties to the lowest index.

    Returns:
        (B, H, Q, D) in the dtype of q; no gradients through the kernel. The masks of `Engine` in
        ratplus_exp are the definition; the torch form copies the selected blocks together.
    """
    check_top_k(top_k)
    if use_triton(q, k, v, representatives):
        from ratplus_kernels.quest_decode_triton import quest_decode_triton

        return quest_decode_triton(q, k, v, representatives, positions, block_size, top_k)
    batch, heads, queries, dim = q.shape
    length, blocks = k.shape[2], representatives.shape[2]
    halves = torch.cat((q.clamp(max=0), q.clamp(min=0)), dim=-1)
    grouped = halves.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # (B, K, G Q, 2 D)
    scores = inner_products(grouped, representatives).view(batch, heads, queries, blocks)
    block = torch.arange(blocks, device=q.device)
    local = (positions // block_size)[:, None, :, None]
    forced = (block == 0) | (block == local)
    selected = select(scores, top_k, allowed=block <= local, forced=forced)
    # Their numbers (B, H, Q, top_k), ascending, padded with `blocks`, which is after all queries.
    top_k = min(top_k, blocks)
    slot = torch.where(selected, selected.cumsum(-1) - 1, top_k)
    index = block.new_full((*selected.shape[:-1], top_k + 1), blocks)
    index = index.scatter_(-1, slot, block.expand_as(slot))[..., :top_k]

    size = min(block_size, length)
    first = index * block_size
    start = first.clamp(max=length - size)  # T may end within a block
    token = start[..., None] + torch.arange(size, device=q.device)
    seen = (token >= first[..., None]) & (token <= positions[:, None, :, None, None])
    k, v = (_runs(x, start, size).view(batch, heads * queries, -1, dim) for x in (k, v))
    seen = seen.view(batch, heads * queries, 1, -1)
    out = F.scaled_dot_product_attention(q.flatten(1, 2).unsqueeze(2), k, v, attn_mask=seen)
    return out.view(batch, heads, queries, dim)


def _runs(x: Tensor, start: Tensor, size: int) -> Tensor:
    """Tokens start … start + size − 1 of x (B, K, T, D), start (B, H, Q, N): (B H Q N, size D)."""
    batch, kv_heads, length, dim = x.shape
    if x.stride()[2:] != (dim, 1):
        x = x.contiguous()
    row = torch.arange(batch, device=x.device).view(-1, 1, 1, 1) * x.stride(0)
    head = torch.arange(start.shape[1], device=x.device).view(-1, 1, 1)
    head = head // (start.shape[1] // kv_heads) * x.stride(1)
    # A run is one row of a view whose rows start at every element, so one copy reads it.
    last = (batch - 1) * x.stride(0) + (kv_heads - 1) * x.stride(1) + (length - size) * dim
    rows = x.as_strided((last + 1, size * dim), (1, 1), x.storage_offset())
    return rows.index_select(0, (row + head + start * dim).flatten())
