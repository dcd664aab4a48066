"""What a method really read: tokens that were attended to, and what choosing them read beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Usage:
    """How many tokens the queries of the sparse phase really attended to.

    The lists of tensors have one (B, Q) a layer and forward.
    slots: of methods that evict, how many each layer's cache has after the prompt: as many as the
        head that keeps most.
    """

    attended: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    choosing: list[Tensor] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)

    def add(self, attended: Tensor, positions: Tensor, choosing: Tensor | None = None) -> None:
        """attended (B, Q): tokens, mean over heads; positions (B or 1, Q) of the queries;
        choosing: as `Method.choosing` counts it, None for nothing.

        A dense query at position p attends to p + 1 tokens. Padding has position −1.
        """
        self.attended.append(attended)
        self.positions.append(positions.expand(attended.shape))
        choosing = torch.zeros_like(attended) if choosing is None else choosing
        self.choosing.append(choosing.expand(attended.shape))

    def join(self, parts: Sequence[Usage]) -> None:
        """Add what the queries of parts of the batch attended to."""
        for name in ("attended", "positions", "choosing"):
            those = zip(*(getattr(part, name) for part in parts), strict=True)
            getattr(self, name).extend(torch.cat(x) for x in those)
        self.slots.extend(map(max, zip(*(part.slots for part in parts), strict=True)))

    def fractions(self, rows: int, last: Tensor | None = None) -> Tensor:
        """The measured budget of each row (rows,), over all layers; 1 when nothing was sparse.

        last (B,): the position of each row's last query that counts; a batch goes on until its
        longest answer is complete, and what the other rows do meanwhile is no part of theirs.
        """
        return self._share(self.attended, rows, last, 1.0)

    def choosing_fractions(self, rows: int, last: Tensor | None = None) -> Tensor:
        """Like `fractions`, what choosing read: its bytes over those of all keys and values."""
        return self._share(self.choosing, rows, last, 0.0)

    def _share(
        self, what: list[Tensor], rows: int, last: Tensor | None, of_nothing: float
    ) -> Tensor:
        if not what:
            return torch.full((rows,), of_nothing)
        read, positions = torch.cat(what, 1), torch.cat(self.positions, 1)
        real = positions >= 0
        if last is not None:
            real &= positions <= last.to(positions.device)[:, None]
        available = ((positions + 1) * real).sum(1)
        fractions = (read.double() * real).sum(1) / available.clamp(min=1)
        return fractions.masked_fill(available == 0, of_nothing).cpu()


class Uncounted(Usage):
    """For training, which has no use for it. Compiled layers would be compiled anew for every
    length of the lists."""

    def add(self, attended: Tensor, positions: Tensor, choosing: Tensor | None = None) -> None:
        pass
