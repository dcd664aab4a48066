"""One layer of the cache, and the positions of a forward pass."""

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

ROOM = 64  # spare slots of each allocation
# A layer's tensors and their batch dimensions
BATCH = dict.fromkeys(("keys", "values", "select_by", "representatives", "held", "mass", "free"), 0)
BATCH |= {"memory_state": 1}


@dataclass
class Step:
    """Positions of the tokens of one forward pass, (B or 1, T), from 0 at each row's first token.

    lengths: (B,) real tokens a row; None if all T are real, as after the prompt.
    """

    positions: Tensor
    lengths: Tensor | None = None

    @cached_property
    def rows_of_length(self) -> dict[int, Tensor]:
        """The rows of each length; cached, since reading lengths synchronises with the device."""
        assert self.lengths is not None
        rows: dict[int, list[int]] = {}
        for row, length in enumerate(self.lengths.tolist()):
            rows.setdefault(length, []).append(row)
        device = self.lengths.device
        return {length: torch.tensor(row, device=device) for length, row in rows.items()}


class SparseLayer(DynamicLayer):
    """One layer: keys and values (B, K, slots, D), memory state (·, B, ..., K, D) in fp32, and in
    phase "decode" block representatives (B, K, N, *) and, if they differ from the keys, the keys to
    select by (B, K, slots, D).

    width: slots in use after the prompt in the longest row.
    held: (B, K, slots), the token in each slot, for methods that evict. In phase "step": mass
        (B, K, slots), the tokens' scores, and free (B, K), the next token's slot.
    """

    is_croppable = False  # see SparseCache.crop
    width: int = 0
    keys: Tensor | None = None
    values: Tensor | None = None
    select_by: Tensor | None = None
    memory_state: Tensor | None = None
    representatives: Tensor | None = None
    held: Tensor | None = None
    mass: Tensor | None = None
    free: Tensor | None = None

    def hold(self, keys: Tensor, values: Tensor, room: int) -> None:
        """Copy the prompt's, which may be views of far larger tensors, with `room` more slots."""
        self.width = keys.shape[2]
        self.keys, self.values = (with_room(x, x.shape[2] + room) for x in (keys, values))

    def remember(self, state: Tensor) -> None:
        """Store the memory's state, in place if there was one."""
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
        """Concatenate the layers of parts of the batch, with the slots of the largest."""
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
        """Store what an engine keeps of the prompt, together for rows of equal length, since an
        observation window ends with its row. All heads have as many slots as the largest; in phase
        "step" one more and no room."""
        method = engine.method
        steps = method.phase == "step"
        states = {"keys": k, "values": v, "select_by": select_by if steps else None}
        parts: list[tuple[Any, dict[str, Tensor]]] = []
        groups: dict[int, Any] = {k.shape[2]: slice(None)}
        for length, rows in (groups if step.lengths is None else step.rows_of_length).items():
            part_engine = engine if step.lengths is None else engine.for_rows(rows)
            part = {n: x[rows][:, :, :length] for n, x in states.items() if x is not None}
            by = part["keys"] if select_by is None else select_by[rows][:, :, :length]
            held, mass = part_engine.keep(q[rows][:, :, -length:], by, part["values"], layer)
            index = held.clamp(max=length - 1)
            part["keys"], part["values"] = gather_tokens(part["keys"], part["values"], index)
            if "select_by" in part:
                part["select_by"], _ = gather_tokens(by, by, index)
            parts.append((rows, part | {"held": held} | ({"mass": mass} if steps else {})))
        most = max(part["held"].shape[2] for _, part in parts)
        self.width = method.k(layer, engine.layers) + 1 if steps else most
        slots = self.width + (0 if steps else room)
        needed = torch.full((len(k),), self.width, device=k.device)
        if not steps:
            for rows, part in parts:
                needed[rows] = (part["held"] != EMPTY).sum(-1).amax(1)
        engine.usage.slots.append(needed)
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
        """Attention of the new tokens in order, each stored in the slot that the last one freed;
        states: keys, values and select_by of the new tokens."""
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
            out.append(
                engine.decode(query, self.keys, self.values, position, None, layer, self.held)
            )
            mass, free = engine.evict(query, by, self.held, self.mass, position, layer)
            self.mass.copy_(mass)
            self.free.copy_(free)
        return torch.cat(out, dim=2)


def last_queries(q: Tensor, lengths: Tensor | None, count: int) -> Tensor:
    """The last `count` queries of each row, (B, H, count, D) of q (B, H, T, D); a row with fewer
    repeats its first one. lengths as in `Step`."""
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
