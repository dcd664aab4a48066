"""One layer's share of the cache, and where the tokens of a forward pass stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ratplus_exp.methods import Engine
from ratplus_exp.methods.selection import EMPTY
from ratplus_kernels import gather_tokens

ROOM = 64  # slots allocated ahead of need
# A layer's tensors, and the dimension of each that is the batch.
BATCH = dict.fromkeys(("keys", "values", "select_by", "representatives", "held", "mass", "free"), 0)
BATCH |= {"memory_state": 1}


@dataclass
class Step:
    """Where the tokens of one forward pass stand in their rows.

    positions: (B or 1, T) positions of the tokens, from 0 at each row's first token.
    lengths: (B,) real tokens a row; None if all T are real. Only a prompt can have fewer.
    """

    positions: Tensor
    lengths: Tensor | None = None

    @cached_property
    def rows_of_length(self) -> dict[int, Tensor]:
        """The rows that have each of the lengths; asked of the device once for all layers."""
        assert self.lengths is not None
        rows: dict[int, list[int]] = {}
        for row, length in enumerate(self.lengths.tolist()):
            rows.setdefault(length, []).append(row)
        device = self.lengths.device
        return {length: torch.tensor(those, device=device) for length, those in rows.items()}


class SparseLayer(DynamicLayer):
    """One layer's share: keys and values (B, K, slots, D), memory state (·, B, ..., K, D) in fp32,
    and, for methods that select while decoding, block representatives (B, K, N, *) and the keys
    to select by (B, K, slots, D) where they are others than those to attend to.

    width: slots in use after the prompt in the longest row.
    held: (B, K, slots), which token is in each slot, where a method evicts. Where it does so at
        every step: mass (B, K, slots), the tokens' scores, and free (B, K), the next token's slot.
    """

    is_croppable = False  # see SparseCache.crop

    def __init__(self) -> None:
        super().__init__()
        self.width = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.select_by: Tensor | None = None
        self.memory_state: Tensor | None = None
        self.representatives: Tensor | None = None
        self.held: Tensor | None = None
        self.mass: Tensor | None = None
        self.free: Tensor | None = None

    def hold(self, keys: Tensor, values: Tensor, room: int) -> None:
        """Store the prompt's with room for `room` tokens more, in storage of their own: they may be
        views of far larger tensors."""
        self.width = keys.shape[2]
        self.keys, self.values = (with_room(x, x.shape[2] + room) for x in (keys, values))

    def remember(self, state: Tensor) -> None:
        """Store the memory's state, a later one in the place of the one before."""
        if self.memory_state is None or torch.is_grad_enabled():
            self.memory_state = state
        else:
            self.memory_state.copy_(state)

    def map_batch(self, function: Callable[[Tensor, int], Tensor]) -> None:
        """Replace every tensor by function(tensor, its batch dimension)."""
        for name, dim in BATCH.items():
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, function(tensor, dim))

    def join(self, parts: Sequence[SparseLayer]) -> None:
        """Hold what the layers of parts of the batch hold; the part that keeps most has the slots
        of all."""
        self.width = max(part.width for part in parts)
        for name, dim in BATCH.items():
            tensors = [getattr(part, name) for part in parts]
            if tensors[0] is None:
                continue
            if name in ("keys", "values", "held"):
                fill, most = EMPTY if name == "held" else 0, max(x.shape[2] for x in tensors)
                tensors = [x if x.shape[2] == most else with_room(x, most, fill) for x in tensors]
            setattr(self, name, torch.cat(tensors, dim))

    def hold_kept(
        self,
        engine: Engine,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        step: Step,
        select_by: Tensor | None,
        room: int,
    ) -> None:
        """Store what an engine keeps of the prompt. Rows of equal length are handled together: an
        observation window ends with its own row. All have as many slots as the head that keeps
        most; where one token leaves at every step, one more and no room."""
        method = engine.method
        steps = method.phase == "step"
        states = {"keys": k, "values": v, "select_by": select_by if steps else None}
        parts: list[tuple[Any, dict[str, Tensor]]] = []
        groups: dict[int, Any] = {k.shape[2]: slice(None)}
        for length, rows in (groups if step.lengths is None else step.rows_of_length).items():
            own_engine = engine if step.lengths is None else engine.for_rows(rows)
            own = {n: x[rows][:, :, :length] for n, x in states.items() if x is not None}
            by = own["keys"] if select_by is None else select_by[rows][:, :, :length]
            held, mass = own_engine.keep(q[rows][:, :, -length:], by, own["values"], layer)
            where = held.clamp(max=length - 1)
            own["keys"], own["values"] = gather_tokens(own["keys"], own["values"], where)
            if "select_by" in own:
                own["select_by"], _ = gather_tokens(by, by, where)
            parts.append((rows, own | {"held": held} | ({"mass": mass} if steps else {})))
        most = max(part["held"].shape[2] for _, part in parts)
        self.width = method.k(layer, engine.layers) + 1 if steps else most
        slots = self.width + (0 if steps else room)
        engine.usage.slots.append(self.width)
        for name, like in parts[0][1].items():
            whole = like.new_full((len(k), k.shape[1], slots, *like.shape[3:]), 0)
            if name == "held":
                whole.fill_(EMPTY)
            for rows, part in parts:
                whole[rows, :, : part[name].shape[2]] = part[name]
            setattr(self, name, whole)
        if steps:
            assert self.held is not None
            self.free = (self.held == EMPTY).int().argmax(-1)

    def attend_in_steps(
        self,
        engine: Engine,
        layer: int,
        q: Tensor,
        states: dict[str, Tensor | None],
        positions: Tensor,
    ) -> Tensor:
        """Attention of one new token after the other, each in the slot that the last one freed;
        states: the new tokens' by name."""
        out = []
        assert self.free is not None and self.held is not None and self.mass is not None
        for i in range(q.shape[2]):
            now = slice(i, i + 1)
            query, position, slot = q[:, :, now], positions[:, now], self.free[..., None]
            for name, new in states.items():
                if (stored := getattr(self, name)) is not None and new is not None:
                    append(stored, slot, new[:, :, now])
            append(self.held, slot, position[:, None])
            by = self.keys if self.select_by is None else self.select_by
            assert self.keys is not None and self.values is not None and by is not None
            kept = (self.keys, self.values, position, None, layer, self.held)
            out.append(engine.decode(query, *kept))
            mass, free = engine.evict(query, by, self.held, self.mass, position, layer)
            self.mass.copy_(mass)
            self.free.copy_(free)
        return torch.cat(out, dim=2)


