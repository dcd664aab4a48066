"""What a layer's attention reads: its queries, keys and values, and their positions."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass
class Step:
    """Positions of the tokens of one forward pass, (B or 1, T), from 0 at each row's first token.

    lengths: (B,) real tokens per row; None if all T are real, as after the prompt.
    counts: what a method's fast path attends to and reads, for all layers of the pass.
    """

    positions: Tensor
    lengths: Tensor | None = None
    counts: dict[Any, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    @cached_property
    def rows_of_length(self) -> dict[int, Tensor]:
        """The rows of each length; cached, since reading lengths synchronises with the device."""
        assert self.lengths is not None
        rows: dict[int, list[int]] = {}
        for row, length in enumerate(self.lengths.tolist()):
            rows.setdefault(length, []).append(row)
        device = self.lengths.device
        return {length: torch.tensor(row, device=device) for length, row in rows.items()}


@dataclass
class States:
    """One layer in one forward pass.

    q: (B, H, Q, D), the queries at the positions of `step`.
    k, v: (B, K, T, D), those of the same tokens; while decoding the cache's, which include them.
    select_by: (B, K, T, D), the keys that methods select by (None: k).
    representatives: (B, K, N, *), of all blocks, if they are computed already.
    held: (B, K, T), the token in each slot of the cache (None: slot i holds token i).
    all_seen: while decoding, whether every query follows all T slots, so that no mask is needed.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    step: Step
    select_by: Tensor | None = None
    representatives: Tensor | None = None
    held: Tensor | None = None
    all_seen: bool = False

    @property
    def by(self) -> Tensor:
        """The keys to select by."""
        return self.k if self.select_by is None else self.select_by
