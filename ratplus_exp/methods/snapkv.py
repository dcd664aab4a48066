"""SnapKV (Li et al., 2024): after the prompt, keep the tokens that its end attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

import ratplus_kernels
from ratplus_exp.methods.base import Method, Phase
from ratplus_exp.settings import SnapKVSettings


@dataclass(frozen=True)
class SnapKV(SnapKVSettings, Method):
    """Scores tokens by the attention mass that the last `window` prompt queries give them.

    The mass is smoothed over neighbouring positions ("avg" with kernel 5 or "max" with kernel 7 in
    the original). The window itself is always kept and counts within top_k. Under GQA the masses
    of a group's query heads are added up, since they share what is kept.
    """

    phase: ClassVar[Phase | None] = "once"

    @property
    def forced(self) -> int:
        return self.window

    def represent(self, keys: Tensor) -> Tensor:
        return keys

    def score(self, queries: Tensor, representatives: Tensor) -> Tensor:
        """Queries of the window (B, K, G, window, D) and keys (B, K, N, D), which end with it.

        Returns (B, K, 1, 1, N).
        """
        before = representatives.shape[2] - queries.shape[3]
        mass = ratplus_kernels.attention_mass(queries.flatten(1, 2), representatives)  # (B, K, N)
        mass[..., :before] = self._smooth(mass[..., :before])
        return mass[:, :, None, None]

    def _smooth(self, mass: Tensor) -> Tensor:
        """Pools over positions, zeros beyond the ends; the window is not part of `mass`."""
        if self.pooling == "none" or not mass.shape[-1]:
            return mass
        pool = F.avg_pool1d if self.pooling == "avg" else F.max_pool1d
        return pool(mass, self.kernel, stride=1, padding=self.kernel // 2)
