"""KeyDiff: after the prompt, keep the tokens whose keys differ most from the others."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, float32, promote_types

from ratplus_exp.methods.base import Method


@dataclass(frozen=True)
class KeyDiff(Method):
    """Minus the cosine of a key with the mean of all normalised keys.

    The original evicts block by block during the prefill; here eviction is once, after it.
    """

    phase = "once"
    paper = "Park et al., 2025, arXiv 2504.15364"
    reads = "all keys, once"

    def score(self, queries: Tensor, representatives: Tensor) -> Tensor:
        """(B, K, 1, 1, N), independent of the queries."""
        wide = promote_types(representatives.dtype, float32)
        keys = F.normalize(representatives.to(wide), dim=-1)
        anchor = F.normalize(keys.mean(2, keepdim=True), dim=-1)
        return -(keys * anchor).sum(-1)[:, :, None, None]
