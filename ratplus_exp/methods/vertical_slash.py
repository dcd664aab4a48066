"""MInference's vertical-slash pattern: columns and diagonals of a prompt's attention."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ratplus_exp.methods.base import Method
from ratplus_exp.settings import Positive
from ratplus_kernels.snapkv import window_logits


@dataclass(frozen=True)
class VerticalSlash(Method):
    """top_k / 2 keys that all queries see, and top_k / 2 distances at which each sees a key.

    Both are selected by the attention of the prompt's last `window` queries, summed over columns
    and diagonals; the first column and the distance 0 are forced. The original tunes the numbers of
    columns and diagonals for each head offline, at least 30 and 100.
    """

    phase = "prefill"
    paper = "Jiang et al., 2024, arXiv 2407.02490"
    reads = "the last queries and all keys, once"
    forced = 2
    window: Positive = 64

    @property
    def observed(self) -> int:
        return self.window

    def k(self, layer: int, layers: int) -> int:
        return self.top_k // 2

    def score(self, queries: Tensor, representatives: Tensor) -> Tensor:
        """(B, K, G, W, D) and (B, K, N, D) -> (B, K, G, 2, N): of columns, and of distances."""
        window, length = queries.shape[3], representatives.shape[2]
        share = window_logits(queries.flatten(1, 2), representatives).softmax(-1)
        token = torch.arange(length, device=queries.device)
        distance = token[-window:, None] - token  # (W, N), from each key to each query
        diagonals = share.gather(-1, distance.clamp(min=0).expand(share.shape)) * (distance >= 0)
        return torch.stack((share.sum(3), diagonals.sum(3)), dim=3)

    def choosing(self, positions: Tensor, dim: int, layer: int = 0) -> None:
        return None
