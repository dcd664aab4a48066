"""One engine for every method: selection (Eq. 3) and attention over what was selected (Eq. 4).

Rows of a batch are aligned at their first token (the model turns left padding into right padding),
so block i of every row is its own tokens [i · block_size, (i + 1) · block_size), and padding lies
behind every row's last token, out of every real query's causal sight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ratplus_exp.methods.attention import attend
from ratplus_exp.methods.base import Dense, Method
from ratplus_exp.methods.selectors import Selector, TopK
from ratplus_kernels import gather_tokens
from ratplus_kernels.selection import select

Recorder = Callable[[int, Tensor, Tensor, Tensor], None]
QUERY_CHUNK = 128  # prompt queries whose selection is in memory at a time


@dataclass
class Usage:
    """How many tokens the queries of the sparse phase really attended to."""

    attended: list[Tensor] = field(default_factory=list)  # one (B, Q) a layer and forward
    positions: list[Tensor] = field(default_factory=list)

    def add(self, attended: Tensor, positions: Tensor) -> None:
        """attended (B, Q): tokens, mean over heads; positions (B or 1, Q) of the queries.

        A dense query at position p attends to p + 1 tokens. Padding has position −1.
        """
        self.attended.append(attended)
        self.positions.append(positions.expand(attended.shape))

    def join(self, parts: Sequence[Usage]) -> None:
        """Add what the queries of parts of the batch attended to."""
        for name in ("attended", "positions"):
            those = zip(*(getattr(part, name) for part in parts), strict=True)
            getattr(self, name).extend(torch.cat(x) for x in those)

    def fractions(self, rows: int, last: Tensor | None = None) -> Tensor:
        """The measured budget of each row (rows,), over all layers; 1 when nothing was sparse.

        last (B,): the position of each row's last query that counts; a batch goes on until its
        longest answer is complete, and what the other rows do meanwhile is no part of theirs.
        """
        if not self.attended:
            return torch.ones(rows)
        attended, positions = torch.cat(self.attended, 1), torch.cat(self.positions, 1)
        real = positions >= 0
        if last is not None:
            real &= positions <= last.to(positions.device)[:, None]
        available = ((positions + 1) * real).sum(1)
        fractions = (attended.double() * real).sum(1) / available.clamp(min=1)
        return fractions.masked_fill(available == 0, 1.0).cpu()


class Uncounted(Usage):
    """For training, which has no use for it. Compiled layers would be compiled anew for every
    length of the lists."""

    def add(self, attended: Tensor, positions: Tensor) -> None:
        pass


@dataclass
class Engine:
    """A method with its selector, as it runs over one batch.

    recorder: called on every selection with (layer, rows (R,), positions (R or 1, Q), selected
        (R, K, G, Q, N) bool), rows being those of the batch that it is about; H1 counts its hits
        there.
    rows: the rows of the batch that this engine sees; None: all.
    """

    method: Method = field(default_factory=Dense)
    selector: Selector = field(default_factory=TopK)
    recorder: Recorder | None = None
    usage: Usage = field(default_factory=Usage)
    rows: Tensor | None = None

    def for_rows(self, rows: Tensor) -> Engine:
        """The engine over some of its rows."""
        numbers = rows if self.rows is None else self.rows[rows]
        return replace(self, selector=self.selector.rows(rows), rows=numbers)

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
            self._count(attended.expand(len(q), -1), position, lengths)
            return out
        if self.method.phase == "prefill":
            if representatives is None:
                representatives = self.block_representatives(k)
            return self._sparse_prefill(q, k, v, lengths, layer, representatives)
        seen = self.method.pattern(position[:, None], position)
        if seen is None:
            return attend(q, k, v, causal=True)
        seen = seen & (position <= position[:, None])
        self._count(seen.sum(-1).expand(len(q), -1).float(), position, lengths)
        return attend(q, k, v, seen[None, None])

    def _count(self, attended: Tensor, position: Tensor, lengths: Tensor | None) -> None:
        """Usage of prompt queries: attended (B, Q), position (Q,)."""
        positions = position.expand(attended.shape)
        if lengths is not None:
            positions = positions.masked_fill(position >= lengths[:, None], -1)
        self.usage.add(attended, positions)

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
        key = torch.arange(length, device=q.device)
        out = []
        for start in range(0, length, QUERY_CHUNK):
            queries = q[:, :, start : start + QUERY_CHUNK]
            position = key[start : start + QUERY_CHUNK]
            end = start + len(position)
            blocks = self.select_blocks(queries, representatives, position[None], layer)
            seen = blocks.repeat_interleave(size, dim=-1)[..., :end].flatten(1, 2)
            seen = seen & (key[:end] <= position[:, None])
            out.append(attend(queries, k[:, :, :end], v[:, :, :end], seen))
            self._count(seen.sum(-1).float().mean(1), position, lengths)
        return torch.cat(out, dim=2)

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slots: Tensor,
        positions: Tensor,
        representatives: Tensor | None,
        layer: int,
        all_seen: bool = False,
    ) -> Tensor:
        """Attention of new tokens to a cache that already holds them.

        q (B, H, Q, D); k, v (B, K, T, D); slots (B, Q), where in the cache each query's own token
        lies; positions (B, Q), which token of its row it is (ahead of the slot after eviction);
        representatives (B, K, N, *) of the blocks, for methods that select while decoding;
        all_seen, whether every query comes after all T slots, so that no mask is needed.
        """
        method = self.method
        out = self._fast(method.attend_decode, q, k, v, representatives, positions, all_seen)
        if out is not None:
            self.usage.add(method.attended(positions).float(), positions)
            return out
        slot = torch.arange(k.shape[2], device=q.device)
        pattern = method.pattern(slots[..., None], slot)
        if all_seen and pattern is None and method.phase != "decode":
            if method.phase == "once":
                self.usage.add((slots + 1).float(), positions)
            return attend(q, k, v)
        seen = (slot <= slots[..., None])[:, None]  # (B, 1, Q, T)
        if method.phase == "decode":
            assert representatives is not None
            blocks = self.select_blocks(q, representatives, positions, layer)
            chosen = blocks.repeat_interleave(method.block_size, dim=-1)[..., : k.shape[2]]
            seen = seen & chosen.flatten(1, 2)
        if pattern is not None:
            seen = seen & pattern[:, None]
        if method.phase in ("decode", "once") or pattern is not None:
            self.usage.add(seen.sum(-1).float().mean(1), positions)
        return attend(q, k, v, seen)

    def select_blocks(
        self, q: Tensor, representatives: Tensor, positions: Tensor, layer: int
    ) -> Tensor:
        """Which blocks each query attends to: (B, K, G, Q, N) bool, at most top_k true a query.

        q (B, H, Q, D), representatives (B, K, N, *), positions (B or 1, Q). The first block and
        the query's own are forced; blocks behind the query are never selected.
        """
        method = self.method
        block = torch.arange(representatives.shape[2], device=q.device)
        own = (positions // method.block_size)[:, None, None, :, None]  # (B, 1, 1, Q, 1)
        scores = method.score(_grouped(q, representatives.shape[1]), representatives)
        scores = self.selector(
            scores, layer=layer, positions=positions, block_size=method.block_size
        )
        selected = select(
            scores, method.top_k, allowed=block <= own, forced=(block == 0) | (block == own)
        )
        self._record(layer, positions, selected)
        return selected

    def _record(self, layer: int, positions: Tensor, selected: Tensor) -> None:
        if self.recorder is not None:
            rows = self.rows
            if rows is None:
                rows = torch.arange(len(selected), device=selected.device)
            self.recorder(layer, rows, positions, selected)

    def block_representatives(self, k: Tensor) -> Tensor:
        """Representatives of all blocks of k (B, K, T, D): (B, K, N, *).

        A partial last block is filled up with zeros: it can only be a query's own block, which is
        forced, so what its representative says is never read.
        """
        size = self.method.block_size
        if missing := -k.shape[2] % size:  # padding by nothing would copy all keys
            k = F.pad(k, (0, 0, 0, missing))
        return self.method.represent(k.unflatten(2, (-1, size)))

    def keep(
        self, q: Tensor, k: Tensor, v: Tensor, layer: int, select_by: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """Keys and values that stay in the cache after a prompt, (B, K, kept, D); None: all.

        All rows have T tokens here: q (B, H, ·, D) holds at least the last `forced` of their
        queries; k, v and select_by, the keys to select by (None: k), (B, K, T, D).
        """
        slots = self.kept_after_prefill(q, k if select_by is None else select_by, layer)
        return None if slots is None else gather_tokens(k, v, slots)

    def kept_after_prefill(self, q: Tensor, k: Tensor, layer: int) -> Tensor | None:
        """For methods that select once: the cache slots to keep, ascending, (B, K, kept).

        q and k as in `keep`. None: keep everything.
        """
        method = self.method
        length = k.shape[2]
        if method.phase != "once":
            return None
        if length <= method.top_k:
            everything = k.new_ones(*k.shape[:2], 1, 1, length, dtype=torch.bool)
            self._record(layer, torch.full((len(q), 1), length - 1, device=q.device), everything)
            return None
        window = min(method.forced, length)
        scores = method.score(_grouped(q[:, :, -window:], k.shape[1]), method.represent(k))
        positions = torch.full((len(q), 1), length - 1, device=q.device)
        scores = self.selector(scores, layer=layer, positions=positions, block_size=1)
        token = torch.arange(length, device=q.device)
        selected = select(
            scores, method.top_k, allowed=token < length, forced=token >= length - window
        )
        self._record(layer, positions, selected)
        order = selected[:, :, 0, 0].int().argsort(dim=-1, descending=True, stable=True)
        return order[..., : method.top_k]


def _grouped(q: Tensor, kv_heads: int) -> Tensor:
    """(B, H, Q, D) -> (B, K, G, Q, D)."""
    return q.unflatten(1, (kv_heads, -1))
