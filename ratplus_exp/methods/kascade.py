"""Layers that share a selection: some choose the exact top-k, those between take it over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ratplus_exp.methods.exact import TopKTokens
from ratplus_exp.settings import Positive


@dataclass(frozen=True)
class Shared(TopKTokens):
    """Every `every`-th layer from the first on takes its exact top-k tokens, and the layers up to
    the next one take the same, head by head.

    Kascade finds its anchor layers and a mapping of heads on a development set, has a dense first
    layer and shares a selection between queries of a tile while it reads the prompt.
    """

    paper: ClassVar[str] = "Deshmukh et al., 2025, arXiv 2512.16391 (Kascade)"
    reads: ClassVar[str] = "all keys in anchor layers, indices in the others"
    every: Positive = 2

    def anchor(self, layer: int) -> int:
        return layer - layer % self.every

    def numbers(self, dim: int, layer: int = 0) -> float:
        return dim if self.anchor(layer) == layer else 0
