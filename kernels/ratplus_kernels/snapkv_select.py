"""SnapKV's selection: which prompt tokens stay in the cache, and the cache that holds just them.

The last W queries of the prompt (the observation window) say what stays: a token's score is the
attention mass that they give it, smoothed over its neighbours and added up over the query heads of
a group, which share the cache. The window itself always stays and counts within the budget.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ratplus_kernels.dispatch import use_triton
from ratplus_kernels.selection import inner_products

Pooling = Literal["avg", "max", "none"]


def snapkv_select(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    top_k: int,
    *,
    pooling: Pooling = "avg",
    kernel: int = 5,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the window and the best-scored tokens before it, top_k tokens in all.

    Args:
        q: the window's queries, (B, H, W, D), as attention sees them (after RoPE). The last one
            belongs to the last of the T tokens.
        k, v: the prompt's keys and values, (B, K, T, D), any strides; H is a multiple of K.
        top_k: tokens to keep, window included; everything is kept where T is not larger.
        pooling, kernel: how scores before the window are smoothed over positions (zeros beyond the
            ends count); an odd number of tokens.
        lse: the prefill's log Σ exp(q · k / √D) over the keys a window query sees, (B, H, W), in
            natural logarithms; saves one pass over k. Found here if None.

    Returns:
        The kept keys and values, (B, K, C, D) with C = min(top_k, T), and their positions
        (B, K, C) int64, ascending. Of equal scores the earlier token stays. No gradients.
    """
    _check(q, k, v, top_k, pooling, kernel)
    with torch.no_grad():
        if not use_triton(q, k, v):
            return snapkv_select_torch(q, k, v, top_k, pooling=pooling, kernel=kernel, lse=lse)
        from ratplus_kernels import snapkv_select_triton

        mass = snapkv_select_triton.attention_mass(q, k, lse)
        kept = _choose(mass, top_k, q.shape[2], pooling, kernel)
        return *snapkv_select_triton.gather(k, v, kept), kept


@torch.no_grad()
def snapkv_select_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    top_k: int,
    *,
    pooling: Pooling = "avg",
    kernel: int = 5,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of `snapkv_select`."""
    kept = _choose(attention_mass_torch(q, k, lse), top_k, q.shape[2], pooling, kernel)
    index = kept[..., None].expand(-1, -1, -1, k.shape[-1])
    return k.gather(2, index), v.gather(2, index), kept


def attention_mass_torch(q: Tensor, k: Tensor, lse: Tensor | None) -> Tensor:
    """The window's attention mass on every token, summed over window and group: (B, K, T)."""
    window, length = q.shape[2], k.shape[2]
    queries = q.unflatten(1, (k.shape[1], -1))  # (B, K, G, W, D)
    logits = inner_products(queries, k.unsqueeze(2)) / math.sqrt(q.shape[-1])
    token = torch.arange(length, device=q.device)
    logits = logits.masked_fill(token > token[-window:, None], -torch.inf)
    if lse is None:
        return logits.softmax(-1).sum((2, 3))
    return (logits - lse.view(queries.shape[:-1]).unsqueeze(-1)).exp().sum((2, 3))


def _choose(mass: Tensor, top_k: int, window: int, pooling: Pooling, kernel: int) -> Tensor:
    """Positions to keep, (B, K, C), from the mass on every token, (B, K, T)."""
    length = mass.shape[-1]
    scores = mass[..., : length - window]  # the window is kept anyway, and lends no score
    if pooling != "none" and scores.shape[-1]:
        pool = F.avg_pool1d if pooling == "avg" else F.max_pool1d
        scores = pool(scores, kernel, stride=1, padding=kernel // 2)
    best = _largest(scores, min(top_k, length) - window)
    recent = torch.arange(length - window, length, device=mass.device)
    return torch.cat((best, recent.expand(*best.shape[:-1], -1)), dim=-1)


def _largest(scores: Tensor, n: int) -> Tensor:
    """Indices of the n largest along the last dimension, ascending; of equals the first.

    Reads the threshold off topk, which may take any of several equals, and counts those itself.
    Never waits for the GPU, so that it can be captured in a graph.
    """
    if n == 0:
        return scores.new_empty((*scores.shape[:-1], 0), dtype=torch.long)
    threshold = scores.topk(n, dim=-1).values[..., -1:]
    above = scores > threshold
    level = scores == threshold
    level &= level.cumsum(-1) <= n - above.sum(-1, keepdim=True)
    chosen = above | level
    slot = torch.where(chosen, chosen.cumsum(-1) - 1, n)  # slot n takes what is not chosen
    index = torch.arange(scores.shape[-1], device=scores.device).expand_as(slot)
    out = slot.new_empty((*slot.shape[:-1], n + 1)).scatter_(-1, slot, index)
    return out[..., :n]


def _check(q: Tensor, k: Tensor, v: Tensor, top_k: int, pooling: str, kernel: int) -> None:
    if k.shape != v.shape or q.shape[1] % k.shape[1] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"snapkv_select needs q (B, H, W, D) and k, v (B, K, T, D) with K dividing H; got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    window, length = q.shape[2], k.shape[2]
    if window > length:
        raise ValueError(f"a window of {window} queries needs as many keys, got {length}")
    if top_k < window:
        raise ValueError(
            f"top_k={top_k} does not hold the window of {window} tokens, which is always kept: "
            "raise the budget or shorten the window"
        )
    if pooling not in ("avg", "max", "none"):
        raise ValueError(f"pooling {pooling!r} is unknown: use avg, max or none")
    if kernel % 2 == 0:
        raise ValueError(f"SnapKV's pooling kernel must be odd, got {kernel}")
