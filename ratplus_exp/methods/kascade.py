"""Layers that share a selection: anchor layers select the exact top-k, the others reuse it."""

from dataclasses import dataclass

from ratplus_exp.methods.exact import TopKTokens
from ratplus_exp.settings import Positive


@dataclass(frozen=True)
class Shared(TopKTokens):
    """Every `every`-th layer, from the first on, selects its exact top-k tokens; the layers up to
    the next anchor reuse the selection, head by head.

    Kascade fits anchor layers and a mapping of heads on a development set, has a dense first layer
    and shares a selection between the queries of a tile during the prefill.
    """

    paper = "Deshmukh et al., 2025, arXiv 2512.16391 (Kascade)"
    reads = "all keys in anchor layers, indices in the others"
    every: Positive = 2

    def anchor(self, layer: int) -> int:
        return layer - layer % self.every

    def numbers(self, dim: int, layer: int = 0) -> float:
        return dim if self.anchor(layer) == layer else 0
