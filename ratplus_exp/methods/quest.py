"""Quest (Tang et al., 2024): at every decoding step, the blocks with the highest score bound."""

from dataclasses import dataclass

import torch
from torch import Tensor

import ratplus_kernels
from ratplus_exp.methods.base import BlockMethod
from ratplus_exp.methods.states import States
from ratplus_kernels.selection import inner_products


@dataclass(frozen=True)
class Quest(BlockMethod):
    """r_i: per-channel minimum and maximum of the block's keys.

    s(q, r_i) = Σ_d max(q_d · min_d, q_d · max_d), an upper bound of q · k over the block.
    """

    phase = "decode"
    paper = "Tang et al., 2024, arXiv 2406.10774"
    reads = "minima and maxima of all blocks"

    def represent(self, keys: Tensor) -> Tensor:
        """(B, K, N, block_size, D) -> (B, K, N, 2 D): minima, then maxima."""
        return torch.cat((keys.amin(3), keys.amax(3)), dim=-1)

    def score(self, queries: Tensor, representatives: Tensor) -> Tensor:
        """max(q·min, q·max) is q·max where q > 0 and q·min elsewhere: one matmul of both halves."""
        halves = torch.cat((queries.clamp(max=0), queries.clamp(min=0)), dim=-1)
        return inner_products(halves, representatives.unsqueeze(2))

    def represent_blocks(self, blocks: ratplus_kernels.Blocks) -> Tensor:
        return blocks.bounds

    def attend_decode(self, states: States) -> Tensor | None:
        assert states.representatives is not None
        sizes = {"block_size": self.block_size, "top_k": self.top_k}
        blocks, positions = states.representatives, states.step.positions
        return ratplus_kernels.quest_decode(
            states.q, states.k, states.v, blocks, positions, **sizes
        )
