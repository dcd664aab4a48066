"""One layer of the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ratplus_exp.methods import Engine, Method, States, Step
from ratplus_exp.methods.selection import EMPTY
from ratplus_kernels import gather_tokens

ROOM = 64  # spare slots of each allocation
# A layer's tensors and their batch dimensions
BATCH = dict.fromkeys(("keys", "values", "select_by", "representatives", "queries"), 0)
BATCH |= {"held": 0, "mass": 0, "free": 0, "memory_state": 1}
FREE = {"held": EMPTY}  # what free slots have, in the others 0


class SparseLayer(DynamicLayer):
    """One layer: keys and values (B, K, slots, D), memory state (·, B, ..., K, D) in fp32, and in
    phase "decode" block representatives (B, K, N, *) and, if they differ from the keys, the keys to
    select by (B, K, slots, D).

    width: slots in use after the prompt in the longest row.
    queries: (B, H, window, D), the prompt's last ones, see `Prefilled`.
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
    queries: Tensor | None = None
    held: Tensor | None = None
    mass: Tensor | None = None
    free: Tensor | None = None

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
                slots, free = max(x.shape[2] for x in tensors), FREE.get(name, 0)
                tensors = [x if x.shape[2] == slots else with_room(x, slots, free) for x in tensors]
            setattr(self, name, torch.cat(tensors, dim))

    def keep(self, engine: Engine, index: int, states: States, room: int) -> None:
        """Store what an engine keeps of the prompt, together for rows of equal length, since an
        observation window ends with its row. All heads have as many slots as the largest; in phase
        "step" one more and no room. states.q: at least the last `observed` queries."""
        method, step, longest = engine.method, states.step, states.k.shape[2]
        steps, ragged = method.phase == "step", step.lengths is not None
        groups: dict[int, Any] = step.rows_of_length if ragged else {longest: slice(None)}
        parts: list[tuple[Any, dict[str, Tensor]]] = []
        for length, rows in groups.items():
            k, v, by = (x[rows][:, :, :length] for x in (states.k, states.v, states.by))
            part_engine = engine.for_rows(rows) if ragged else engine
            held, mass = part_engine.keep(states.q[rows][:, :, -length:], by, v, index)
            tokens = held.clamp(max=length - 1)
            keys, values = gather_tokens(k, v, tokens)
            part = {"keys": keys, "values": values, "held": held}
            if steps:
                part["mass"] = mass
                if states.select_by is not None:
                    part["select_by"], _ = gather_tokens(by, by, tokens)
            parts.append((rows, part))
        if steps:
            self.width, room = method.k(index, engine.layers) + 1, 0
        else:
            self.width = max(part["held"].shape[2] for _, part in parts)
        for name, first in parts[0][1].items():
            shape = (len(states.k), first.shape[1], self.width + room, *first.shape[3:])
            batch = first.new_full(shape, FREE.get(name, 0))
            for rows, part in parts:
                batch[rows, :, : part[name].shape[2]] = part[name]
            setattr(self, name, batch)
        assert self.held is not None
        empty = self.held == EMPTY
        needed = (~empty).sum(-1).amax(1)
        engine.usage.slots.append(torch.full_like(needed, self.width) if steps else needed)
        if steps:
            self.free = empty.int().argmax(-1)

    def append(self, states: States, slots: Tensor, used: int) -> States:
        """Store new tokens in the slots (B, K or 1, Q). Returns the states to attend with: the keys
        and values of the first `used` slots."""
        new: dict[str, Any] = {"keys": states.k, "values": states.v}
        new |= {"select_by": states.select_by, "held": states.step.positions[:, None]}
        stored: dict[str, Any] = dict.fromkeys(new)
        for name, x in new.items():
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if used > tensor.shape[2]:
                tensor = with_room(tensor, used + ROOM, FREE.get(name, 0))
            index, shape = slots, (*tensor.shape[:2], *x.shape[2:])
            index = index if x.dim() == 3 else index[..., None]
            setattr(self, name, tensor.scatter_(2, index.expand(shape), x.expand(shape)))
            stored[name] = tensor[:, :, :used]
        return replace(states, k=stored.pop("keys"), v=stored.pop("values"), **stored)

    def attend_in_steps(self, engine: Engine, index: int, states: States) -> Tensor:
        """Attention of the new tokens in order, each stored in the slot that the last one freed."""
        out = []
        assert self.free is not None and self.held is not None and self.mass is not None
        positions, select_by = states.step.positions, states.select_by
        for i in range(positions.shape[1]):
            q, k, v = (x[:, :, i : i + 1] for x in (states.q, states.k, states.v))
            by = None if select_by is None else select_by[:, :, i : i + 1]
            token = States(q, k, v, Step(positions[:, i : i + 1]), by)
            stored = self.append(token, self.free[..., None], self.held.shape[2])
            out.append(engine.decode(stored, index))
            mass, free = engine.evict(stored, self.mass, index)
            self.mass.copy_(mass)
            self.free.copy_(free)
        return torch.cat(out, dim=2)

    def update_representatives(self, method: Method, positions: Tensor, used: int) -> None:
        """Recompute the representatives of the new tokens' blocks; slots are positions."""
        old, keys = self.representatives, self.keys if self.select_by is None else self.select_by
        if old is None:
            return
        assert keys is not None
        size = method.block_size
        if missing := max(0, -(-used // size) - old.shape[2]):
            old = F.pad(old, (0, 0, 0, missing))
        local = positions // size  # (B, Q)
        changed = torch.arange((positions.shape[1] + size - 2) // size + 1, device=keys.device)
        block = torch.minimum(local[:, :1] + changed, local[:, -1:])  # (B, blocks)
        # Missing tokens of a partial block may have any key: it is forced, so its score is unused.
        token = block[..., None] * size + torch.arange(size, device=keys.device)
        token = token.clamp(max=keys.shape[2] - 1).flatten(1)[:, None, :, None]
        tokens = keys.gather(2, token.expand(-1, keys.shape[1], -1, keys.shape[3]))
        new = method.represent(tokens.unflatten(2, (-1, size)))
        block = block[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
        self.representatives = old.scatter_(2, block, new)


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


def with_room(states: Tensor, slots: int, free: int = 0) -> Tensor:
    """A copy of states (B, K, T, ...) in a tensor of `slots` slots."""
    room = (*states.shape[:2], slots - states.shape[2], *states.shape[3:])
    return torch.cat((states, states.new_full(room, free)), dim=2)
