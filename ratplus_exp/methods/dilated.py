"""P2's dilated attention: a fixed pattern, used for joint training and dilated inference."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ratplus_exp.methods.attention import attend
from ratplus_exp.methods.base import Method

CHUNK = 256  # queries of a chunk, which share their keys
AT_ONCE = 16  # chunks that attend in one call

Position = TypeVar("Position", int, Tensor)


@dataclass(frozen=True)
class Dilated(Method):
    """Query t sees position j <= t when (j + 1) mod D = 0, or t − j <= W, or j < I.

    dilation: D; 0 leaves only the local window and the initial positions, which is how P2 trains
        the attention twin of a jointly trained RAT+.
    local: W, how far back the local window reaches.
    initial: I, the number of initial positions that every query sees.
    """

    dilation: int = 64
    local: int = 64
    initial: int = 1

    def fraction(self, length: int) -> Fraction:
        """1/D, as P2 counts, which leaves the local window and the initial positions out."""
        return Fraction(1, self.dilation) if self.dilation else Fraction(self.local, length)

    def pattern(self, query: Tensor, key: Tensor) -> Tensor:
        seen = (query - key <= self.local) | (key < self.initial)
        if self.dilation:
            seen = seen | ((key + 1) % self.dilation == 0)
        return seen

    def attend_prefill(
        self, q: Tensor, k: Tensor, v: Tensor, representatives: Tensor | None = None
    ) -> Tensor | None:
        """`pattern`, chunk by chunk: its queries see the band of keys that their windows reach
        and, of what lies before the band, the few keys that everybody sees."""
        if type(self) is not Dilated:  # a subclass may have another pattern
            return None
        length = q.shape[2]
        chunk = min(max(CHUNK, self.local), length)  # then a band holds at most twice its chunk
        window = min(self.local, length)
        chunks = -(-length // chunk)
        behind = chunks * chunk - length
        q = _padded(q, 0, behind).unflatten(2, (chunks, chunk)).transpose(1, 2)  # (B, n, H, C, D)
        far_k, far_v = (self._seen_from_afar(x) for x in (k, v))
        # Views of overlapping bands, and splits instead of slices, whose gradients would each be
        # a tensor of full size.
        bands_k, bands_v = (
            _padded(x, window, behind).unfold(2, window + chunk, chunk).permute(0, 2, 1, 4, 3)
            for x in (k, v)
        )  # (B, n, K, W + C, D)
        parts = zip(*(x.split(AT_ONCE, dim=1) for x in (q, bands_k, bands_v)), strict=True)
        out = []
        for i, (queries, *bands) in enumerate(parts):
            first = torch.arange(queries.shape[1], device=q.device) + i * AT_ONCE
            first = first[:, None, None] * chunk  # (n, 1, 1), each chunk's first position
            last_band = (i * AT_ONCE + queries.shape[1] - 1) * chunk - window
            far = self._count_before(max(0, last_band))
            keys, values = (
                torch.cat((x[:, None, :, :far].expand(-1, len(first), -1, -1, -1), band), dim=3)
                for x, band in zip((far_k, far_v), bands, strict=True)
            )
            seen = self._seen_in_bands(first, chunk, window, far)
            seen = seen.repeat(len(q), 1, 1)[:, None]  # (B n, 1, C, far + W + C)
            part = attend(queries.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), seen)
            out.append(part.unflatten(0, queries.shape[:2]))
        whole = torch.cat(out, dim=1).transpose(1, 2).flatten(2, 3)
        return whole[:, :, :length] if behind else whole

    def attend_decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        representatives: Tensor | None,
        positions: Tensor,
        all_seen: bool,
    ) -> Tensor | None:
        if type(self) is not Dilated or not all_seen:
            return None
        band = max(0, k.shape[2] - 1 - self.local)
        k, v = (
            torch.cat((self._seen_from_afar(x[:, :, :band]), x[:, :, band:]), dim=2) for x in (k, v)
        )
        return attend(q, k, v)

    def attended(self, positions: Tensor) -> Tensor:
        band = (positions - self.local).clamp(min=0)
        return self._count_before(band) + positions - band + 1

    def _seen_in_bands(self, first: Tensor, chunk: int, window: int, far: int) -> Tensor:
        """Which of its `far` keys and of its band each query sees, (n, C, far + W + C), for chunks
        that begin at first (n, 1, 1)."""
        query = first + torch.arange(chunk, device=first.device)[:, None]
        key = first - window + torch.arange(window + chunk, device=first.device)
        near = self.pattern(query, key) & (key <= query) & (key >= 0)
        before = self._count_before((first - window).clamp(min=0))
        afar = torch.arange(far, device=first.device) < before
        return torch.cat((afar.expand(-1, chunk, -1), near), dim=2)

    def _seen_from_afar(self, states: Tensor) -> Tensor:
        """Of states (B, K, T, D) those that all later queries see, in order."""
        if not self.dilation:
            return states[:, :, : self.initial]
        first = (self.initial // self.dilation + 1) * self.dilation - 1  # not an initial one
        return torch.cat((states[:, :, : self.initial], states[:, :, first :: self.dilation]), 2)

    def _count_before(self, position: Position) -> Position:
        """How many positions before each of these all later queries see."""
        # The smaller of the two, of ints as of tensors.
        initial = position - (position - self.initial) * (position > self.initial)
        if not self.dilation:
            return initial
        return initial + position // self.dilation - initial // self.dilation


def _padded(states: Tensor, before: int, behind: int) -> Tensor:
    """states (B, ·, T, D) with zeros around."""
    if not before and not behind:  # F.pad would copy
        return states
    return F.pad(states, (0, 0, before, behind))
