"""The state that decoding carries: keys and values, the memory's last state, block representatives.

Rows are aligned at their first token. A token's slot is its position until a method evicts; RoPE
and block arithmetic always use the position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ratplus_exp.methods import Engine
from ratplus_exp.methods.base import EVICTING
from ratplus_exp.methods.engine import EMPTY
from ratplus_kernels import gather_tokens

ROOM = 64  # slots allocated ahead of need


class SparseLayer(DynamicLayer):
    """One layer's share: keys and values (B, K, slots, D), memory state (·, B, ..., K, D) in fp32,
    and, for methods that select while decoding, block representatives (B, K, N, *) and the keys
    to select by (B, K, slots, D) where they are others than those to attend to.

    width: slots in use after the prompt in the longest row.
    held: (B, K, slots), which token is in each slot, where a method evicts. Where it does so at
        every step: mass (B, K, slots), the tokens' scores, and free (B, K), the next token's slot.
    """

    STATES = ("keys", "values", "select_by", "representatives", "held", "mass", "free")

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
        self.keys, self.values = (_with_room(x, x.shape[2] + room) for x in (keys, values))

    def remember(self, state: Tensor) -> None:
        """Store the memory's state, a later one in the place of the one before."""
        if self.memory_state is None or torch.is_grad_enabled():
            self.memory_state = state
        else:
            self.memory_state.copy_(state)

    def map_batch(self, function: Callable[[Tensor, int], Tensor]) -> None:
        """Replace every tensor by function(tensor, its batch dimension)."""
        for name in self.STATES:
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, function(tensor, 0))
        if self.memory_state is not None:
            self.memory_state = function(self.memory_state, 1)


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


def _with_room(states: Tensor, slots: int, fill: int = 0) -> Tensor:
    """A copy of states (B, K, T, ...) in a tensor of `slots` slots."""
    room = (*states.shape[:2], slots - states.shape[2], *states.shape[3:])
    return torch.cat((states, states.new_full(room, fill)), dim=2)


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


