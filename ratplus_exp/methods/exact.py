"""Upper bounds of all methods: the candidates with the highest exact attention."""

import math
from dataclasses import dataclass

from torch import Tensor

from ratplus_exp.methods.base import BlockMethod, Method
from ratplus_kernels.selection import inner_products


@dataclass(frozen=True)
class TopKTokens(Method):
    """The tokens with the highest q · k; the first and the query's token are forced."""

    phase = "decode"
    paper = "none: the upper bound of token selection"
    reads = "all keys"
    forced = 2

    def score(self, queries: Tensor, representatives: Tensor) -> Tensor:
        logits = inner_products(queries, representatives.unsqueeze(2))
        return logits / math.sqrt(queries.shape[-1])


@dataclass(frozen=True)
class TopKBlocks(BlockMethod):
    """The blocks with the highest attention mass, log Σ exp(q · k / √D) over a block's keys."""

    phase = "decode"
    paper = "none: the upper bound of block selection"
    reads = "all keys"

    def represent(self, keys: Tensor) -> Tensor:
        """(B, K, N, block_size, D) -> (B, K, N, block_size D): all keys."""
        return keys.flatten(3)

    def score(self, queries: Tensor, representatives: Tensor) -> Tensor:
        keys = representatives.unflatten(3, (self.block_size, -1)).flatten(2, 3)
        logits = inner_products(queries, keys.unsqueeze(2)) / math.sqrt(queries.shape[-1])
        return logits.unflatten(-1, (-1, self.block_size)).logsumexp(-1)
