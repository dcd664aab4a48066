"""SnapKV (Li et al., 2024): after the prompt, keep the tokens that its last queries attend to; and
variants that share a budget between heads (AdaKV) or layers (PyramidKV)."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

import ratplus_kernels
from ratplus_exp.methods.base import Method
from ratplus_exp.settings import Odd, Positive, Share


@dataclass(frozen=True)
class SnapKV(Method):
    """Scores tokens by the attention mass that the last `window` prompt queries give them.

    The mass is pooled over neighbouring positions (in the original "avg" with kernel 5 or "max"
    with kernel 7). The window is always kept and counts within top_k. Under GQA the masses of a
    group's query heads are summed, since the heads share the cache.
    """

    phase = "once"
    paper = "Li et al., 2024, arXiv 2404.14469"
    reads = "the last queries and all keys, once"
    window: Positive = 64
    pooling: Literal["avg", "max"] = "avg"
    kernel: Odd = 5

    @property
    def forced(self) -> int:
        return self.window

    def score(self, queries: Tensor, representatives: Tensor) -> Tensor:
        """Queries of the window (B, K, G, window, D), keys (B, K, N, D) -> (B, K, 1, 1, N)."""
        before = representatives.shape[2] - queries.shape[3]
        mass = ratplus_kernels.attention_mass(queries.flatten(1, 2), representatives)  # (B, K, N)
        if before:  # with zeros beyond the ends
            pool = F.avg_pool1d if self.pooling == "avg" else F.max_pool1d
            mass[..., :before] = pool(mass[..., :before], self.kernel, 1, self.kernel // 2)
        return mass[:, :, None, None]


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """SnapKV's scores, ranked over all KV heads of a layer, which keep top_k on average.

    floor_share: each head keeps at least this share of top_k by its own ranking. The original
    distributes the rest of the budget and adds the floor to each head's part.
    """

    paper = "Feng et al., 2024, arXiv 2407.11550"
    pooled = True
    floor_share: Share = 0.2

    @property
    def floor(self) -> int:
        return max(self.window, int(self.floor_share * self.top_k))


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with a number of tokens that falls linearly over the layers, top_k on average.

    beta: the last layer keeps the window, which counts within top_k, and 1/beta of the rest.
    """

    paper = "Cai et al., 2024, arXiv 2406.02069"
    beta: Annotated[float, Field(ge=1, le=1e6)] = 20.0

    def k(self, layer: int, layers: int) -> int:
        rest = self.top_k - self.window
        depth = layer / (layers - 1) if layers > 1 else 0.5
        return self.window + round(rest * (1 + (1 - 1 / self.beta) * (1 - 2 * depth)))
