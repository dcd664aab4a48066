"""SnapKV (Li et al., 2024): after the prompt, keep the tokens that its end attends to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import ratplus_kernels
from ratplus_exp.methods.base import Method, Phase
from ratplus_kernels.dispatch import use_triton
from ratplus_kernels.selection import inner_products


@dataclass(frozen=True)
class SnapKV(Method):
    """Scores tokens by the attention mass that the last `window` prompt queries give them.

    The mass is smoothed over neighbouring positions ("avg" with kernel 5 or "max" with kernel 7 in
    the original). The window itself is always kept and counts within top_k. Under GQA the masses
    of a group's query heads are added up, since they share what is kept.
    """

    phase: ClassVar[Phase | None] = "once"

    top_k: int = 1024
    window: int = 64
    pooling: Literal["avg", "max", "none"] = "avg"
    kernel: int = 5

    @property
    def forced(self) -> int:
        return self.window

    def represent(self, keys: Tensor) -> Tensor:
        return keys

    def score(self, queries: Tensor, representatives: Tensor) -> Tensor:
        """Queries of the window (B, K, G, window, D) and keys (B, K, N, D), which end with it.

        Returns (B, K, 1, 1, N).
        """
        length, window = representatives.shape[2], queries.shape[3]
        logits = inner_products(queries, representatives.unsqueeze(2))
        position = torch.arange(length, device=queries.device)
        future = position > position[-window:, None]
        logits = (logits / math.sqrt(queries.shape[-1])).masked_fill(future, -torch.inf)
        mass = logits.softmax(-1).sum(3).sum(2)  # (B, K, N)
        mass[..., : length - window] = self._smooth(mass[..., : length - window])
        return mass[:, :, None, None]

    def _smooth(self, mass: Tensor) -> Tensor:
        """Pools over positions, zeros beyond the ends; the window is not part of `mass`."""
        if self.pooling == "none" or not mass.shape[-1]:
            return mass
        pool = F.avg_pool1d if self.pooling == "avg" else F.max_pool1d
        return pool(mass, self.kernel, stride=1, padding=self.kernel // 2)

    def keep(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
        # The kernel has this very score: a subclass may have another.
        if type(self) is not SnapKV or not use_triton(q, k, v):
            return None
        keys, values, _ = ratplus_kernels.snapkv_select(
            q, k, v, self.top_k, pooling=self.pooling, kernel=self.kernel
        )
        return keys, values

    def validate(self) -> None:
        super().validate()
        if self.window < 1:
            raise ValueError(f"method.window={self.window} is too small: use at least 1")
        if self.pooling not in ("avg", "max", "none"):
            raise ValueError(f"method.pooling={self.pooling} is unknown: use avg, max or none")
        if self.kernel % 2 == 0:
            raise ValueError(f"SnapKV's pooling kernel must be odd, got {self.kernel}")
