"""H1's count: does what a head selected contain the golden answer position at every step?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ratplus_exp.methods.base import Method


class HitCounter:
    """An `Engine.recorder` that notes, for every answer token, layer and head, whether the
    candidates selected for it hold one of its golden positions.

    Args:
        method: whose selections are recorded; phase "decode", "once" or "step".
        golden: (B, A, T) bool, true where token t of the prompt is a golden position of answer
            token a; a token without any does not count.
        lengths: (B,) tokens of each prompt, so that the query at position lengths + a − 1 is the
            one that predicts answer token a.
        layers: of the model.
    """

    def __init__(self, method: Method, golden: Tensor, lengths: Tensor, layers: int) -> None:
        self.method, self.golden, self.lengths, self.layers = method, golden, lengths, layers
        self.hits: Tensor | None = None  # (B, A, layers, heads) bool

    def __call__(self, layer: int, rows: Tensor, positions: Tensor, selected: Tensor) -> None:
        """See `Engine.recorder`. Under GQA a token method has one choice a KV head."""
        chosen = selected.flatten(1, 2)  # (R, H, Q, N)
        golden = self._candidates(chosen.shape[-1])[rows]  # (R, A, N)
        rows, answers = rows.cpu(), golden.shape[1]
        if self.hits is None:
            shape = (len(self.golden), answers, self.layers, chosen.shape[1])
            self.hits = torch.zeros(shape, dtype=torch.bool)
        # What was selected once serves every answer token; else each query serves its own.
        hit = torch.einsum("rhqn,ran->raqh", chosen.float(), golden.float()) > 0
        if self.method.phase in ("decode", "step"):
            token = torch.arange(answers, device=hit.device)
            wanted = self.lengths.to(hit.device)[rows.to(hit.device)][:, None] + token - 1
            own = positions[:, None] == wanted[..., None]  # (R, A, Q)
            hit = hit & own[..., None]
        self.hits[rows, :, layer] |= hit.any(2).cpu()

    def _candidates(self, count: int) -> Tensor:
        """(B, A, T) golden tokens as (B, A, count) golden candidates."""
        size = self.method.block_size if self.method.unit == "block" else 1
        room = count * size - self.golden.shape[-1]
        return F.pad(self.golden, (0, room)).unflatten(-1, (count, size)).any(-1)

    def values(self, owners: Sequence[Sequence[int]]) -> tuple[list[int], list[list[list[int]]]]:
        """Of each sample: gold values with a step, and how many of them each head hits throughout.

        owners: for each sample and answer token the value that the token belongs to, −1 for none.
        Returns counts (B), and hit values (B, layers, heads) as nested lists.
        """
        assert self.hits is not None, "nothing was selected"
        counts, hits = [], []
        for row, tokens in enumerate(owners):
            steps = [
                torch.tensor([i for i, owner in enumerate(tokens) if owner == value])
                for value in sorted(set(tokens) - {-1})
            ]
            counts.append(len(steps))
            found = torch.zeros(self.hits.shape[2:], dtype=torch.long)
            for step in steps:
                found += self.hits[row, step].all(0)
            hits.append(found.tolist())
        return counts, hits
