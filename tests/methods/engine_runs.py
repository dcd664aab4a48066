"""Batches through the engine, and what they should give by the definitions in brute_force.py."""

from __future__ import annotations

import math

import torch
from brute_force import seen, token_scores
from plain_python import rows_of, softmax

from ratplus_exp.methods import States, Step
from ratplus_exp.models.cache import SparseCache


def attend_by_hand(method, q, k, v, prompts, steps, select_by=None):
    """What `attend` should return."""
    out = torch.full(q.shape, math.nan, dtype=torch.float64)
    rows = rows_of(q, k, v, prompts, steps)
    selecting = rows if select_by is None else rows_of(q, select_by, v, prompts, steps)
    for b, row in enumerate(rows):
        for head in range(q.shape[1]):
            for t in range(row.prompt + steps):
                where = seen(method, selecting[b], head, t)
                found = row.attend(head, t, where)
                if method.mean_value and t >= row.prompt:
                    weights = softmax(token_scores(method, selecting[b], head, t))
                    share = sum(weights[j] for j in where)
                    values = row.v[row.kv(head)][: t + 1]
                    means = [sum(x) / (t + 1) for x in zip(*values, strict=True)]
                    found = [share * x + (1 - share) * y for x, y in zip(found, means, strict=True)]
                out[b, head, t] = torch.tensor(found)
    return out


def attend(engine, q, k, v, prompts, steps, layer=0, select_by=None):
    """Run a batch through the engine: prompts of given lengths at once, then token by token.

    q (B, H, T, D), k, v and select_by (B, K, T, D); row b's prompt is its first prompts[b] tokens,
    and what follows is decoded. Returns the outputs (B, H, T, D), NaN behind a row's end, and the
    cache.
    """
    cache = SparseCache(layer + 1, engine)
    row, lengths, width = torch.arange(len(prompts)), torch.tensor(prompts), max(prompts)
    out = torch.full(q.shape, math.nan, dtype=q.dtype)
    step = Step(torch.arange(width)[None], lengths if min(prompts) < width else None)
    by = None if select_by is None else select_by[:, :, :width]
    prompt = cache.attend(layer, States(*(x[:, :, :width] for x in (q, k, v)), step, by))
    cache.advance(step, len(prompts))
    for b, length in enumerate(prompts):
        out[b, :, :length] = prompt[b, :, :length]
    for i in range(steps):
        step = Step((lengths + i)[:, None])
        new = (x[row, :, lengths + i].unsqueeze(2) for x in (q, k, v))
        by = None if select_by is None else select_by[row, :, lengths + i].unsqueeze(2)
        out[row, :, lengths + i] = cache.attend(layer, States(*new, step, by))[:, :, 0]
        cache.advance(step, len(prompts))
    return out, cache


def states(kv_heads, batch=3, heads=4, length=37, dim=4, data="random", seed=0):
    """float64 q, k and v.

    data: "random"; "periodic", integer keys that repeat every three tokens, so that every third
    block of four ties exactly; "equal", one integer key everywhere, so that all candidates tie.
    """
    generator = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(batch, heads, length, dim, generator=generator)
    k, v = torch.randn(2, batch, kv_heads, length, dim, generator=generator)
    if data != "random":
        period = {"periodic": 3, "equal": 1}[data]
        q, k = q.round(), (2 * k).round()[:, :, torch.arange(length) % period]
    return q.double(), k.double(), v.double()
