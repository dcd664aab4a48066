"""Eq. 3: which candidates a query attends to, and which tokens stay in the cache."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ratplus_exp.methods.base import Dense, Method
from ratplus_exp.methods.selectors import Candidates, Selector, TopK
from ratplus_exp.methods.states import States
from ratplus_kernels.selection import inner_products, running_count, select

Recorder = Callable[[int, Tensor, Tensor, Tensor], None]
EMPTY = torch.iinfo(torch.int64).max  # the position in a slot without a token


@dataclass
class Selection:
    """A method with its selector, over one batch.

    recorder: called on every selection with (layer, rows (R,) of the batch, positions (R or 1, Q),
        selected (R, K, G, Q, N) bool); H1 counts hits with it.
    rows: the rows of the batch that are selected for; None: all.
    layers: how many the model has; a cache sets it.
    last: the last selection, for layers that reuse it (`Method.anchor`).
    """

    method: Method = field(default_factory=Dense)
    selector: Selector = field(default_factory=TopK)
    recorder: Recorder | None = None
    rows: Tensor | None = None
    layers: int = 1
    last: Tensor | None = None

    def for_rows(self, rows: Tensor) -> Self:
        """The same for some of the rows."""
        numbers = rows if self.rows is None else self.rows[rows]
        return replace(self, selector=self.selector.rows(rows), rows=numbers)

    def select_blocks(
        self, q: Tensor, representatives: Tensor, positions: Tensor, layer: int
    ) -> Tensor:
        """Which candidates each query attends to: (B, K, G, Q, N) bool, at most top_k per query.

        q (B, H, Q, D), representatives (B, K, N, *), positions (B or 1, Q). The first and the local
        candidate are forced; later ones are never selected.
        """
        method, block = self.method, positions // self.method.block_size
        candidate = torch.arange(representatives.shape[2], device=q.device)
        local = block[:, None, None, :, None]  # (B, 1, 1, Q, 1)
        if method.anchor(layer) == layer:
            allowed, forced = candidate <= local, (candidate == 0) | (candidate == local)
            queries = grouped(q, representatives.shape[1])
            scores = method.score(queries, representatives)
            scores = method.rank(scores, queries, representatives, allowed)
            # A random selection is drawn by position.
            drawn = block * method.block_size if method.by_query_block else positions
            self.last = self._select(scores, layer, drawn, allowed, forced)
        assert self.last is not None and self.last.shape[-1] == len(candidate)
        self._record(layer, positions, self.last)
        return self.last

    def select_lines(self, q: Tensor, k: Tensor, lengths: Tensor | None, layer: int) -> Tensor:
        """Columns and diagonals of a prompt's attention, selected by its last queries: which of
        the T columns and which of the T distances, (B, K, G, 2, T) bool.

        q (B, H, T, D), k (B, K, T, D) to select by, lengths (B,) or None. The first column and the
        distance 0 are forced.
        """
        lines, width = [], k.shape[2]
        for row, length in enumerate([width] * len(k) if lengths is None else lengths.tolist()):
            queries = q[row : row + 1, :, max(0, length - self.method.observed) : length]
            keys = k[row : row + 1, :, :length]
            scores = self.method.score(grouped(queries, k.shape[1]), keys)
            positions = torch.tensor([[length - 1, length - 2]], device=q.device)
            line = torch.arange(length, device=q.device)
            part = self.for_rows(torch.tensor([row]))
            selected = part._select(scores, layer, positions, line >= 0, line == 0)
            lines.append(F.pad(selected, (0, width - length)))
        return torch.cat(lines)

    def _select(
        self, scores: Tensor, layer: int, positions: Tensor, allowed: Tensor, forced: Tensor
    ) -> Tensor:
        """The selector's k of scores (B, K, G, Q, N), as a mask."""
        method = self.method
        scores = self.selector(scores, Candidates(layer, positions, method.block_size))
        k = method.k(layer, self.layers)
        if not method.pooled:
            return select(scores, k, allowed=allowed, forced=forced)
        forced = select(scores, method.floor, allowed=allowed, forced=forced) | forced
        heads, shape = scores.shape[1:3].numel(), scores.movedim(3, 1).shape
        pool = (x.expand(scores.shape).movedim(3, 1).flatten(2) for x in (scores, allowed, forced))
        scores, allowed, forced = pool  # (B, Q, K G N)
        selected = select(scores, k * heads, allowed=allowed, forced=forced)
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

        A partial last block is padded with zeros: it can only be a local block, which is forced, so
        its representative is never read.
        """
        size = self.method.block_size
        if missing := -k.shape[2] % size:  # padding by 0 would copy all keys
            k = F.pad(k, (0, 0, 0, missing))
        return self.method.represent(k.unflatten(2, (-1, size)))

    def keep(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The tokens that stay in the cache after a prompt, for methods that evict.

        All rows have T tokens: q (B, H, ·, D) are at least their last `observed` queries; k, the
        keys to select by, and v are (B, K, T, D). Returns tokens (B, K, kept), ascending, padded
        with EMPTY, and their scores.
        """
        method, length = self.method, k.shape[2]
        observed = q[:, :, max(0, q.shape[2] - method.observed) :]
        scores = method.score(grouped(observed, k.shape[1]), self.represent(k, v))
        positions = torch.full((len(q), 1), length - 1, device=q.device)
        token = torch.arange(length, device=q.device)
        allowed, forced = token < length, token >= length - method.forced
        selected = self._select(scores, layer, positions, allowed, forced)
        self._record(layer, positions, selected)
        kept = selected[:, :, 0, 0]
        slots = int(kept.sum(-1).max()) if method.pooled else method.k(layer, self.layers)
        slots = min(slots, length)
        # A scatter, since a sort takes longer; tokens that leave go behind the slots.
        slot = torch.where(kept, running_count(kept) - 1, slots + token)
        tokens = token.new_full((*kept.shape[:2], slots + length), EMPTY)
        tokens = tokens.scatter_(-1, slot, token.expand_as(slot))[..., :slots]
        return tokens, scores[:, :, 0, 0].gather(-1, tokens.clamp(max=length - 1))

    def evict(self, states: States, mass: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Phase "step": the tokens' scores after a step (B, K, T), and the slot (B, K) of the next
        token, a free one or that of the token with the lowest score.

        states: of the step's token (Q = 1); mass: the scores before the step.
        """
        method, held = self.method, states.held
        q, k, position = states.q, states.by, states.step.positions
        assert held is not None
        empty = held == EMPTY
        if self.recorder is not None:
            length = int(position.max()) + 1
            stored = held.new_zeros(*held.shape[:2], length + 1, dtype=torch.bool)
            stored = stored.scatter(2, held.clamp(max=length), True)[..., :length]
            self._record(layer, position, stored[:, :, None, None])
        logits = inner_products(grouped(q, k.shape[1]), k.unsqueeze(2)) / math.sqrt(q.shape[-1])
        new = logits.masked_fill(empty[:, :, None, None], -torch.inf).softmax(-1).sum(2)[:, :, 0]
        mass = method.observe(mass, new.to(mass.dtype))
        candidates = Candidates(layer, position, 1, held)
        ranked = self.selector(mass[:, :, None, None], candidates)[:, :, 0, 0]
        recent = held > position[..., None] - method.forced
        ranked = ranked.masked_fill(recent, torch.inf).masked_fill(empty, -torch.inf)
        lowest = ranked == ranked.amin(-1, keepdim=True)
        free = held.masked_fill(~lowest, -1).argmax(-1)  # of equal scores the latest token
        return mass.scatter(-1, free[..., None], 0.0), free


def grouped(q: Tensor, kv_heads: int) -> Tensor:
    """(B, H, Q, D) -> (B, K, G, Q, D)."""
    return q.unflatten(1, (kv_heads, -1))
