"""One prefill for many methods: the state after a batch of prompts, as a value.

Dense attention, Quest and SnapKV, with any budgets, selectors and seeds, share the same dense
prefill. It is computed once, and each of them continues from a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ratplus_exp.memory import gate_statistics
from ratplus_exp.methods import States, Step
from ratplus_exp.models.cache import SparseCache
from ratplus_exp.models.cache_layer import last_queries

PIECE = 4 << 20  # bytes of a layer's activations, up to which a CPU processes rows together


class Prefilled(SparseCache):
    """Keys, values, memory states and last queries of prompts after a dense prefill.

    window: how many of each prompt's last queries to keep, for SnapKV and its variants.
    room: how many tokens may follow at most.
    """

    def __init__(self, num_layers: int, window: int, room: int) -> None:
        super().__init__(num_layers, room=room)
        self.window = window

    @cached_property
    def step(self) -> Step:
        """The prompts' positions, after the prefill."""
        assert self.processed is not None
        positions = torch.arange(self.seen, device=self.processed.device)[None]
        return Step(positions, self.processed if self.ragged else None)

    def attend(self, index: int, states: States) -> Tensor:
        assert self.is_empty, "only a prompt is prefilled"
        layer = self.layers[index]
        layer.queries = last_queries(states.q, states.step.lengths, self.window).clone()
        layer.keys, layer.values = _compact(states.k), _compact(states.v)
        layer.select_by = None if states.select_by is None else _compact(states.select_by)
        return self.engine.prefill(states, index)

    def copy_to(self, cache: SparseCache) -> None:
        """Bring an empty cache into the state after these prompts."""
        assert cache.is_empty and cache.engine.method.dense_prefill and self.processed is not None
        for i, layer in enumerate(self.layers):
            q, k, v, by = layer.queries, layer.keys, layer.values, layer.select_by
            assert q is not None and k is not None and v is not None
            if layer.memory_state is not None:
                cache.layers[i].memory_state = layer.memory_state.clone()
            cache.store_prompt(i, States(q, k, v, self.step, by))
        cache.advance(self.step, len(self.processed))


@dataclass(eq=False)
class PromptBatch:
    """A batch of left-padded prompts for a model.

    model: a causal model with `new_cache`.
    ids, mask: (B, T).
    fed: how many of each prompt's last tokens run after the prefill, under the method: 0, the
        prefill gives an answer's first token (as in the papers' code); 1, a decoding step does; all
        of the question: prefill and selection see the context alone.
    shared: (window, room) of a `Prefilled` that dense prefills share; None: none is stored.
    """

    model: Any
    ids: Tensor
    mask: Tensor
    fed: int = 0
    shared: tuple[int, int] | None = None

    @cached_property
    def gates(self) -> dict[str, float]:
        """`gate_statistics` of these prompts."""
        return gate_statistics(self.model, self.ids, self.mask)

    @torch.inference_mode()
    def prefill(self, cache: SparseCache) -> Tensor:
        """Logits (B, 1, V) after the prompts without their `fed` last tokens, which fill the empty
        `cache`."""
        if self.shared is None or not cache.engine.method.dense_prefill:
            return self._run(cache)
        prefilled, logits = self._prefilled
        prefilled.copy_to(cache)
        return logits

    @cached_property
    def _prefilled(self) -> tuple[Prefilled, Tensor]:
        assert self.shared is not None
        window, room = self.shared
        cache = Prefilled(self.model.config.num_hidden_layers, window, room + self.fed)
        return cache, self._run(cache)

    def _run(self, cache: SparseCache) -> Tensor:
        length = self.ids.shape[1] - self.fed
        ids, mask = self.ids[:, :length], self.mask[:, :length]
        # On a CPU a few rows at a time, so that a layer's output stays in the core's caches.
        row = 4 * self.model.config.hidden_size * self.model.dtype.itemsize * length
        pieces = torch.arange(len(ids)).split(max(1, PIECE // max(1, row)))
        if ids.device.type != "cpu" or len(pieces) == 1:
            return self._forward(ids, mask, cache)
        parts = [cache.for_rows(rows) for rows in pieces]
        logits = [self._forward(ids[x], mask[x], y) for x, y in zip(pieces, parts, strict=True)]
        cache.join(parts)
        return torch.cat(logits)

    def _forward(self, ids: Tensor, mask: Tensor, cache: SparseCache) -> Tensor:
        return self.model(ids, mask, past_key_values=cache, logits_to_keep=1).logits


def _compact(states: Tensor) -> Tensor:
    """The states, copied if they are a view of a larger tensor."""
    return states if states.untyped_storage().nbytes() == states.nbytes else states.clone()
