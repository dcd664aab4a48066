"""One engine for every method: selection (Eq. 3) and attention over what was selected (Eq. 4).

Rows of a batch are aligned at their first token (the model turns left padding into right padding),
so block i of every row is its own tokens [i · block_size, (i + 1) · block_size), and padding lies
behind every row's last token, out of every real query's causal sight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ratplus_exp.methods.attention import attend
from ratplus_exp.methods.base import EVICTING, Dense, Method
from ratplus_exp.methods.selectors import Selector, TopK
from ratplus_exp.methods.usage import Usage
from ratplus_kernels.selection import inner_products, select

Recorder = Callable[[int, Tensor, Tensor, Tensor], None]
QUERY_CHUNK = 512  # prompt queries whose selection is in memory at a time
EMPTY = torch.iinfo(torch.int64).max  # in the place of the position of a slot without a token


@dataclass
class Engine:
    """A method with its selector, as it runs over one batch.

    recorder: called on every selection with (layer, rows (R,), positions (R or 1, Q), selected
        (R, K, G, Q, N) bool), rows being those of the batch that it is about; H1 counts its hits
        there.
    rows: the rows of the batch that this engine sees; None: all.
    layers: how many the model has; a cache sets it.
    handed: the last selection of a layer, for those that take it over (`Method.anchor`).
    """

    method: Method = field(default_factory=Dense)
    selector: Selector = field(default_factory=TopK)
    recorder: Recorder | None = None
    usage: Usage = field(default_factory=Usage)
    rows: Tensor | None = None
    layers: int = 1
    handed: Tensor | None = None

    def for_rows(self, rows: Tensor) -> Engine:
        """The engine over some rows of its batch."""
        assert self.rows is None
        return replace(self, selector=self.selector.rows(rows), rows=rows)

    def _fast(self, path: Callable[..., Tensor | None], *states: Any) -> Tensor | None:
        """What a fast path of the method gives; None where the engine must select.

        A recorder needs the selection itself, and a fast path has the method's own top-k in it.
        """
        if self.recorder is not None or type(self.selector) is not TopK:
            return None
        return path(*states)

    def prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Tensor | None,
        layer: int,
        representatives: Tensor | None = None,
        select_by: Tensor | None = None,
    ) -> Tensor:
        """Attention of a whole prompt to itself.

        q (B, H, T, D), k and v (B, K, T, D), lengths (B,) real tokens of each row (None: all T),
        representatives (B, K, N, *) of the blocks (None: found here where needed), select_by
        (B, K, T, D) the keys to select by (None: k).
        Returns (B, H, T, D); what it holds behind a row's length is meaningless.
        """
        length = q.shape[2]
        position = torch.arange(length, device=q.device)
        if select_by is not None and self.method.phase == "prefill":
            representatives = self.block_representatives(select_by)
        out = self._fast(self.method.attend_prefill, q, k, v, representatives)
        if out is not None:
            attended = self.method.attended(position).float()
            self._count(attended.expand(len(q), -1), position, q, layer, lengths)
            return out
        if self.method.phase == "prefill":
            if representatives is None:
                representatives = self.block_representatives(k)
            return self._sparse_prefill(q, k, v, lengths, layer, representatives)
        seen = self._pattern(None, position[:, None], position)
        if seen is None:
            return attend(q, k, v, causal=True)
        seen = seen & (position <= position[:, None])
        self._count(seen.sum(-1).expand(len(q), -1).float(), position, q, layer, lengths)
        return attend(q, k, v, seen[None, None])

    def _pattern(self, phase: str | None, query: Tensor, key: Tensor) -> Tensor | None:
        """The method's pattern where it holds: throughout, or in the phase of its selection."""
        return self.method.pattern(query, key) if self.method.phase in (None, phase) else None

    def _count(
        self,
        attended: Tensor,
        positions: Tensor,
        q: Tensor,
        layer: int,
        lengths: Tensor | None = None,
    ) -> None:
        """Usage of queries q: attended (B, Q), positions (B or 1, Q), real up to lengths."""
        positions = positions.expand(attended.shape)
        if lengths is not None:
            positions = positions.masked_fill(positions >= lengths[:, None], -1)
        self.usage.add(
            attended, positions, self.method.choosing(positions, q.shape[-1], layer)
        )

    def _sparse_prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Tensor | None,
        layer: int,
        representatives: Tensor,
    ) -> Tensor:
        size, length = self.method.block_size, q.shape[2]
        key, chunk = torch.arange(length, device=q.device), -(-QUERY_CHUNK // size) * size
        out = []
        for start in range(0, length, chunk):
            queries = q[:, :, start : start + chunk]
            position = key[start : start + chunk]
            blocks = self.select_blocks(queries, representatives, position[None], layer)
            seen = blocks.repeat_interleave(size, dim=-1)[..., :length].flatten(1, 2)
            pattern = self._pattern("prefill", position[:, None], key)
            seen = (seen if pattern is None else seen | pattern) & (key <= position[:, None])
            out.append(attend(queries, k, v, seen))
            self._count(seen.sum(-1).float().mean(1), position, q, layer, lengths)
        return torch.cat(out, dim=2)

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        representatives: Tensor | None,
        layer: int,
        held: Tensor | None = None,
        select_by: Tensor | None = None,
        all_seen: bool = False,
    ) -> Tensor:
        """Attention of new tokens to a cache that already holds them.

        q (B, H, Q, D); k, v (B, K, T, D); positions (B, Q), which token of its row each query is;
        representatives (B, K, N, *) of the blocks, for methods that select blocks while decoding;
        held (B, K, T), the token in each slot (None: slot i holds token i); select_by
        (B, K, T, D), the keys to select by (None: k); all_seen, whether every query comes after
        all T slots, so that no mask is needed.
        """
        method = self.method
        out = self._fast(method.attend_decode, q, k, v, representatives, positions, all_seen)
        if out is not None:
            self._count(method.attended(positions).float(), positions, q, layer)
            return out
        query = positions[:, None, None, :, None]
        slot = torch.arange(k.shape[2], device=q.device) if held is None else held[:, :, None, None]
        pattern = self._pattern("decode", query, slot)
        if all_seen and pattern is None and method.phase != "decode":
            if method.phase in EVICTING:
                self._count(torch.full_like(positions, k.shape[2]).float(), positions, q, layer)
            return attend(q, k, v)
        seen = past = slot <= query  # (B, 1 or K, 1 or G, Q, T)
        if method.phase == "decode":
            if representatives is None:
                representatives = self.represent(k if select_by is None else select_by, v)
            chosen = self.select_blocks(q, representatives, positions, layer)
            chosen = chosen.repeat_interleave(method.block_size, dim=-1)[..., : k.shape[2]]
            seen = past & (chosen if pattern is None else chosen | pattern)
        elif pattern is not None:
            seen = past & pattern
        if seen.shape[1] > 1:  # heads of a group share what is held
            seen = seen.expand(-1, -1, q.shape[1] // k.shape[1], -1, -1)
        by_head = seen.flatten(1, 2)
        if method.phase in ("decode", *EVICTING) or pattern is not None:
            self._count(by_head.sum(-1).float().mean(1), positions, q, layer)
        out = attend(q, k, v, by_head)
        if method.adds_mean:
            assert representatives is not None
            scores = method.score(_grouped(q, k.shape[1]), representatives)
            return _with_mean(out, v, scores, past, seen)
        return out

    def select_blocks(
        self, q: Tensor, representatives: Tensor, positions: Tensor, layer: int
    ) -> Tensor:
        """Which candidates each query attends to: (B, K, G, Q, N) bool, top_k true a query at most.

        q (B, H, Q, D), representatives (B, K, N, *), positions (B or 1, Q). The first candidate
        and the query's own are forced; those behind the query are never selected.
        """
        method = self.method
        candidate = torch.arange(representatives.shape[2], device=q.device)
        own = (positions // method.block_size)[:, None, None, :, None]  # (B, 1, 1, Q, 1)
        if method.anchor(layer) == layer:
            allowed, forced = candidate <= own, (candidate == 0) | (candidate == own)
            queries = _grouped(q, representatives.shape[1])
            scores = method.score(queries, representatives)
            scores = method.rank(scores, queries, representatives, allowed)
            self.handed = self._select(scores, layer, positions, allowed, forced)
        selected = self.handed
        assert selected is not None and selected.shape[-1] == len(candidate)
        self._record(layer, positions, selected)
        return selected

    def _select(
        self, scores: Tensor, layer: int, positions: Tensor, allowed: Tensor, forced: Tensor
    ) -> Tensor:
        """The selector's k of scores (B, K, G, Q, N), as a mask."""
        method = self.method
        scores = self.selector(
            scores, layer=layer, positions=positions, block_size=method.block_size
        )
        k = method.k(layer, self.layers)
        if not method.pooled:
            return select(scores, k, allowed=allowed, forced=forced)
        safe = select(scores, method.floor, allowed=allowed, forced=forced) | forced
        heads, shape = scores.shape[1:3].numel(), scores.movedim(3, 1).shape
        pool = (x.expand(scores.shape).movedim(3, 1).flatten(2) for x in (scores, allowed, safe))
        scores, allowed, safe = pool  # (B, Q, K G N)
        selected = select(scores, k * heads, allowed=allowed, forced=safe)
        return selected.view(shape).movedim(1, 3)

    def _record(self, layer: int, positions: Tensor, selected: Tensor) -> None:
        if self.recorder is not None:
            rows = self.rows
            if rows is None:
                rows = torch.arange(len(selected), device=selected.device)
            self.recorder(layer, rows, positions, selected)

    def represent(self, k: Tensor, v: Tensor) -> Tensor:
        """Representatives of all tokens of k and v (B, K, T, D): (B, K, T, *)."""
        return self.method.represent(torch.cat((k, v), -1) if self.method.reads_values else k)

    def block_representatives(self, k: Tensor) -> Tensor:
        """Representatives of all blocks of k (B, K, T, D): (B, K, N, *).

        A partial last block is filled up with zeros: it can only be a query's own block, which is
        forced, so what its representative says is never read.
        """
        size = self.method.block_size
        if missing := -k.shape[2] % size:  # padding by nothing would copy all keys
            k = F.pad(k, (0, 0, 0, missing))
        return self.method.represent(k.unflatten(2, (-1, size)))

    def keep(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The tokens that stay in the cache after a prompt, for methods that evict.

        All rows have T tokens here: q (B, H, ·, D) holds at least the last `observed` of their
        queries; k, the keys to select by, and v (B, K, T, D). Returns tokens (B, K, kept),
        ascending, EMPTY where a head keeps fewer than another, and the method's scores of them.
        """
        method, length = self.method, k.shape[2]
        observed = q[:, :, max(0, q.shape[2] - method.observed) :]
        every = method.score(_grouped(observed, k.shape[1]), self.represent(k, v))
        positions = torch.full((len(q), 1), length - 1, device=q.device)
        token = torch.arange(length, device=q.device)
        allowed, forced = token < length, token >= length - method.forced
        selected = self._select(every, layer, positions, allowed, forced)
        self._record(layer, positions, selected)
        chosen = selected[:, :, 0, 0]
        most = int(chosen.sum(-1).max()) if method.pooled else method.k(layer, self.layers)
        tokens = chosen.int().argsort(dim=-1, descending=True, stable=True)[..., :most]
        scores = every[:, :, 0, 0].gather(-1, tokens)
        return tokens.masked_fill(~chosen.gather(-1, tokens), EMPTY), scores

    def evict(
        self, q: Tensor, k: Tensor, held: Tensor, mass: Tensor, position: Tensor, layer: int
    ) -> tuple[Tensor, Tensor]:
        """For phase "step": the tokens' scores after a step (B, K, T), and the slot (B, K) that the
        next token takes, a free one or that of the token with the lowest score.

        q (B, H, 1, D), k (B, K, T, D) to select by, held (B, K, T), mass, the scores before it,
        position (B, 1).
        """
        method, empty = self.method, held == EMPTY
        logits = inner_products(_grouped(q, k.shape[1]), k.unsqueeze(2)) / math.sqrt(q.shape[-1])
        new = logits.masked_fill(empty[:, :, None, None], -torch.inf).softmax(-1).sum(2)[:, :, 0]
        mass = method.observe(mass, new.to(mass.dtype))
        ranked = self.selector(
            mass[:, :, None, None], layer=layer, positions=position, block_size=1, tokens=held
        )[:, :, 0, 0]
        recent = held > position[..., None] - method.forced
        ranked = ranked.masked_fill(recent, torch.inf).masked_fill(empty, -torch.inf)
        lowest = ranked == ranked.amin(-1, keepdim=True)
        return mass, held.masked_fill(~lowest, -1).argmax(-1)  # ties: the latest goes


def _grouped(q: Tensor, kv_heads: int) -> Tensor:
    """(B, H, Q, D) -> (B, K, G, Q, D)."""
    return q.unflatten(1, (kv_heads, -1))


def _with_mean(out: Tensor, v: Tensor, scores: Tensor, past: Tensor, seen: Tensor) -> Tensor:
    """out (B, H, Q, D) by the seen tokens' share of the scores, the mean value by the others'."""
    share = (scores.masked_fill(~past, -torch.inf).softmax(-1) * seen).sum(-1, keepdim=True)
    mean = past.to(v.dtype) @ v.unsqueeze(2) / past.sum(-1, keepdim=True)  # (B, K, 1, Q, D)
    mean = mean.expand(-1, -1, seen.shape[2], -1, -1).flatten(1, 2)
    share = share.flatten(1, 2).to(out.dtype)
    return share * out + (1 - share) * mean
