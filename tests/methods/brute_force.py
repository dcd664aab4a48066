"""The methods as the papers define them, one token after the other in plain Python.

`seen` is the definition of a method; those of the papers' methods use nothing of the package's
scoring or selection.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from ratplus_exp.methods import BlockMethod, Dense, Dilated, MoBA, Quest, SnapKV
from ratplus_exp.models.cache import SparseCache, Step


@dataclass
class Row:
    """One sample: q[head][t][d], k and v[kv head][t][d], and how many tokens are its prompt."""

    q: list
    k: list
    v: list
    prompt: int

    def kv(self, head):
        """The KV head that a query head belongs to."""
        return head // (len(self.q) // len(self.k))


@functools.singledispatch
def seen(method, row, head, t):
    """The positions that query t of a head attends to, ascending."""
    raise NotImplementedError(f"write {type(method).__name__}'s definition here")


@seen.register
def _(method: Dense, row, head, t):
    return list(range(t + 1))


@seen.register
def _(method: BlockMethod, row, head, t):
    """A block method without a definition below: by its own score, one block after the other."""
    if (t < row.prompt) == (method.phase == "decode"):
        return list(range(t + 1))

    def score(keys):
        block, query = torch.tensor(keys).double(), torch.tensor(row.q[head][t]).double()
        representative = method.represent(block[None, None, None])
        return float(method.score(query[None, None, None, None], representative))

    return _best_blocks(method, row.k[row.kv(head)], t, score)


@seen.register
def _(method: Quest, row, head, t):
    """While decoding: the blocks with the highest Σ_d max(q_d · min_d, q_d · max_d)."""
    if t < row.prompt:
        return list(range(t + 1))

    def score(keys):
        channels = zip(row.q[head][t], zip(*keys, strict=True), strict=True)
        return sum(max(x * min(channel), x * max(channel)) for x, channel in channels)

    return _best_blocks(method, row.k[row.kv(head)], t, score)


@seen.register
def _(method: MoBA, row, head, t):
    """For every prompt token: the blocks whose mean key has the highest q · mean."""
    if t >= row.prompt:
        return list(range(t + 1))

    def score(keys):
        return dot(row.q[head][t], [sum(x) / len(x) for x in zip(*keys, strict=True)])

    return _best_blocks(method, row.k[row.kv(head)], t, score)


def _best_blocks(method, keys, t, score):
    """The first block, the query's own, and the best of those between, k in all."""
    size = method.block_size
    own = t // size
    forced = {0, own}
    between = [(-score(keys[b * size : (b + 1) * size]), b) for b in range(1, own)]
    chosen = forced | {b for _, b in sorted(between)[: method.top_k - len(forced)]}
    return [j for j in range(t + 1) if j // size in chosen]


@seen.register
def _(method: SnapKV, row, head, t):
    """While decoding: what was kept of the prompt, and every token since."""
    if t < row.prompt:
        return list(range(t + 1))
    return kept(method, row, row.kv(head)) + list(range(row.prompt, t + 1))


def kept(method, row, kv_head):
    """SnapKV: the window, and the prefix tokens with the highest pooled attention mass."""
    n, keys = row.prompt, row.k[kv_head]
    if n <= method.top_k:
        return list(range(n))
    prefix = n - method.window
    mass = [0.0] * prefix
    for head in range(len(row.q)):
        if row.kv(head) != kv_head:
            continue
        for t in range(prefix, n):
            for j, weight in enumerate(attention_weights(row.q[head][t], keys[: t + 1])[:prefix]):
                mass[j] += weight
    reach = method.kernel // 2
    pooled = []
    for i in range(prefix):
        near = mass[max(0, i - reach) : i + reach + 1]
        pooled.append(
            {"avg": sum(near) / method.kernel, "max": max(near), "none": mass[i]}[method.pooling]
        )
    # Rounded, so that equal masses are ties whatever the order they were summed in.
    order = sorted(range(prefix), key=lambda i: (-round(pooled[i], 7), i))
    return sorted(order[: method.top_k - method.window]) + list(range(prefix, n))


@seen.register
def _(method: Dilated, row, head, t):
    """j <= t with (j + 1) mod D = 0, or t − j <= W, or j < I."""
    d, w, i = method.dilation, method.local, method.initial
    return [j for j in range(t + 1) if (d and (j + 1) % d == 0) or t - j <= w or j < i]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def attention_weights(query, keys):
    logits = [dot(query, key) / math.sqrt(len(query)) for key in keys]
    weights = [math.exp(x - max(logits)) for x in logits]
    return [w / sum(weights) for w in weights]


def attention(query, keys, values):
    weights = attention_weights(query, keys)
    return [dot(weights, channel) for channel in zip(*values, strict=True)]


def rows_of(q, k, v, prompts, steps):
    """Each sample without its padding, as lists."""
    return [
        Row(*(x[b, :, : prompt + steps].tolist() for x in (q, k, v)), prompt)
        for b, prompt in enumerate(prompts)
    ]


def attend_by_hand(method, q, k, v, prompts, steps, select_by=None):
    """What `attend` should return."""
    out = torch.full(q.shape, math.nan, dtype=torch.float64)
    rows = rows_of(q, k, v, prompts, steps)
    selecting = rows if select_by is None else rows_of(q, select_by, v, prompts, steps)
    for b, row in enumerate(rows):
        for head in range(q.shape[1]):
            keys, values = row.k[row.kv(head)], row.v[row.kv(head)]
            for t in range(row.prompt + steps):
                where = seen(method, selecting[b], head, t)
                out[b, head, t] = torch.tensor(
                    attention(row.q[head][t], [keys[j] for j in where], [values[j] for j in where])
                )
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
    prompt = cache.attend(layer, *(x[:, :, :width] for x in (q, k, v)), step, by)
    cache.advance(step, len(prompts))
    for b, length in enumerate(prompts):
        out[b, :, :length] = prompt[b, :, :length]
    for i in range(steps):
        step = Step((lengths + i)[:, None])
        new = (x[row, :, lengths + i].unsqueeze(2) for x in (q, k, v))
        by = None if select_by is None else select_by[row, :, lengths + i].unsqueeze(2)
        out[row, :, lengths + i] = cache.attend(layer, *new, step, by)[:, :, 0]
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
