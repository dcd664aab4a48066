"""Measured budgets: tokens that were attended to, and what the selection read in addition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

ATTENDED, POSITIONS, CHOOSING = range(3)  # the arguments of `Usage.add`


@dataclass
class Usage:
    """How many tokens the queries of the sparse phase attended to.

    counts: for each layer and forward pass the arguments of `add`, all (B, Q).
    slots: (B,) per layer, the slots that a row needs after the prompt: as many as the head that
        keeps most tokens.
    """

    counts: list[tuple[Tensor, ...]] = field(default_factory=list)
    slots: list[Tensor] = field(default_factory=list)

    def add(self, attended: Tensor, positions: Tensor, choosing: Tensor | None = None) -> None:
        """attended (B, Q): tokens, mean over heads (p + 1 for dense attention at position p);
        positions (B or 1, Q) of the queries, −1 for padding; choosing: of `Method.choosing`."""
        choosing = torch.zeros_like(attended) if choosing is None else choosing
        self.counts.append((attended, *(x.expand(attended.shape) for x in (positions, choosing))))

    def join(self, parts: Sequence[Usage]) -> None:
        """Add the usage of parts of the batch."""
        for layer in zip(*(part.counts for part in parts), strict=True):
            self.counts.append(tuple(map(torch.cat, zip(*layer, strict=True))))
        self.slots.extend(map(torch.cat, zip(*(part.slots for part in parts), strict=True)))

    def fractions(self, rows: int, last: Tensor | None = None) -> Tensor:
        """The measured budget of each row (rows,), over all layers; 1 when nothing was sparse.

        last (B,): the position of each row's last query that counts; the batch continues until its
        longest answer is complete.
        """
        return self._share(ATTENDED, rows, last, 1.0)

    def choosing_fractions(self, rows: int, last: Tensor | None = None) -> Tensor:
        """As `fractions`, of the bytes that the selection read over those of all K and V."""
        return self._share(CHOOSING, rows, last, 0.0)

    def _share(self, kind: int, rows: int, last: Tensor | None, empty: float) -> Tensor:
        if not self.counts:
            return torch.full((rows,), empty)
        read, positions = (torch.cat([x[i] for x in self.counts], 1) for i in (kind, POSITIONS))
        real = positions >= 0
        if last is not None:
            real &= positions <= last.to(positions.device)[:, None]
        available = ((positions + 1) * real).sum(1)
        fractions = (read.double() * real).sum(1) / available.clamp(min=1)
        return fractions.masked_fill(available == 0, empty).cpu()