class SparseCache(Cache):
    """Cache of a RAT+ or attention model that decodes with one engine (method and selector).

    room: how many tokens may follow the prompt. Then every step of as many tokens has the same
        shapes and works in the same memory, as a CUDA graph of it must; queries attend to all
        slots, with a mask over those not in use. None: as many as come, each step over the slots in
        use, which is cheaper.
    """

    layers: list[SparseLayer]

    def __init__(
        self, num_layers: int, engine: Engine | None = None, room: int | None = None
    ) -> None:
        super().__init__(layers=[SparseLayer() for _ in range(num_layers)])
        self.engine = engine or Engine()
        self.engine.layers = num_layers
        self.room = room
        self.seen = 0  # tokens processed, padding included: what `generate` slices by
        self.processed: Tensor | None = None  # (B,) real tokens processed
        self.prompt: Tensor | None = None  # (B,) those of the prompt
        # What the device would have to be asked for, and waited for, is counted along here.
        self.first = 0  # of `seen`, those of the prompt
        self.ragged = False  # whether rows may differ in length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    @property
    def is_empty(self) -> bool:
        return self.processed is None

    def update(
        self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stock attention layers call this; what is stored depends on the query, so `attend` does
        it."""
        return k, v

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        step: Step,
        select_by: Tensor | None = None,
    ) -> Tensor:
        """Attention of the step's tokens, which are stored on the way: (B, H, T, D)."""
        store, engine = self.layers[layer], self.engine
        if self.is_empty:
            out = engine.prefill(q, k, v, step.lengths, layer, store.representatives, select_by)
            if engine.method.phase in EVICTING:
                q = last_queries(q, step.lengths, engine.method.observed)
            self.store_prompt(layer, q, k, v, step, select_by)
            return out
        assert store.keys is not None and self.prompt is not None
        new_states = {"keys": k, "values": v, "select_by": select_by}
        if engine.method.phase == "step":
            return self._attend_in_steps(store, layer, q, new_states, step.positions)
        new, slots = q.shape[2], step.positions[:, None]
        used = store.width + self.seen - self.first + new
        if self.room is not None:
            capacity = store.keys.shape[2]
            if used > capacity:
                raise ValueError(f"the cache has room for {self.room} tokens after the prompt only")
            used = capacity
        if store.held is not None:
            slots = store.width + slots - self.prompt[:, None, None]
            store.held = self._append(store.held, slots, step.positions[:, None], used, EMPTY)
        for name, states in new_states.items():
            stored = getattr(store, name)
            if stored is not None and states is not None:
                setattr(store, name, self._append(stored, slots, states, used))
        self._update_representatives(store, step.positions, used)
        keys, values, select_by, held = (
            None if x is None else x[:, :, :used]
            for x in (store.keys, store.values, store.select_by, store.held)
        )
        return engine.decode(
            q,
            keys,
            values,
            step.positions,
            store.representatives,
            layer,
            held,
            select_by,
            all_seen=new == 1
            and self.room is None
            and not (self.ragged or engine.method.pooled),
        )

    def _attend_in_steps(
        self,
        store: SparseLayer,
        layer: int,
        q: Tensor,
        states: dict[str, Tensor | None],
        positions: Tensor,
    ) -> Tensor:
        """Attention of one new token after the other, each in the slot that the last one freed."""
        out = []
        assert store.free is not None and store.held is not None and store.mass is not None
        for i in range(q.shape[2]):
            query, position, slot = q[:, :, i : i + 1], positions[:, i : i + 1], store.free[..., None]
            for name, new in states.items():
                if (stored := getattr(store, name)) is not None and new is not None:
                    self._append(stored, slot, new[:, :, i : i + 1])
            self._append(store.held, slot, position[:, None])
            by = store.keys if store.select_by is None else store.select_by
            assert store.keys is not None and store.values is not None and by is not None
            kept = (store.keys, store.values, position, None, layer, store.held)
            out.append(self.engine.decode(query, *kept))
            mass, free = self.engine.evict(query, by, store.held, store.mass, position, layer)
            store.mass.copy_(mass), store.free.copy_(free)
        return torch.cat(out, dim=2)

    def advance(self, step: Step, batch: int) -> None:
        """Count the step's tokens, once all layers have stored them."""
        length = step.positions.shape[1]
        device = step.positions.device
        new = (
            step.lengths
            if step.lengths is not None
            else torch.full((batch,), length, device=device)
        )
        self.seen += length
        if self.processed is None:
            self.processed, self.prompt = new.clone(), new.clone()
            self.first, self.ragged = length, step.lengths is not None
        else:
            self.processed += new

    def store_prompt(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: Step, select_by: Tensor | None
    ) -> None:
        """Store what stays after the prompt: keys, values, representatives.

        q (B, H, at least the last `observed`, D).
        """
        store, method = self.layers[layer], self.engine.method
        room = ROOM if self.room is None else self.room
        if method.phase in EVICTING:
            self._store_kept(layer, q, k, v, step, select_by, room)
            return
        store.hold(k, v, room)
        if method.phase != "decode":
            store.representatives = None
            return
        if store.representatives is None and method.unit == "block":
            by = k if select_by is None else select_by
            store.representatives = self.engine.block_representatives(by)
        if select_by is not None:
            store.select_by = _with_room(select_by, select_by.shape[2] + room)

    def _store_kept(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        step: Step,
        select_by: Tensor | None,
        room: int,
    ) -> None:
        """Rows of equal length are handled together: an observation window ends with its own row.
        All have as many slots as the head that keeps most."""
        store, steps = self.layers[layer], self.engine.method.phase == "step"
        states = {"keys": k, "values": v, "select_by": select_by if steps else None}
        parts: list[tuple[Any, dict[str, Tensor]]] = []
        groups: dict[int, Any] = {k.shape[2]: slice(None)}
        for length, rows in (groups if step.lengths is None else step.rows_of_length).items():
            engine = self.engine if step.lengths is None else self.engine.for_rows(rows)
            own = {n: x[rows][:, :, :length] for n, x in states.items() if x is not None}
            by = own["keys"] if select_by is None else select_by[rows][:, :, :length]
            held, mass = engine.keep(q[rows][:, :, -length:], by, own["values"], layer)
            where = held.clamp(max=length - 1)
            own["keys"], own["values"] = gather_tokens(own["keys"], own["values"], where)
            if "select_by" in own:
                own["select_by"], _ = gather_tokens(by, by, where)
            parts.append((rows, own | {"held": held} | ({"mass": mass} if steps else {})))
        most = max(part["held"].shape[2] for _, part in parts)
        method = self.engine.method
        store.width = method.k(layer, self.engine.layers) + 1 if steps else most
        slots = store.width + (0 if steps else room)
        for name, like in parts[0][1].items():
            whole = like.new_full((len(k), k.shape[1], slots, *like.shape[3:]), 0)
            if name == "held":
                whole.fill_(EMPTY)
            for rows, part in parts:
                whole[rows, :, : part[name].shape[2]] = part[name]
            setattr(store, name, whole)
        if steps:
            assert store.held is not None
            store.free = (store.held == EMPTY).int().argmax(-1)

    @staticmethod
    def _append(stored: Tensor, slots: Tensor, new: Tensor, needed: int = 0, fill: int = 0) -> Tensor:
        """`stored` (B, K, T, ...) with `new` (B, K or 1, Q, ...) in the slots (B, K or 1, Q)."""
        if needed > stored.shape[2]:
            stored = _with_room(stored, needed + ROOM, fill)
        shape = (*stored.shape[:2], *new.shape[2:])
        index = slots if new.dim() == 3 else slots[..., None]
        return stored.scatter_(2, index.expand(shape), new.expand(shape))

    def _update_representatives(self, store: SparseLayer, positions: Tensor, used: int) -> None:
        """Recompute the blocks that the new tokens fell into (no eviction: slot is position)."""
        if store.representatives is None:
            return
        size = self.engine.method.block_size
        keys = store.keys if store.select_by is None else store.select_by
        old = store.representatives
        assert keys is not None
        if missing := max(0, -(-used // size) - old.shape[2]):
            old = F.pad(old, (0, 0, 0, missing))
        own = positions // size  # (B, Q)
        touched = torch.arange((positions.shape[1] + size - 2) // size + 1, device=keys.device)
        block = torch.minimum(own[:, :1] + touched, own[:, -1:])  # (B, blocks)
        # A block that is not yet full in some row is that row's own: forced, so never scored.
        # What stands in for its missing tokens doesn't matter.
        token = block[..., None] * size + torch.arange(size, device=keys.device)
        token = token.clamp(max=keys.shape[2] - 1).flatten(1)[:, None, :, None]
        there = keys.gather(2, token.expand(-1, keys.shape[1], -1, keys.shape[3]))
        new = self.engine.method.represent(there.unflatten(2, (-1, size)))
        block = block[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
        store.representatives = old.scatter_(2, block, new)

    # What generate, beam search and the like ask of a cache.

    def reset(self) -> None:
        self.layers = [SparseLayer() for _ in self.layers]
        self.seen, self.processed, self.prompt = 0, None, None
        self.first, self.ragged = 0, False

    def _map_batch(self, function: Callable[[Tensor, int], Tensor]) -> None:
        for layer in self.layers:
            layer.map_batch(function)
        if self.processed is not None and self.prompt is not None:
            self.processed, self.prompt = function(self.processed, 0), function(self.prompt, 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_batch(lambda tensor, dim: tensor.index_select(dim, beam_idx.to(tensor.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_batch(lambda tensor, dim: tensor.repeat_interleave(repeats, dim))

    def crop(self, max_length: int) -> None:
        raise ValueError(
            "a SparseCache cannot be cropped: the memory's earlier states and evicted tokens are "
            "gone; run the shorter prompt again"
        )
