"""The state that decoding carries: keys and values, the memory's last state, block representatives.

Rows are aligned at their first token. A row's new token goes to slot `stored` of that row, which is
also its position until a method evicts; RoPE and block arithmetic always use the position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ratplus_exp.methods import Engine, Usage

ROOM = 64  # slots allocated ahead of need
# A layer's tensors, and the dimension of each that is the batch.
BATCH = {"keys": 0, "values": 0, "select_by": 0, "representatives": 0, "memory_state": 1}


class SparseLayer(DynamicLayer):
    """One layer's share: keys and values (B, K, slots, D), memory state (·, B, ..., K, D) in fp32,
    and, for methods that select while decoding, block representatives (B, K, N, *) and the keys
    to select by (B, K, slots, D) where they are others than those to attend to."""

    is_croppable = False  # see SparseCache.crop

    def __init__(self) -> None:
        super().__init__()
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.select_by: Tensor | None = None
        self.memory_state: Tensor | None = None
        self.representatives: Tensor | None = None

    def hold(self, keys: Tensor, values: Tensor, room: int) -> None:
        """Store the prompt's with room for `room` tokens more, in storage of their own: they may be
        views of far larger tensors."""
        self.keys, self.values = (_with_room(x, x.shape[2] + room) for x in (keys, values))

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
        """Hold what the layers of parts of the batch hold."""
        for name, dim in BATCH.items():
            tensors = [getattr(part, name) for part in parts]
            if tensors[0] is not None:
                setattr(self, name, torch.cat(tensors, dim))


def last_queries(q: Tensor, lengths: Tensor | None, count: int) -> Tensor:
    """The last `count` queries of each row, at most T, (B, H, count, D) of q (B, H, T, D); where a
    row has fewer, its first one stands in for those that are missing. lengths as in `Step`."""
    length = q.shape[2]
    count = min(count, length)
    if lengths is None:
        return q[:, :, length - count :]
    last = lengths[:, None] - count + torch.arange(count, device=q.device)
    index = last.clamp(min=0)[:, None, :, None]
    return q.gather(2, index.expand(-1, q.shape[1], -1, q.shape[3]))


def _with_room(states: Tensor, slots: int) -> Tensor:
    """A copy of states (B, K, T, D) in a tensor of `slots` slots."""
    room = slots - states.shape[2]
    return torch.cat((states, states.new_zeros(*states.shape[:2], room, states.shape[3])), dim=2)


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
        self.room = room
        self.seen = 0  # tokens processed, padding included: what `generate` slices by
        self.processed: Tensor | None = None  # (B,) real tokens processed
        self.stored: Tensor | None = None  # (B,) slots in use
        # What the device would have to be asked for, and waited for, is counted along here.
        self.longest = 0  # slots in use in the longest row (its rows may have left the batch)
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
            if engine.method.phase == "once":
                q = last_queries(q, step.lengths, engine.method.forced)
            self.store_prompt(layer, q, k, v, step, select_by)
            return out
        assert self.processed is not None and self.stored is not None
        new = q.shape[2]
        assert store.keys is not None and store.values is not None
        used = self.longest + new
        if self.room is not None:
            capacity = store.keys.shape[2]
            if used > capacity:
                raise ValueError(f"the cache has room for {self.room} tokens after the prompt only")
            used = capacity
        slots = self.stored[:, None] + torch.arange(new, device=q.device)
        new_states = {"keys": k, "values": v, "select_by": select_by}
        self._append(store, new_states, slots, used)
        self._update_representatives(store, step.positions, used)
        return engine.decode(
            q,
            store.keys[:, :, :used],
            store.values[:, :, :used],
            slots,
            step.positions,
            store.representatives,
            layer,
            all_seen=new == 1 and not self.ragged and self.room is None,
        )

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
        if self.processed is None or self.stored is None:
            self.processed, self.stored = new.clone(), new.clone()
            self.longest, self.ragged = length, step.lengths is not None
            if self.engine.method.phase == "once":
                self.stored = self.stored.clamp(max=self.engine.method.top_k)
                self.longest = min(self.longest, self.engine.method.top_k)
        else:
            self.longest += length
            self.processed += new
            self.stored += new

    def store_prompt(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: Step, select_by: Tensor | None
    ) -> None:
        """Store what stays after the prompt: keys, values, representatives.

        q (B, H, at least the last `forced`, D). Rows of equal length are handled together: an
        observation window ends with its own row.
        """
        store, method = self.layers[layer], self.engine.method
        room = ROOM if self.room is None else self.room
        if method.phase != "decode":
            store.representatives = None
        elif store.representatives is None:
            by = k if select_by is None else select_by
            store.representatives = self.engine.block_representatives(by)
        if select_by is not None and method.phase == "decode":
            store.select_by = _with_room(select_by, select_by.shape[2] + room)
        if method.phase != "once" or step.lengths is None:
            store.hold(*(self.engine.keep(q, k, v, layer, select_by) or (k, v)), room)
            return
        store.hold(k[:, :, : method.top_k], v[:, :, : method.top_k], room)
        assert store.keys is not None and store.values is not None
        for length, rows in step.rows_of_length.items():
            q_rows = q[rows][:, :, -length:]
            k_rows, v_rows = (x[rows][:, :, :length] for x in (k, v))
            by_rows = None if select_by is None else select_by[rows][:, :, :length]
            kept = self.engine.for_rows(rows).keep(q_rows, k_rows, v_rows, layer, by_rows)
            if kept is not None:
                store.keys[rows, :, : method.top_k], store.values[rows, :, : method.top_k] = kept

    def _append(
        self, store: SparseLayer, states: dict[str, Tensor | None], slots: Tensor, needed: int
    ) -> None:
        for name, new in states.items():
            tensor = getattr(store, name)
            if tensor is None or new is None:
                continue
            if needed > tensor.shape[2]:
                tensor = _with_room(tensor, needed + ROOM)
            index = slots[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
            setattr(store, name, tensor.scatter_(2, index, new))

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

    def for_rows(self, rows: Tensor) -> SparseCache:
        """An empty cache for some rows of the batch, for `join`."""
        assert self.is_empty
        part = copy(self)
        part.reset()
        part.engine = replace(self.engine.for_rows(rows), usage=Usage())
        return part

    def join(self, parts: Sequence[SparseCache]) -> None:
        """Hold what the caches of parts of the batch hold: prompts of one padded length."""
        assert self.is_empty and len({part.seen for part in parts}) == 1
        for store, *those in zip(self.layers, *(part.layers for part in parts), strict=True):
            store.join(those)
        self.engine.usage.join([part.engine.usage for part in parts])
        self.seen, self.longest = parts[0].seen, parts[0].longest
        self.ragged = any(part.ragged for part in parts)
        self.processed, self.stored = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("processed", "stored")
        )

    # What generate, beam search and the like ask of a cache.

    def reset(self) -> None:
        self.layers = [SparseLayer() for _ in self.layers]
        self.seen, self.processed, self.stored = 0, None, None
        self.longest, self.ragged = 0, False

    def _map_batch(self, function: Callable[[Tensor, int], Tensor]) -> None:
        for layer in self.layers:
            layer.map_batch(function)
        if self.processed is not None and self.stored is not None:
            self.processed, self.stored = function(self.processed, 0), function(self.stored, 0)

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