def last_queries(q: Tensor, lengths: Tensor | None, count: int) -> Tensor:
    """The last `count` queries of each row, (B, H, count, D) of q (B, H, T, D); where a row has
    fewer, its first one stands in for those that are missing. lengths as in `Step`."""
    length = q.shape[2]
    count = min(count, length)
    if lengths is None:
        return q[:, :, max(0, length - count) :]
    last = lengths[:, None] - count + torch.arange(count, device=q.device)
    index = last.clamp(min=0)[:, None, :, None]
    return q.gather(2, index.expand(-1, q.shape[1], -1, q.shape[3]))


def with_room(states: Tensor, slots: int, fill: int = 0) -> Tensor:
    """A copy of states (B, K, T, ...) in a tensor of `slots` slots."""
    room = (*states.shape[:2], slots - states.shape[2], *states.shape[3:])
    return torch.cat((states, states.new_full(room, fill)), dim=2)


def append(stored: Tensor, slots: Tensor, new: Tensor, needed: int = 0, fill: int = 0) -> Tensor:
    """`stored` (B, K, T, ...) with `new` (B, K or 1, Q, ...) in the slots (B, K or 1, Q)."""
    if needed > stored.shape[2]:
        stored = with_room(stored, needed + ROOM, fill)
    shape = (*stored.shape[:2], *new.shape[2:])
    index = slots if new.dim() == 3 else slots[..., None]
    return stored.scatter_(2, index.expand(shape), new.expand(shape))
