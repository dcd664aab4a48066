"""Expected Attention: keep the tokens that queries distributed as the prompt's attend to."""

from dataclasses import dataclass

from torch import Tensor, float32, promote_types

from ratplus_exp.methods.base import EVERY, Method


@dataclass(frozen=True)
class ExpectedAttention(Method):
    """softmax(μᵀk / √D + kᵀΣk / 2D) · ‖v‖, with mean μ and covariance Σ of the prompt's queries.

    The weights of a group's query heads are averaged. The original computes the statistics before
    RoPE and rotates them to the next 512 positions; here they are computed on the rotated queries.
    """

    phase = "once"
    paper = "Devoto et al., 2025, arXiv 2510.00636"
    reads = "all queries, keys and values, once"
    reads_values = True
    observed = EVERY

    def score(self, queries: Tensor, representatives: Tensor) -> Tensor:
        """(B, K, G, Q, D) and (B, K, N, 2 D) -> (B, K, 1, 1, N)."""
        wide, dim = promote_types(queries.dtype, float32), queries.shape[-1]
        keys, values = representatives.to(wide).split(dim, dim=-1)
        queries, keys = queries.to(wide), keys.unsqueeze(2)
        mean = queries.mean(3, keepdim=True)
        centred = queries - mean
        covariance = centred.mT @ centred / queries.shape[3]
        spread = ((keys @ covariance) * keys).sum(-1)  # (B, K, G, N)
        logits = (mean @ keys.mT).squeeze(3) / dim**0.5 + spread / (2 * dim)
        weights = logits.softmax(-1).mean(2)
        return (weights * values.norm(dim=-1))[:, :, None, None]
