"""Attention of one query to its best blocks, in float64 and plain Python, and inputs for it."""

from __future__ import annotations

import math

import torch


def states(
    *, batch=1, heads=2, kv_heads=1, queries=1, length, dim=8, seed=0,
    dtype=torch.float32, device="cpu", integers=False,
):  # fmt: skip
    """Random q (B, H, Q, D), k and v (B, K, T, D), strided as a model's projections leave them.

    integers: small whole numbers that repeat, so that scores are exact and many are equal.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shapes = ((queries, heads), (length, kv_heads), (length, kv_heads))
    tensors = [
        torch.randn(batch, t, h, dim + 3, generator=generator, device=device) for t, h in shapes
    ]
    if integers:
        tensors = [tensor.round() for tensor in tensors]
        tensors[1] = tensors[1][:, torch.arange(length, device=device) % 12]
    return [x.to(dtype)[..., 1 : dim + 1].transpose(1, 2) for x in tensors]


def attend(query, keys, values, position, scores, block_size, top_k):
    """Attention of one query (D,) at `position` to keys and values (T, D) of its best blocks.

    scores: a number for each block. Returns the result (D,) in float64, and by how much the worst
    block chosen by score beats the best one left out.
    """
    own, scores = position // block_size, scores.tolist()
    between = sorted(range(1, own), key=lambda n: (-scores[n], n))
    forced = {0, own}
    room = top_k - len(forced)
    chosen = sorted(forced | set(between[:room]))
    margin = math.inf
    if 0 < room < len(between):
        margin = scores[between[room - 1]] - scores[between[room]]
    first = torch.tensor(chosen, device=keys.device)[:, None] * block_size
    tokens = first + torch.arange(block_size, device=keys.device)
    tokens = tokens[tokens <= position]
    logits = keys[tokens].double() @ query.double() / math.sqrt(len(query))
    return logits.softmax(0) @ values[tokens].double(), margin
