"""What methods that evict keep in the cache, one token after the other in plain Python."""

from __future__ import annotations

import functools
import math

from plain_python import attention_weights, best, dot, softmax

from ratplus_exp.methods import SnapKV
from ratplus_exp.methods.evicting import H2O, TOVA
from ratplus_exp.methods.expected_attention import ExpectedAttention
from ratplus_exp.methods.keydiff import KeyDiff
from ratplus_exp.methods.snapkv import AdaKV


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
        pooled.append({"avg": sum(near) / method.kernel, "max": max(near)}[method.pooling])
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
