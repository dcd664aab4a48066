"""One engine for every method: attention (Eq. 4) over the selection of Eq. 3.

Rows of a batch start at their first token (the model turns left padding into right padding), so
block i of each row is its tokens [i · block_size, (i + 1) · block_size), and causality hides the
padding from all real queries.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ratplus_exp.methods.attention import attend
from ratplus_exp.methods.base import EVICTING, Method
from ratplus_exp.methods.selection import Selection, grouped
from ratplus_exp.methods.selectors import TopK
from ratplus_exp.methods.states import States
from ratplus_exp.methods.usage import Usage

QUERY_CHUNK = 128  # prompt queries whose selection is held in memory together


@dataclass
class Engine(Selection):
    """A method and its selector for one batch.

    counted: of "prefill" and "decode", whose queries the usage counts (None: where the method is
        sparse): the same in all layers, so that dense layers among sparse ones count.
    """

    usage: Usage = field(default_factory=Usage)
    counted: frozenset[str] | None = None
    parts: dict[Method, "Engine"] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.counted is None:
            self.counted = self.method.sparse_in

    def for_layer(self, layer: int) -> "Engine":
        """The engine of a layer's method, with the same usage."""
        method = self.method.for_layer(layer)
        if method is self.method:
            return self
        if method not in self.parts:
            self.parts[method] = replace(self, method=method)
        return self.parts[method]

    def prefill(self, states: States, layer: int) -> Tensor:
        """Attention of a whole prompt: (B, H, T, D), meaningless beyond a row's length."""
        method, position = self.method, states.step.positions[0]
        if states.select_by is not None and method.phase == "prefill":
            representatives = self.block_representatives(states.select_by)
            states = replace(states, representatives=representatives)
        out = self._fast(method.attend_prefill, states)
        if out is not None:
            self._count("prefill", method.attended(position).float(), states, layer)
            return out
        if method.phase == "prefill":
            return self._sparse_prefill(states, layer)
        seen = self._pattern(None, position[:, None], position)
        if seen is None:
            self._count("prefill", None, states, layer)
            return attend(states.q, states.k, states.v, causal=True)
        seen = seen & (position <= position[:, None])
        self._count("prefill", seen.sum(-1).float(), states, layer)
        return attend(states.q, states.k, states.v, seen[None, None])

    def _sparse_prefill(self, states: States, layer: int) -> Tensor:
        method, size, length = self.method, self.method.block_size, states.q.shape[2]
        key, chunk = states.step.positions[0], -(-QUERY_CHUNK // size) * size
        selecting, by, lengths = states.q, states.by, states.step.lengths
        representatives, lines = states.representatives, None
        if method.by_query_block and lengths is not None:  # padding must not affect a selection
            real = (key < lengths[:, None])[:, None, :, None]
            selecting, by = selecting * real, by * real
        if method.unit == "token":
            lines = self.select_lines(selecting, by, lengths, layer)
        elif representatives is None:
            representatives = self.block_representatives(by)
        out = []
        for start in range(0, length, chunk):
            position = key[start : start + chunk]
            end = start + len(position)
            seen = key[:end] <= position[:, None]
            if lines is None:
                assert representatives is not None
                queries = selecting[:, :, start:end]
                blocks = self.select_blocks(queries, representatives, position[None], layer)
                selected = blocks.repeat_interleave(size, dim=-1)[..., :end]
            else:
                distance = (position[:, None] - key[:end]).clamp(min=0)
                selected = lines[..., :1, :end] | lines[..., 1, :][..., distance]
            pattern = self._pattern("prefill", position[:, None], key[:end])
            seen = seen & (selected if pattern is None else selected | pattern).flatten(1, 2)
            k, v = states.k[:, :, :end], states.v[:, :, :end]
            out.append(attend(states.q[:, :, start:end], k, v, seen))
            attended = seen.sum(-1).float().mean(1)
            self._count("prefill", attended, states, layer, slice(start, end))
        return torch.cat(out, dim=2)

    def decode(self, states: States, layer: int) -> Tensor:
        """Attention of new tokens to a cache that already includes them: (B, H, Q, D)."""
        method, q, k, v = self.method, states.q, states.k, states.v
        positions, representatives = states.step.positions, states.representatives
        out = self._fast(method.attend_decode, states)
        if out is not None:
            self._count_fast_step(states)
            return out
        query, held = positions[:, None, None, :, None], states.held
        slot = torch.arange(k.shape[2], device=q.device) if held is None else held[:, :, None, None]
        pattern = self._pattern("decode", query, slot)
        if states.all_seen and pattern is None and method.phase != "decode":
            evicted = method.phase in EVICTING
            slots = torch.full_like(positions, k.shape[2]).float() if evicted else None
            self._count("decode", slots, states, layer)
            return attend(q, k, v)
        seen = past = slot <= query  # (B, 1 or K, 1 or G, Q, T)
        if method.phase == "decode":
            if representatives is None:
                representatives = self.represent(states.by, v)
            selected = self.select_blocks(q, representatives, positions, layer)
            selected = selected.repeat_interleave(method.block_size, dim=-1)[..., : k.shape[2]]
            seen = past & (selected if pattern is None else selected | pattern)
        elif pattern is not None:
            seen = past & pattern
        if seen.shape[1] > 1:  # the heads of a group share slots
            seen = seen.expand(-1, -1, q.shape[1] // k.shape[1], -1, -1)
        by_head = seen.flatten(1, 2)
        attended = by_head.sum(-1).float().mean(1) if "decode" in method.sparse_in else None
        self._count("decode", attended, states, layer)
        out = attend(q, k, v, by_head)
        if method.mean_value:
            assert representatives is not None
            scores = method.score(grouped(q, k.shape[1]), representatives)
            return _with_mean(out, v, scores, past, seen)
        return out

    def _fast(self, path: Callable[[States], Tensor | None], states: States) -> Tensor | None:
        """The result of a fast path; None where the engine must select: fast paths contain the
        method's top-k and expose no selection to a recorder."""
        if self.recorder is not None or type(self.selector) is not TopK:
            return None
        return path(states)

    def _pattern(self, phase: str | None, query: Tensor, key: Tensor) -> Tensor | None:
        """The method's pattern in the phases it applies to."""
        return self.method.pattern(query, key) if self.method.phase in (None, phase) else None

    def _count(
        self,
        phase: str,
        attended: Tensor | None,
        states: States,
        layer: int,
        queries: slice = slice(None),
    ) -> None:
        """Add some of the queries to the usage, if it counts those of a phase: attended (B or 1, Q)
        to so many tokens; None: to all, without a selection."""
        if phase not in (self.counted or ()):
            return
        positions = states.step.positions[:, queries].expand(len(states.q), -1)
        if states.step.lengths is not None:
            positions = positions.masked_fill(positions >= states.step.lengths[:, None], -1)
        if attended is None:
            self.usage.add(positions + 1.0, positions)
            return
        choosing = self.method.choosing(positions, states.q.shape[-1], layer)
        self.usage.add(attended.expand(positions.shape), positions, choosing)

    def _count_fast_step(self, states: States) -> None:
        """`_count`, computed once per step for all layers: it takes more launches than the fast
        path itself."""
        method, step = self.method, states.step
        if "decode" not in (self.counted or ()):
            return
        if method not in step.counts:
            choosing = method.choosing(step.positions, states.q.shape[-1])
            step.counts[method] = method.attended(step.positions).float(), choosing
        attended, choosing = step.counts[method]
        self.usage.add(attended, step.positions, choosing)


def _with_mean(out: Tensor, v: Tensor, scores: Tensor, past: Tensor, seen: Tensor) -> Tensor:
    """out (B, H, Q, D) and the mean value, weighted by the score mass of seen and other tokens."""
    share = (scores.masked_fill(~past, -torch.inf).softmax(-1) * seen).sum(-1, keepdim=True)
    mean = past.to(v.dtype) @ v.unsqueeze(2) / past.sum(-1, keepdim=True)  # (B, K, 1, Q, D)
    mean = mean.expand(-1, -1, seen.shape[2], -1, -1).flatten(1, 2)
    share = share.flatten(1, 2).to(out.dtype)
    return share * out + (1 - share) * mean
