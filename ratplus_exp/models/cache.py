"""The cache: keys and values, the memory's last state, block representatives.

Rows start at their first token. A token's slot is its position until a method evicts; RoPE and
block arithmetic always use the position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from ratplus_exp.methods import Engine, Usage
from ratplus_exp.methods.base import EVICTING
from ratplus_exp.methods.selection import EMPTY
from ratplus_exp.models.layer import ROOM, SparseLayer, Step, append, last_queries, with_room


class SparseCache(Cache):
    """Cache of a RAT+ or attention model that decodes with one engine (method and selector).

    room: how many tokens may follow the prompt. All steps then have the same shapes and storage, as
        CUDA graphs require; queries attend to all slots, unused ones masked. None: the cache grows,
        and a step attends to the used slots, which is cheaper.
    """

    layers: list[SparseLayer]

    def __init__(
        self, num_layers: int, engine: Engine | None = None, room: int | None = None
    ) -> None:
        super().__init__(layers=[SparseLayer() for _ in range(num_layers)])
        self.engine = engine or Engine()
        self.engine.layers = num_layers
        self.room = room
        self.processed: Tensor | None = None  # (B,) real tokens processed
        self.prompt: Tensor | None = None  # (B,) those of the prompt
        # Counted on the host, to avoid waiting for the device:
        self.seen = 0  # tokens processed, padding included, as `generate` needs them
        self.first = 0  # those of the prompt
        self.ragged = False  # whether rows may differ in length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    @property
    def is_empty(self) -> bool:
        return self.processed is None

    def update(
        self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by stock attention layers; `attend` stores the states, since that depends on the
        query."""
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
        """Store the step's tokens and return their attention, (B, H, T, D)."""
        store, engine = self.layers[layer], self.engine.of(layer)
        if self.is_empty:
            out = engine.prefill(q, k, v, step.lengths, layer, store.representatives, select_by)
            if engine.method.phase in EVICTING:
                q = last_queries(q, step.lengths, engine.method.observed)
            self.store_prompt(layer, q, k, v, step, select_by)
            return out
        assert store.keys is not None and self.prompt is not None
        new_states = {"keys": k, "values": v, "select_by": select_by}
        new, slots = q.shape[2], step.positions[:, None]
        answered = self.seen - self.first + new
        if self.room is not None and answered > self.room:
            raise ValueError(f"the cache has room for {self.room} tokens after the prompt only")
        if engine.method.phase == "step":
            return store.attend_in_steps(engine, layer, q, new_states, step.positions)
        used = store.width + answered if self.room is None else store.keys.shape[2]
        if store.held is not None:
            slots = store.width + slots - self.prompt[:, None, None]
            store.held = append(store.held, slots, step.positions[:, None], used, EMPTY)
        for name, states in new_states.items():
            stored = getattr(store, name)
            if stored is not None and states is not None:
                setattr(store, name, append(stored, slots, states, used))
        self._update_representatives(engine, store, step.positions, used)
        keys, values, select_by, held = (
            None if x is None else x[:, :, :used]
            for x in (store.keys, store.values, store.select_by, store.held)
        )
        assert keys is not None and values is not None
        return engine.decode(
            q,
            keys,
            values,
            step.positions,
            store.representatives,
            layer,
            held,
            select_by,
            all_seen=new == 1 and self.room is None and not (self.ragged or engine.method.pooled),
        )

    def advance(self, step: Step, batch: int) -> None:
        """Count the step's tokens after all layers have stored them."""
        length, new = step.positions.shape[1], step.lengths
        if new is None:
            new = torch.full((batch,), length, device=step.positions.device)
        self.seen += length
        if self.processed is None:
            self.processed, self.prompt = new.clone(), new.clone()
            self.first, self.ragged = length, step.lengths is not None
        else:
            self.processed += new

    def store_prompt(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: Step, select_by: Tensor | None
    ) -> None:
        """Store keys, values and representatives after the prompt; q: at least the last `observed`
        queries."""
        store, engine = self.layers[layer], self.engine.of(layer)
        method = engine.method
        room = ROOM if self.room is None else self.room
        if method.phase in EVICTING:
            store.hold_kept(engine, layer, q, k, v, step, select_by, room)
            return
        store.hold(k, v, room)
        whole = torch.full((len(k),), store.width, device=k.device)
        engine.usage.slots.append(whole if step.lengths is None else step.lengths)
        if method.phase != "decode":
            store.representatives = None
            return
        if store.representatives is None and method.unit == "block":
            by = k if select_by is None else select_by
            store.representatives = engine.block_representatives(by)
        if select_by is not None:
            store.select_by = with_room(select_by, select_by.shape[2] + room)

    def _update_representatives(
        self, engine: Engine, store: SparseLayer, positions: Tensor, used: int
    ) -> None:
        """Recompute the representatives of the new tokens' blocks; slots are positions."""
        if store.representatives is None:
            return
        size = engine.method.block_size
        keys = store.keys if store.select_by is None else store.select_by
        old = store.representatives
        assert keys is not None
        if missing := max(0, -(-used // size) - old.shape[2]):
            old = F.pad(old, (0, 0, 0, missing))
        local = positions // size  # (B, Q)
        changed = torch.arange((positions.shape[1] + size - 2) // size + 1, device=keys.device)
        block = torch.minimum(local[:, :1] + changed, local[:, -1:])  # (B, blocks)
        # Missing tokens of a partial block may have any key: it is forced, so its score is unused.
        token = block[..., None] * size + torch.arange(size, device=keys.device)
        token = token.clamp(max=keys.shape[2] - 1).flatten(1)[:, None, :, None]
        tokens = keys.gather(2, token.expand(-1, keys.shape[1], -1, keys.shape[3]))
        new = engine.method.represent(tokens.unflatten(2, (-1, size)))
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
        """Concatenate the caches of parts of the batch, whose padded prompts are equally long."""
        assert self.is_empty and len({part.seen for part in parts}) == 1
        for store, *layers in zip(self.layers, *(part.layers for part in parts), strict=True):
            store.join(layers)
        self.engine.usage.join([part.engine.usage for part in parts])
        self.seen, self.first = parts[0].seen, parts[0].first
        self.ragged = any(part.ragged for part in parts)
        self.processed, self.prompt = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("processed", "prompt")
        )

    # transformers' interface of a cache

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
            "a SparseCache cannot be cropped, since it has no earlier memory states or evicted "
            "tokens: run the shorter prompt again"
        )
