"""P2's dilated attention: a fixed pattern, used for joint training and dilated inference."""

from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ratplus_exp.methods.attention import attend
from ratplus_exp.methods.base import Method
from ratplus_exp.methods.states import States
from ratplus_exp.settings import DilatedSettings

CHUNK = 64  # queries that share their keys
AT_ONCE = 64  # chunks in one call of attention
PREFIXES = 8  # lengths of a random dense prefix, in equal parts of the context

Position = TypeVar("Position", int, Tensor)


@dataclass(frozen=True, kw_only=True)
class Dilated(DilatedSettings, Method):
    """Query t sees position j <= t when (j + 1) mod D = 0, or t − j <= W, or j < I.

    P2's joint training has W = I = 0, so that the memory must provide the tokens between;
    `method=dilated` has D and W of a block and I = 1. It has no budget but D.
    """

    paper = "Wei and Gulcehre, 2026, arXiv 2602.18196"
    not_set = frozenset({"block_size", "top_k"})

    def fraction(self, length: int) -> Fraction:
        """1/D, as in P2, without the local window and the initial positions."""
        return Fraction(1, self.dilation) if self.dilation else Fraction(self.local, length)

    def pattern(self, query: Tensor, key: Tensor) -> Tensor:
        seen = (query - key <= self.local) | (key < self.initial)
        if self.dilation:
            seen = seen | ((key + 1) % self.dilation == 0)
        return seen

    def attend_prefill(self, states: States) -> Tensor:
        """`pattern` by chunks: a chunk's queries attend to a band, the keys within their windows,
        and to the keys before it that all later queries see."""
        q, k, v, length = states.q, states.k, states.v, states.q.shape[2]
        chunk = min(max(CHUNK, self.local), length)
        window = min(self.local, chunk)  # so a band spans at most two chunks
        far_k, far_v = (self._seen_by_all(x) for x in (k, v))
        q, k, v = (_in_chunks(x, chunk) for x in (q, k, v))
        near_k, near_v = (_ends_of_chunks_before(x, window) for x in (k, v))
        # split, since every slice of these would have a gradient of full size
        parts = zip(*(x.split(AT_ONCE, 1) for x in (q, k, near_k, v, near_v)), strict=True)
        out = []
        for i, (queries, chunk_k, before_k, chunk_v, before_v) in enumerate(parts):
            first = torch.arange(queries.shape[1], device=q.device) + i * AT_ONCE
            first = first[:, None, None] * chunk  # (n, 1, 1), each chunk's first position
            last_band = (i * AT_ONCE + queries.shape[1] - 1) * chunk - window
            far = self._count_before(max(0, last_band))
            keys, values = (
                torch.cat((x[:, None, :, :far].expand(-1, len(first), -1, -1, -1), *band), dim=3)
                for x, *band in ((far_k, before_k, chunk_k), (far_v, before_v, chunk_v))
            )
            seen = self._seen_in_bands(first, chunk, window, far)
            seen = seen.repeat(len(q), 1, 1)[:, None]  # (B n, 1, C, far + W + C)
            part = attend(queries.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), seen)
            out.append(part.unflatten(0, queries.shape[:2]))
        return torch.cat(out, dim=1).transpose(1, 2).flatten(2, 3)[:, :, :length]

    def attend_decode(self, states: States) -> Tensor | None:
        if not states.all_seen:
            return None
        band = max(0, states.k.shape[2] - 1 - self.local)
        k, v = (
            torch.cat((self._seen_by_all(x[:, :, :band]), x[:, :, band:]), dim=2)
            for x in (states.k, states.v)
        )
        return attend(states.q, k, v)

    def attended(self, positions: Tensor) -> Tensor:
        band = (positions - self.local).relu()
        return self._count_before(band) + positions - band + 1

    def _seen_in_bands(self, first: Tensor, chunk: int, window: int, far: int) -> Tensor:
        """Which far keys and which of its band each query sees, (n, C, far + W + C), for chunks
        that begin at first (n, 1, 1)."""
        query = first + torch.arange(chunk, device=first.device)[:, None]
        key = first - window + torch.arange(window + chunk, device=first.device)
        near = self.pattern(query, key) & (key <= query) & (key >= 0)
        # Not clamp, on whose integer quotients the code generator of torch 2.13 fails.
        before = self._count_before((first - window).relu())
        far_seen = torch.arange(far, device=first.device) < before
        return torch.cat((far_seen.expand(-1, chunk, -1), near), dim=2)

    def _seen_by_all(self, states: Tensor) -> Tensor:
        """Of states (B, K, T, D) those that all later queries see, in order."""
        if not self.dilation:
            return states[:, :, : self.initial]
        first = (self.initial // self.dilation + 1) * self.dilation - 1  # not an initial one
        return torch.cat((states[:, :, : self.initial], states[:, :, first :: self.dilation]), 2)

    def _count_before(self, position: Position) -> Position:
        """How many positions before this one all later queries see."""
        # min(position, initial), for ints and tensors
        initial = position - (position - self.initial) * (position > self.initial)
        if not self.dilation:
            return initial
        return initial + position // self.dilation - initial // self.dilation


@dataclass(frozen=True, kw_only=True)
class DilatedAfterPrefix(Dilated):
    """`Dilated` for the queries from position `prefix` on; those before attend densely, as in the
    prefill of a method that selects when decoding. For training."""

    prefix: int

    def pattern(self, query: Tensor, key: Tensor) -> Tensor:
        return (query < self.prefix) | super().pattern(query, key)

    def attend_prefill(self, states: States) -> Tensor:
        q, k, v = (x[:, :, : self.prefix] for x in (states.q, states.k, states.v))
        dense = attend(q, k, v, causal=True)
        return torch.cat((dense, super().attend_prefill(states)[:, :, self.prefix :]), dim=2)

    def attended(self, positions: Tensor) -> Tensor:
        return torch.where(positions < self.prefix, positions + 1, super().attended(positions))


def _in_chunks(states: Tensor, chunk: int) -> Tensor:
    """(B, ·, T, D) -> (B, n, ·, chunk, D), zeros at the end."""
    if missing := -states.shape[2] % chunk:  # padding by 0 would copy
        states = F.pad(states, (0, 0, 0, missing))
    return states.unflatten(2, (-1, chunk)).transpose(1, 2)


def _ends_of_chunks_before(states: Tensor, window: int) -> Tensor:
    """(B, n, ·, C, D) -> (B, n, ·, window, D), zeros before the first chunk."""
    ends = states[:, :-1, :, states.shape[3] - window :]
    return F.pad(ends, (0, 0, 0, 0, 0, 0, 1, 0))
