"""Measured budgets: tokens that were attended to, and what the selection read in addition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Usage:
    """How many tokens the queries of the sparse phase attended to: one (B, Q) a layer and forward.

    slots: (B,) a layer, the slots that a row needs after the prompt: as many as the head that keeps
        most tokens.
    """

    attended: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    choosing: list[Tensor] = field(default_factory=list)
    slots: list[Tensor] = field(default_factory=list)

    def add(self, attended: Tensor, positions: Tensor, choosing: Tensor | None = None) -> None:
        """attended (B, Q): tokens, mean over heads (p + 1 for dense attention at position p);
        positions (B or 1, Q) of the queries, −1 for padding; choosing: of `Method.choosing`."""
        self.attended.append(attended)
        self.positions.append(positions.expand(attended.shape))
        choosing = torch.zeros_like(attended) if choosing is None else choosing
        self.choosing.append(choosing.expand(attended.shape))

    def join(self, parts: Sequence[Usage]) -> None:
        """Add the usage of parts of the batch."""
        for name in ("attended", "positions", "choosing", "slots"):
            of_layers = zip(*(getattr(part, name) for part in parts), strict=True)
            getattr(self, name).extend(torch.cat(x) for x in of_layers)

    def fractions(self, rows: int, last: Tensor | None = None) -> Tensor:
        """The measured budget of each row (rows,), over all layers; 1 when nothing was sparse.

        last (B,): the position of each row's last query that counts; the batch continues until its
        longest answer is complete.
        """
        return self._share(self.attended, rows, last, 1.0)

    def choosing_fractions(self, rows: int, last: Tensor | None = None) -> Tensor:
        """As `fractions`, of the bytes that the selection read over those of all K and V."""
        return self._share(self.choosing, rows, last, 0.0)

    def _share(self, counts: list[Tensor], rows: int, last: Tensor | None, empty: float) -> Tensor:
        if not counts:
            return torch.full((rows,), empty)
        read, positions = torch.cat(counts, 1), torch.cat(self.positions, 1)
        real = positions >= 0
        if last is not None:
            real &= positions <= last.to(positions.device)[:, None]
        available = ((positions + 1) * real).sum(1)
        fractions = (read.double() * real).sum(1) / available.clamp(min=1)
        return fractions.masked_fill(available == 0, empty).cpu()
