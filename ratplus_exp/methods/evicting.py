"""TOVA and H2O: a cache of constant size; every decoding step evicts one token."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

import ratplus_kernels
from ratplus_exp.methods.base import EVERY, Method
from ratplus_exp.settings import Whole

CHUNK = 64  # queries whose attention is held in memory together


@dataclass(frozen=True)
class TOVA(Method):
    """Keeps the tokens that the newest query attends to most.

    A step attends to top_k tokens and its new one. The original averages attention over all heads
    of a layer; here it is averaged over those of a KV head.
    """

    phase = "step"
    paper = "Oren et al., 2024, arXiv 2401.06104"
    reads = "the step's own attention"
    observed = 1

    def score(self, queries: Tensor, representatives: Tensor) -> Tensor:
        """The attention of the prompt's last queries (B, K, G, Q, D), summed: (B, K, 1, 1, N)."""
        length, count, parts = representatives.shape[2], queries.shape[3], []
        for start in range(0, count, CHUNK):
            chunk = queries[:, :, :, start : start + CHUNK].flatten(1, 2)
            seen = length - count + start + chunk.shape[2]
            mass = ratplus_kernels.attention_mass(chunk, representatives[:, :, :seen])
            parts.append(F.pad(mass, (0, length - seen)))
        return sum(parts[1:], parts[0])[:, :, None, None]

    def observe(self, mass: Tensor, new: Tensor) -> Tensor:
        return new


@dataclass(frozen=True)
class H2O(TOVA):
    """Keeps the tokens that all queries so far attend to most, and the `window` newest.

    window: 0 for half of the budget, as in the original.
    """

    paper = "Zhang et al., 2023, arXiv 2306.14048"
    reads = "the attention of every step, accumulated"
    observed = EVERY
    window: Whole = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", self.window or self.top_k // 2)

    @property
    def forced(self) -> int:
        return self.window

    def observe(self, mass: Tensor, new: Tensor) -> Tensor:
        return mass + new
