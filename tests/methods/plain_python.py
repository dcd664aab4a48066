"""Attention in plain Python, and what a sample is there: for the definitions of methods."""

from __future__ import annotations

import math
from dataclasses import dataclass


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

    def attend(self, head, t, where):
        """What query t of a head gets from the tokens at `where`."""
        kv = self.kv(head)
        keys, values = ([x[j] for j in where] for x in (self.k[kv], self.v[kv]))
        weights = attention_weights(self.q[head][t], keys)
        return [dot(weights, channel) for channel in zip(*values, strict=True)]


def rows_of(q, k, v, prompts, steps):
    """Each sample without its padding, as lists."""
    return [
        Row(*(x[b, :, : prompt + steps].tolist() for x in (q, k, v)), prompt)
        for b, prompt in enumerate(prompts)
    ]


def best(scores, among, count):
    """Rounded, so that equal scores are ties whatever the order they were summed in."""
    return sorted(among, key=lambda i: (-round(scores[i], 7), i))[: max(0, count)]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def attention_weights(query, keys):
    return softmax([dot(query, key) / math.sqrt(len(query)) for key in keys])


def softmax(logits):
    highest = max(logits)
    weights = [math.exp(x - highest) for x in logits]
    total = sum(weights)
    return [w / total for w in weights]
