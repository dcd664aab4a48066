"""MoBA (Lu et al., 2025), training-free: every prompt token attends to the blocks it selects."""

from dataclasses import dataclass

from torch import Tensor

import ratplus_kernels
from ratplus_exp.methods.base import BlockMethod
from ratplus_exp.methods.states import States
from ratplus_kernels.selection import inner_products


@dataclass(frozen=True)
class MoBA(BlockMethod):
    """r_i: the mean of the block's keys; s(q, r_i) = q · r_i. Sparse prefill, dense decoding."""

    phase = "prefill"
    paper = "Lu et al., 2025, arXiv 2502.13189"
    reads = "means of all blocks"

    def represent(self, keys: Tensor) -> Tensor:
        return keys.mean(3)

    def score(self, queries: Tensor, representatives: Tensor) -> Tensor:
        return inner_products(queries, representatives.unsqueeze(2))

    def represent_blocks(self, blocks: ratplus_kernels.Blocks) -> Tensor:
        return blocks.mean

    def attend_prefill(self, states: States) -> Tensor | None:
        sizes = {"block_size": self.block_size, "top_k": self.top_k}
        means = states.representatives
        return ratplus_kernels.moba_prefill(states.q, states.k, states.v, means=means, **sizes)
