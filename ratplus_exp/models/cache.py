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
from torch import Tensor
from transformers.cache_utils import Cache

from ratplus_exp.methods import Engine, States, Step, Usage
from ratplus_exp.methods.base import EVICTING
from ratplus_exp.models.cache_layer import ROOM, SparseLayer, last_queries, with_room


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
        self.engine.parts.clear()  # of another number of layers
        self.room = room
        self._empty()

    def reset(self) -> None:
        self.engine.usage = Usage()
        self.engine.parts.clear()
        self._empty()

    def _empty(self) -> None:
        self.layers = [SparseLayer() for _ in self.layers]
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

    def attend(self, index: int, states: States) -> Tensor:
        """Store the step's tokens of a layer and return their attention, (B, H, T, D)."""
        layer, engine = self.layers[index], self.engine.for_layer(index)
        method, positions = engine.method, states.step.positions
        if self.is_empty:
            out = engine.prefill(replace(states, representatives=layer.representatives), index)
            if method.phase in EVICTING:
                q = last_queries(states.q, states.step.lengths, method.observed)
                states = replace(states, q=q)
            self.store_prompt(index, states)
            return out
        assert layer.keys is not None and self.prompt is not None
        new = positions.shape[1]
        answered = self.seen - self.first + new
        if self.room is not None and answered > self.room:
            raise ValueError(f"the cache has room for {self.room} tokens after the prompt only")
        if method.phase == "step":
            return layer.attend_in_steps(engine, index, states)
        used = layer.width + answered if self.room is None else layer.keys.shape[2]
        slots = positions[:, None]
        if layer.held is not None:
            slots = layer.width + slots - self.prompt[:, None, None]
        states = layer.append(states, slots, used)
        layer.update_representatives(method, positions, used)
        states.representatives = layer.representatives
        states.all_seen = new == 1 and self.room is None and not (self.ragged or method.pooled)
        return engine.decode(states, index)

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

    def store_prompt(self, index: int, states: States) -> None:
        """Store keys, values and representatives after the prompt; states.q: at least the last
        `observed` queries."""
        layer, engine = self.layers[index], self.engine.for_layer(index)
        method = engine.method
        room = ROOM if self.room is None else self.room
        if method.phase in EVICTING:
            layer.keep(engine, index, states, room)
            return
        layer.width = states.k.shape[2]
        # Copies, since a prompt's keys and values may be views of far larger tensors.
        layer.keys, layer.values = (with_room(x, layer.width + room) for x in (states.k, states.v))
        lengths = states.step.lengths
        if lengths is None:
            lengths = torch.full((len(states.k),), layer.width, device=states.k.device)
        engine.usage.slots.append(lengths)
        if method.phase != "decode":
            layer.representatives = None
            return
        if layer.representatives is None and method.unit == "block":
            layer.representatives = engine.block_representatives(states.by)
        if states.select_by is not None:
            layer.select_by = with_room(states.select_by, layer.width + room)

    def for_rows(self, rows: Tensor) -> SparseCache:
        """An empty cache for some rows of the batch, for `join`."""
        assert self.is_empty
        part = copy(self)
        part._empty()
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
