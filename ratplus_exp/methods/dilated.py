"""P2's dilated attention: a fixed pattern, used for joint training and dilated inference."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from ratplus_exp.methods.base import Method

CHUNK = 256  # queries that attend at a time


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

    def attend_prefill(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        """`pattern`, some queries at a time: they see the band of keys that their windows reach
        and, of what lies before the band, the few keys that everybody sees."""
        if type(self) is not Dilated:  # a subclass may have another pattern
            return None
        length = q.shape[2]
        far_k, far_v = (self._seen_from_afar(x) for x in (k, v))
        position = torch.arange(length, device=q.device)
        out = []
        for start in range(0, length, CHUNK):
            end, band = min(start + CHUNK, length), max(0, start - self.local)
            queries, keys = position[start:end, None], position[band:end]
            far = int(self._count_before(torch.tensor(band)))
            seen = F.pad(self.pattern(queries, keys) & (keys <= queries), (far, 0), value=True)
            out.append(
                F.scaled_dot_product_attention(
                    q[:, :, start:end],
                    torch.cat((far_k[:, :, :far], k[:, :, band:end]), dim=2),
                    torch.cat((far_v[:, :, :far], v[:, :, band:end]), dim=2),
                    attn_mask=seen,
                    enable_gqa=q.shape[1] != k.shape[1],
                )
            )
        return torch.cat(out, dim=2)

    def attended(self, positions: Tensor) -> Tensor:
        band = (positions - self.local).clamp(min=0)
        return self._count_before(band) + positions - band + 1

    def _seen_from_afar(self, states: Tensor) -> Tensor:
        """Of states (B, K, T, D) those that all later queries see, in order."""
        if not self.dilation:
            return states[:, :, : self.initial]
        first = (self.initial // self.dilation + 1) * self.dilation - 1  # not an initial one
        return torch.cat((states[:, :, : self.initial], states[:, :, first :: self.dilation]), 2)

    def _count_before(self, position: Tensor) -> Tensor:
        """How many positions before each of these all later queries see."""
        initial = position.clamp(max=self.initial)
        if not self.dilation:
            return initial
        return initial + position // self.dilation - initial // self.dilation
