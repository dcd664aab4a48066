"""The methods as the papers define them, one token after the other in plain Python.

`seen` is the definition of a method; those of the papers' methods use nothing of the package's
scoring or selection.
"""

from __future__ import annotations

import functools
import math

import torch
from brute_force_evicting import held, kept
from plain_python import attention_weights, best, dot, softmax

from ratplus_exp.methods import BlockMethod, Dense, Dilated, MoBA, Quest, SnapKV
from ratplus_exp.methods.evicting import TOVA
from ratplus_exp.methods.exact import TopKBlocks, TopKTokens
from ratplus_exp.methods.expected_attention import ExpectedAttention
from ratplus_exp.methods.keydiff import KeyDiff
from ratplus_exp.methods.sparq import SparQ
from ratplus_exp.methods.twilight import Twilight
from ratplus_exp.methods.union import MoBADilated, QuestDilated
from ratplus_exp.methods.vertical_slash import VerticalSlash
from ratplus_exp.methods.xattention import XAttention


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
def _(method: TopKBlocks, row, head, t):
    """While decoding: the blocks with the highest Σ exp(q · k / √D)."""
    if t < row.prompt:
        return list(range(t + 1))

    def score(keys):
        return math.log(sum(math.exp(dot(row.q[head][t], k) / math.sqrt(len(k))) for k in keys))

    return _best_blocks(method, row.k[row.kv(head)], t, score)


@seen.register
def _(method: QuestDilated | MoBADilated, row, head, t):
    """The blocks of the one or the other, and j <= t with (j + 1) mod D = 0 in its phase."""
    selects = Quest if isinstance(method, Quest) else MoBA
    blocks = seen(selects(method.block_size, method.top_k), row, head, t)
    return [j for j in range(t + 1) if j in blocks or (j + 1) % method.dilation == 0]


@seen.register
def _(method: TopKTokens, row, head, t):
    """While decoding: the first token, the newest, and those with the highest score."""
    if t < row.prompt:
        return list(range(t + 1))
    scores = token_scores(method, row, head, t)
    between = best(scores, range(1, t), method.top_k - len({0, t}))
    return sorted({0, t, *between})


@seen.register
def _(method: XAttention, row, head, t):
    """For each block of the prompt's queries: by the softmaxes of their groups, of which each has
    with a group of keys the sum of q · k over the antidiagonal."""
    if t >= row.prompt:
        return list(range(t + 1))
    size, s, keys, d = method.block_size, method.stride, row.k[row.kv(head)], len(row.q[0][0])
    own = t // size
    mass = [0.0] * own
    for u in range(own * size, (own + 1) * size, s) if own else ():
        logits = [0.0] * (own * size // s)
        for i in range(s):
            if u + s - 1 - i < row.prompt:
                for w in range(len(logits)):
                    logits[w] += dot(row.q[head][u + s - 1 - i], keys[w * s + i])
        for w, weight in enumerate(softmax([x / (s * math.sqrt(d)) for x in logits])):
            mass[w * s // size] += weight
    chosen = {0, own, *best(mass, range(1, own), method.top_k - 2)}
    return [j for j in range(t + 1) if j // size in chosen]


@seen.register
def _(method: VerticalSlash, row, head, t):
    """In the prompt: columns and distances, by the attention of its last queries."""
    if t >= row.prompt:
        return list(range(t + 1))
    columns, distances = vertical_slash(method, row, head)
    return [j for j in range(t + 1) if j in columns or t - j in distances]


@functools.cache
def vertical_slash(method, row, head):
    n, keys = row.prompt, row.k[row.kv(head)]
    columns, distances = [0.0] * n, [0.0] * n
    for t in range(max(0, n - method.window), n):
        for j, weight in enumerate(attention_weights(row.q[head][t], keys[: t + 1])):
            columns[j] += weight
            distances[t - j] += weight
    half = method.top_k // 2 - 1
    return [{0, *best(scores, range(1, n), half)} for scores in (columns, distances)]


@functools.singledispatch
def token_scores(method, row, head, t):
    """TopKTokens: q · k."""
    return [dot(row.q[head][t], key) for key in row.k[row.kv(head)][: t + 1]]


@token_scores.register
def _(method: SparQ, row, head, t):
    """q · k over the r channels of largest |q_d|, by √(D Σ_r |q| / Σ |q|)."""
    q = row.q[head][t]
    r = max(1, round(method.channels * len(q)))
    channels = sorted(range(len(q)), key=lambda d: -abs(q[d]))[:r]
    share = sum(abs(q[d]) for d in channels) / sum(map(abs, q))
    keys = row.k[row.kv(head)][: t + 1]
    return [sum(q[d] * k[d] for d in channels) / math.sqrt(len(q) * share) for k in keys]


@seen.register
def _(method: Twilight, row, head, t):
    if t < row.prompt:
        return list(range(t + 1))
    return twilight(method, row, t)[head]


@functools.cache
def twilight(method, row, t):
    """Of each head: the smallest sets of likeliest candidates with mass >= p, one p for all heads,
    such that they have H k tokens in all; the first and the newest token are among them."""
    ranked = []
    sets = [{0, t} for _ in row.q]
    size, blocks = method.page, max(2, -(-method.candidates * method.top_k // method.page))
    for head, q in enumerate(row.q):
        candidates = seen(Quest(size, blocks), row, head, t)
        keys = row.k[row.kv(head)]
        weights = softmax([dot(q[t], keys[j]) / math.sqrt(len(q[t])) for j in candidates])
        before = 0.0
        for i in sorted(range(len(candidates)), key=lambda i: (-round(weights[i], 9), i)):
            ranked.append((round(before, 9), head, candidates[i]))
            before += weights[i]
    room = method.top_k * len(row.q) - sum(map(len, sets))
    for _, head, j in sorted(x for x in ranked if x[2] not in (0, t))[: max(0, room)]:
        sets[head].add(j)
    return [sorted(chosen) for chosen in sets]


@seen.register
def _(method: SnapKV | KeyDiff | ExpectedAttention, row, head, t):
    """While decoding: what was kept of the prompt, and every token since."""
    if t < row.prompt:
        return list(range(t + 1))
    return kept(method, row, row.kv(head)) + list(range(row.prompt, t + 1))


@seen.register
def _(method: TOVA, row, head, t):
    if t < row.prompt:
        return list(range(t + 1))
    return held(method, row, row.kv(head))[t - row.prompt]


@seen.register
def _(method: Dilated, row, head, t):
    """j <= t with (j + 1) mod D = 0, or t − j <= W, or j < I."""
    d, w, i = method.dilation, method.local, method.initial
    return [j for j in range(t + 1) if (d and (j + 1) % d == 0) or t - j <= w or j < i]
