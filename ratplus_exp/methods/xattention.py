"""XAttention: blocks of queries select blocks of keys by sums over antidiagonals."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ratplus_exp.methods.base import BlockMethod
from ratplus_exp.settings import Positive
from ratplus_kernels.selection import inner_products


@dataclass(frozen=True)
class XAttention(BlockMethod):
    """The blocks with the highest attention mass, estimated from every stride-th antidiagonal.

    The logit of a group of `stride` queries and one of keys is the sum of q · k over their
    antidiagonal, divided by stride · √D. A block of queries sums its softmaxes over the blocks
    before it and selects the top-k; the local block is forced. The original selects by a threshold
    of mass.
    """

    phase = "prefill"
    paper = "Xu et al., 2025, arXiv 2503.16428"
    reads = "all keys, once per block of queries"
    by_query_block = True
    stride: Positive = 8

    def represent(self, keys: Tensor) -> Tensor:
        """(B, K, N, block_size, D) -> (B, K, N, block_size D): all keys."""
        return keys.flatten(3)

    def score(self, queries: Tensor, representatives: Tensor) -> Tensor:
        """log Σ exp of the logits of a query's group with the groups of each block."""
        count, dim = queries.shape[3:]
        groups = F.pad(queries, (0, 0, 0, -count % self.stride)).unflatten(3, (-1, self.stride))
        keys = representatives.unflatten(3, (-1, self.stride * dim)).flatten(2, 3).unsqueeze(2)
        logits = inner_products(groups.flip(4).flatten(4), keys) / (self.stride * dim**0.5)
        mass = logits.unflatten(-1, (-1, self.block_size // self.stride)).logsumexp(-1)
        return mass.repeat_interleave(self.stride, dim=3)[:, :, :, :count]

    def rank(
        self, scores: Tensor, queries: Tensor, representatives: Tensor, allowed: Tensor
    ) -> Tensor:
        """For each query the sum of its block's softmaxes over the blocks before it."""
        size, count = self.block_size, scores.shape[3]
        groups = scores[:, :, :, :: self.stride]
        before = F.pad(allowed[..., ::size, 1:], (0, 1))  # (1, 1, 1, blocks of queries, N)
        # The end of a last, partial block of queries equals a batch's padding: zeros.
        missing = before.shape[3] * size // self.stride - groups.shape[3]
        level = math.log(size // self.stride)
        groups = F.pad(groups, (0, 0, 0, missing), value=level)
        groups = groups.unflatten(3, (-1, size // self.stride))
        mass = groups.masked_fill(~before.unsqueeze(-2), -torch.inf).softmax(-1).nan_to_num(0)
        return mass.sum(4).repeat_interleave(size, dim=3)[:, :, :, :count]

    def numbers(self, dim: int, layer: int = 0) -> float:
        return dim

    def validate(self) -> None:
        super().validate()
        if self.block_size % self.stride:
            raise ValueError(
                f"method.stride={self.stride} does not divide method.block_size="
                f"{self.block_size}: lower it"
            )
