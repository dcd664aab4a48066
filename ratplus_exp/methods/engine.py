"""One engine for every method: attention (Eq. 4) over the selection of Eq. 3.

Rows of a batch start at their first token (the model turns left padding into right padding), so
block i of each row is its tokens [i · block_size, (i + 1) · block_size), and causality hides the
padding from all real queries.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ratplus_exp.methods.attention import attend
from ratplus_exp.methods.base import EVICTING, Method
from ratplus_exp.methods.selection import Selection, grouped
from ratplus_exp.methods.selectors import TopK
from ratplus_exp.methods.usage import Uncounted, Usage

QUERY_CHUNK = 128  # prompt queries whose selection is held in memory together


@dataclass
class Engine(Selection):
    """A method and its selector for one batch.

    counted: of "prefill" and "decode", whose queries the usage counts (None: where the method is
        sparse): in all layers alike, so that dense layers beside sparse ones count.
    """

    usage: Usage = field(default_factory=Usage)
    counted: frozenset[str] | None = None
    parts: dict[Method, "Engine"] = field(default_factory=dict, init=False, repr=False)
    _step: tuple[int, Tensor, Tensor | None] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.counted is None:
            self.counted = self.method.sparse_in

    def of(self, layer: int) -> "Engine":
        """The engine of a layer's method, with the same usage."""
        method = self.method.of(layer)
        if method is self.method:
            return self
        if method not in self.parts:
            self.parts[method] = replace(self, method=method)
        return self.parts[method]

    def _counts(self, phase: str) -> bool:
        assert self.counted is not None
        return phase in self.counted

    def _fast(self, path: Callable[..., Tensor | None], *states: Any) -> Tensor | None:
        """The result of a fast path; None where the engine must select: fast paths contain the
        method's top-k and expose no selection to a recorder."""
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
        """Attention of a whole prompt: (B, H, T, D), meaningless beyond a row's length.

        q (B, H, T, D), k and v (B, K, T, D), lengths (B,) real tokens of each row (None: all T),
        representatives (B, K, N, *) of the blocks if already computed, select_by (B, K, T, D) the
        keys to select by (None: k).
        """
        length = q.shape[2]
        position = torch.arange(length, device=q.device)
        if select_by is not None and self.method.phase == "prefill":
            representatives = self.block_representatives(select_by)
        out = self._fast(self.method.attend_prefill, q, k, v, representatives)
        if out is not None:
            if not isinstance(self.usage, Uncounted):
                self._count(self.method.attended(position).float(), position, q, layer, lengths)
            return out
        if self.method.phase == "prefill":
            by = k if select_by is None else select_by
            return self._sparse_prefill(q, k, v, by, lengths, layer, representatives)
        seen = self._pattern(None, position[:, None], position)
        if seen is None:
            if self._counts("prefill"):
                self._count(None, position, q, layer, lengths)
            return attend(q, k, v, causal=True)
        seen = seen & (position <= position[:, None])
        self._count(seen.sum(-1).float(), position, q, layer, lengths)
        return attend(q, k, v, seen[None, None])

    def _pattern(self, phase: str | None, query: Tensor, key: Tensor) -> Tensor | None:
        """The method's pattern in the phases it applies to."""
        return self.method.pattern(query, key) if self.method.phase in (None, phase) else None

    def _count(
        self,
        attended: Tensor | None,
        positions: Tensor,
        q: Tensor,
        layer: int,
        lengths: Tensor | None = None,
    ) -> None:
        """Add to the usage: attended (B or 1, Q), None: all, unselected; positions (B or 1, Q),
        real up to lengths."""
        positions = positions.expand(len(q), -1)
        if lengths is not None:
            positions = positions.masked_fill(positions >= lengths[:, None], -1)
        if attended is None:
            self.usage.add(positions + 1.0, positions)
            return
        choosing = self.method.choosing(positions, q.shape[-1], layer)
        self.usage.add(attended.expand(positions.shape), positions, choosing)

    def _count_step(self, positions: Tensor, dim: int, layer: int) -> None:
        """`_count` of a fast decoding path, computed in a step's first layer for all: it takes more
        launches than the path itself. A replayed step has one positions tensor, so steps differ by
        their layers."""
        if isinstance(self.usage, Uncounted):
            return
        attended, choosing = self.method.attended, self.method.choosing
        if self._step is None or layer <= self._step[0]:
            self._step = layer, attended(positions).float(), choosing(positions, dim)
        self._step = layer, *self._step[1:]
        self.usage.add(self._step[1], positions, self._step[2])

    def _sparse_prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        by: Tensor,
        lengths: Tensor | None,
        layer: int,
        representatives: Tensor | None,
    ) -> Tensor:
        method, size, length = self.method, self.method.block_size, q.shape[2]
        key, chunk = torch.arange(length, device=q.device), -(-QUERY_CHUNK // size) * size
        selecting, lines = q, None
        if method.by_query_block and lengths is not None:  # padding must not affect a selection
            real = (key < lengths[:, None])[:, None, :, None]
            selecting, by = q * real, by * real
        if method.unit == "token":
            lines = self.select_lines(q, by, lengths, layer)
        elif representatives is None:
            representatives = self.block_representatives(by)
        out = []
        for start in range(0, length, chunk):
            queries, position = q[:, :, start : start + chunk], key[start : start + chunk]
            end = start + len(position)
            seen = key[:end] <= position[:, None]
            if lines is None:
                assert representatives is not None
                blocks = selecting[:, :, start:end], representatives, position[None], layer
                selected = self.select_blocks(*blocks).repeat_interleave(size, dim=-1)[..., :end]
            else:
                distance = (position[:, None] - key[:end]).clamp(min=0)
                selected = lines[..., :1, :end] | lines[..., 1, :][..., distance]
            pattern = self._pattern("prefill", position[:, None], key[:end])
            seen = seen & (selected if pattern is None else selected | pattern).flatten(1, 2)
            out.append(attend(queries, k[:, :, :end], v[:, :, :end], seen))
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
        """Attention of new tokens to a cache that already includes them: (B, H, Q, D).

        q (B, H, Q, D); k, v (B, K, T, D); positions (B, Q) of the queries; representatives
        (B, K, N, *) of the blocks, for block methods of phase "decode"; held (B, K, T), the token
        in each slot (None: slot i holds token i); select_by (B, K, T, D), the keys to select by
        (None: k); all_seen: whether every query follows all T slots, so that no mask is needed.
        """
        method = self.method
        out = self._fast(method.attend_decode, q, k, v, representatives, positions, all_seen)
        if out is not None:
            self._count_step(positions, q.shape[-1], layer)
            return out
        query = positions[:, None, None, :, None]
        slot = torch.arange(k.shape[2], device=q.device) if held is None else held[:, :, None, None]
        pattern = self._pattern("decode", query, slot)
        if all_seen and pattern is None and method.phase != "decode":
            if self._counts("decode"):
                slots = torch.full_like(positions, k.shape[2]).float()
                self._count(slots if method.phase in EVICTING else None, positions, q, layer)
            return attend(q, k, v)
        seen = past = slot <= query  # (B, 1 or K, 1 or G, Q, T)
        if method.phase == "decode":
            if representatives is None:
                representatives = self.represent(k if select_by is None else select_by, v)
            selected = self.select_blocks(q, representatives, positions, layer)
            selected = selected.repeat_interleave(method.block_size, dim=-1)[..., : k.shape[2]]
            seen = past & (selected if pattern is None else selected | pattern)
        elif pattern is not None:
            seen = past & pattern
        if seen.shape[1] > 1:  # the heads of a group share slots
            seen = seen.expand(-1, -1, q.shape[1] // k.shape[1], -1, -1)
        by_head = seen.flatten(1, 2)
        if self._counts("decode"):
            attended = by_head.sum(-1).float().mean(1) if "decode" in method.sparse_in else None
            self._count(attended, positions, q, layer)
        out = attend(q, k, v, by_head)
        if method.adds_mean:
            assert representatives is not None
            scores = method.score(grouped(q, k.shape[1]), representatives)
            return _with_mean(out, v, scores, past, seen)
        return out


def _with_mean(out: Tensor, v: Tensor, scores: Tensor, past: Tensor, seen: Tensor) -> Tensor:
    """out (B, H, Q, D) and the mean value, weighted by the score mass of seen and other tokens."""
    share = (scores.masked_fill(~past, -torch.inf).softmax(-1) * seen).sum(-1, keepdim=True)
    mean = past.to(v.dtype) @ v.unsqueeze(2) / past.sum(-1, keepdim=True)  # (B, K, 1, Q, D)
    mean = mean.expand(-1, -1, seen.shape[2], -1, -1).flatten(1, 2)
    share = share.flatten(1, 2).to(out.dtype)
    return share * out + (1 - share) * mean
