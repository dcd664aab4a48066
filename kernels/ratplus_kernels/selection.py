"""Eq. 3 of P1: the k best candidates, forced ones first, ties to the lowest index."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 512  # of a running count


def inner_products(q: Tensor, candidates: Tensor) -> Tensor:
    """Scores q · candidate of q (..., Q, D) and candidates (..., N, D), in fp32 at least, as in the
    kernels: in bf16 scores of nearly one size would round to ties."""
    wide = torch.promote_types(q.dtype, torch.float32)
    if q.dim() == 5 and q.shape[2] > candidates.shape[2] == 1:
        # A group's heads as more queries: matmul would copy the candidates for each head.
        scores = q.flatten(2, 3).to(wide) @ candidates[:, :, 0].to(wide).mT
        return scores.unflatten(2, q.shape[2:4])
    return q.to(wide) @ candidates.to(wide).transpose(-1, -2)


def select(scores: Tensor, k: int, *, allowed: Tensor, forced: Tensor) -> Tensor:
    """The k best candidates of scores (..., N) as a mask, fewer where fewer are allowed; allowed
    and forced broadcast to it."""
    ranked = scores.masked_fill(forced, torch.inf).masked_fill(~allowed, -torch.inf)
    # topk, far cheaper than a sort, leaves open which of two equal candidates it takes.
    last = ranked.topk(min(k, ranked.shape[-1]), sorted=False).values.amin(-1, keepdim=True)
    above, ties = ranked > last, ranked == last
    room = k - above.sum(-1, keepdim=True)
    return (above | (ties & (running_count(ties) <= room))) & allowed


def running_count(mask: Tensor) -> Tensor:
    """mask.cumsum(-1) in int32, in chunks: on a GPU torch scans each row by one thread block."""
    if mask.shape[-1] <= CHUNK:
        return mask.cumsum(-1, dtype=torch.int32)
    parts = F.pad(mask, (0, -mask.shape[-1] % CHUNK)).unflatten(-1, (-1, CHUNK))
    parts = parts.cumsum(-1, dtype=torch.int32)
    ends = parts[..., -1:]
    before = ends.cumsum(-2, dtype=torch.int32) - ends
    return (parts + before).flatten(-2)[..., : mask.shape[-1]]


def check_top_k(top_k: int) -> None:
    """Refuse a selection that has no room for the two forced blocks."""
    if top_k < 2:
        raise ValueError(
            f"top_k={top_k} has no room for the first block and the query's own, which are always "
            "selected: use at least 2"
        )
