"""The methods as the papers define them, one token after the other in plain Python.

`seen` is the definition of a method; those of the papers' methods use nothing of the package's
scoring or selection.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from ratplus_exp.methods import BlockMethod, Dense, Dilated, MoBA, Quest, SnapKV, States, Step
from ratplus_exp.methods.evicting import H2O, TOVA
from ratplus_exp.methods.exact import TopKBlocks, TopKTokens
from ratplus_exp.methods.expected_attention import ExpectedAttention
from ratplus_exp.methods.keydiff import KeyDiff
from ratplus_exp.methods.snapkv import AdaKV
from ratplus_exp.methods.sparq import SparQ
from ratplus_exp.methods.twilight import Twilight
from ratplus_exp.methods.union import MoBADilated, QuestDilated
from ratplus_exp.methods.vertical_slash import VerticalSlash
from ratplus_exp.methods.xattention import XAttention
from ratplus_exp.models.cache import SparseCache


@dataclass(eq=False)
class Row:
    """One sample: q[head][t][d], k and v[kv head][t][d], and how many tokens are its prompt."""

    q: list
    k: list
    v: list
    prompt: int

    def kv(self, head):
        """The KV head that a query head belongs to."""
        return head // (len(self.q) // len(self.k))

    def group(self, kv_head):
        return [head for head in range(len(self.q)) if self.kv(head) == kv_head]


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


@functools.cache
def held(method, row, kv_head):
    """What each decoding step attends to: as many tokens as were kept, and its own, of which the
    one with the lowest score leaves; not one of the `window` newest."""
    keys = row.k[kv_head]
    window = getattr(method, "window", 0)
    masses = dict(enumerate(prompt_scores(method, row, kv_head)))
    stored, steps = kept(method, row, kv_head), []
    for t in range(row.prompt, len(keys)):
        stored = [*stored, t]
        steps.append(stored)
        new = dict.fromkeys(stored, 0.0)
        for head in row.group(kv_head):
            weights = attention_weights(row.q[head][t], [keys[j] for j in stored])
            for j, weight in zip(stored, weights, strict=True):
                new[j] += weight
        before = masses if isinstance(method, H2O) else {}
        masses = {j: before.get(j, 0.0) + new[j] for j in stored}
        if len(stored) > method.top_k:
            old = [j for j in stored if j <= t - window]
            gone = min(old, key=lambda j: (round(masses[j], 7), -j))
            stored = [j for j in stored if j != gone]
    return steps


@functools.cache
def kept(method, row, kv_head):
    """The newest tokens, as many as are always kept, and those with the highest score."""
    n, window = row.prompt, getattr(method, "window", 0)
    if n <= method.top_k:
        return list(range(n))
    prefix = max(0, n - window)
    if isinstance(method, AdaKV):
        return ada(method, row)[kv_head]
    scores = prompt_scores(method, row, kv_head)
    return sorted(best(scores, range(prefix), method.top_k - window)) + list(range(prefix, n))


def best(scores, among, count):
    """Rounded, so that equal scores are ties whatever the order they were summed in."""
    return sorted(among, key=lambda i: (-round(scores[i], 7), i))[: max(0, count)]


def ada(method, row):
    """Each head's window and floor; what is left of H k goes to the highest scores of all heads."""
    n, heads = row.prompt, range(len(row.k))
    scores = [prompt_scores(method, row, head) for head in heads]
    prefix = n - method.window
    floor = max(method.window, int(method.floor_share * method.top_k)) - method.window
    sets = [{*range(prefix, n), *best(scores[head], range(prefix), floor)} for head in heads]
    ranked = sorted(
        (-round(scores[head][i], 7), head, i)
        for head in heads
        for i in range(prefix)
        if i not in sets[head]
    )
    for _, head, i in ranked[: method.top_k * len(heads) - sum(map(len, sets))]:
        sets[head].add(i)
    return [sorted(chosen) for chosen in sets]


@functools.singledispatch
def prompt_scores(method, row, kv_head):
    raise NotImplementedError(f"write {type(method).__name__}'s scores here")


@prompt_scores.register
def _(method: SnapKV, row, kv_head):
    """The window's attention mass on the tokens before it, pooled."""
    prefix = max(0, row.prompt - method.window)
    mass = received(row, kv_head, range(prefix, row.prompt))[:prefix]
    reach = method.kernel // 2
    pooled = []
    for i in range(prefix):
        near = mass[max(0, i - reach) : i + reach + 1]
        pooled.append(
            {"avg": sum(near) / method.kernel, "max": max(near), "none": mass[i]}[method.pooling]
        )
    return pooled


def received(row, kv_head, queries):
    """The attention that a group's queries at these positions give each token of the prompt."""
    mass = [0.0] * row.prompt
    for head in row.group(kv_head):
        for t in queries:
            weights = attention_weights(row.q[head][t], row.k[kv_head][: t + 1])
            mass = [x + y for x, y in zip(mass, [*weights, *[0.0] * row.prompt], strict=False)]
    return mass


@prompt_scores.register
def _(method: TOVA, row, kv_head):
    """The last query's attention; H2O: all queries'."""
    first = 0 if isinstance(method, H2O) else row.prompt - 1
    return received(row, kv_head, range(first, row.prompt))


@prompt_scores.register
def _(method: KeyDiff, row, kv_head):
    """Minus the cosine with the mean of the normalised keys."""
    keys = row.k[kv_head][: row.prompt]
    units = [[x / math.sqrt(dot(key, key)) for x in key] for key in keys]
    mean = [sum(channel) / len(units) for channel in zip(*units, strict=True)]
    return [-dot(unit, mean) / math.sqrt(dot(mean, mean)) for unit in units]


@prompt_scores.register
def _(method: ExpectedAttention, row, kv_head):
    """softmax(μᵀk / √D + kᵀΣk / 2D) averaged over the group, times ‖v‖."""
    keys, values = row.k[kv_head][: row.prompt], row.v[kv_head][: row.prompt]
    d, n = len(keys[0]), row.prompt
    total = [0.0] * n
    for head in row.group(kv_head):
        queries = row.q[head][:n]
        mean = [sum(channel) / n for channel in zip(*queries, strict=True)]
        logits = []
        for key in keys:
            spread = sum((dot(q, key) - dot(mean, key)) ** 2 for q in queries) / n
            logits.append(dot(mean, key) / math.sqrt(d) + spread / (2 * d))
        total = [x + y for x, y in zip(total, softmax(logits), strict=True)]
    weights = [x / len(row.group(kv_head)) for x in total]
    return [w * math.sqrt(dot(v, v)) for w, v in zip(weights, values, strict=True)]


@seen.register
def _(method: Dilated, row, head, t):
    """j <= t with (j + 1) mod D = 0, or t − j <= W, or j < I."""
    d, w, i = method.dilation, method.local, method.initial
    return [j for j in range(t + 1) if (d and (j + 1) % d == 0) or t - j <= w or j < i]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def attention_weights(query, keys):
    return softmax([dot(query, key) / math.sqrt(len(query)) for key in keys])


def softmax(logits):
    highest = max(logits)
    weights = [math.exp(x - highest) for x in logits]
    total = sum(weights)
    return [w / total for w in weights]


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
                found = attention(
                    row.q[head][t], [keys[j] for j in where], [values[j] for j in where]
                )
                if method.mean_value and t >= row.prompt:
                    weights = softmax(token_scores(method, selecting[b], head, t))
                    share = sum(weights[j] for j in where)
                    means = [sum(x) / (t + 1) for x in zip(*values[: t + 1], strict=True)]
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
