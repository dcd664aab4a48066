"""SparQ: at every decoding step, tokens scored by the query's largest channels."""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ratplus_exp.methods.exact import TopKTokens
from ratplus_kernels.selection import inner_products


@dataclass(frozen=True)
class SparQ(TopKTokens):
    """q · k over the r largest channels of |q|, r = channels · D, scaled to a softmax's logits.

    mean_value: the mean value of all tokens replaces those left out, by their share of that
    softmax. The original sums |q| over a group and forces a local window; here each query head
    selects, and the query's token is forced.
    """

    paper = "Ribar et al., 2023, arXiv 2312.04985"
    reads = "r channels of all keys"
    channels: Annotated[float, Field(gt=0, le=1)] = 0.25
    mean_value: bool = True

    def score(self, queries: Tensor, representatives: Tensor) -> Tensor:
        q, dim = queries.to(torch.promote_types(queries.dtype, torch.float32)), queries.shape[-1]
        largest = q.abs().topk(int(self.numbers(dim)), dim=-1).indices
        few = torch.zeros_like(q).scatter(-1, largest, q.gather(-1, largest))
        share = few.abs().sum(-1, keepdim=True) / q.abs().sum(-1, keepdim=True)
        return inner_products(few, representatives.unsqueeze(2)) / (dim * share).sqrt()

    def numbers(self, dim: int, layer: int = 0) -> float:
        return max(1, round(self.channels * dim))
