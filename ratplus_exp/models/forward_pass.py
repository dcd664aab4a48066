"""One forward pass: the interface between the attention layers of any model, cache and engine.

`open` turns left padding into right padding and `close` restores it, so that in between each row
starts at its first token: the memory starts from zero, block 0 is the row's first block, and a
batch gives the same answers as its rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ratplus_exp.memory import Gate, Memory
from ratplus_exp.methods import Engine, States, Step
from ratplus_exp.models.cache import SparseCache
from ratplus_kernels.dispatch import use_triton


@dataclass
class ForwardPass:
    """A pass's cache (or its engine alone) and positions; pads: (B,) left pads, or None."""

    step: Step
    engine: Engine
    cache: SparseCache | None
    pads: Tensor | None

    @classmethod
    def open(
        cls,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        cache: SparseCache | None,
        use_cache: bool | None,
        engine: Engine | None,
    ) -> tuple[Tensor, ForwardPass]:
        """The ids (B, T), with each row's first token first, and the pass over them.

        attention_mask (B, tokens so far) may be zero at the left of a prompt. `engine`: for a pass
        without a cache, or for a new cache.
        """
        if cache is not None and not isinstance(cache, SparseCache):
            raise TypeError(
                f"this model decodes with a SparseCache, not {type(cache).__name__}; pass "
                "past_key_values=SparseCache(num_layers, engine) or leave it out"
            )
        if use_cache is None:
            use_cache = model.config.use_cache and not model.training
        if cache is None and use_cache:
            cache = SparseCache(model.config.num_hidden_layers, engine)
        length = input_ids.shape[1]
        pads = _left_padding(attention_mask, length) if cache is None or cache.is_empty else None
        index = torch.arange(length, device=input_ids.device)
        lengths = None
        if pads is not None:
            input_ids = input_ids.gather(1, (index + pads[:, None]) % length)
            lengths = length - pads
        start = 0 if cache is None or cache.processed is None else cache.processed[:, None]
        step = Step((start + index).view(-1, length), lengths)
        return input_ids, cls(step, engine or Engine(), cache, pads)

    @property
    def length(self) -> int:
        """Tokens of the longest row after this pass, plus the room for an answer at a prompt, since
        replayed steps check nothing."""
        length, cache = self.step.positions.shape[1], self.cache
        if cache is None:
            return length
        return length + ((cache.room or 0) if cache.is_empty else cache.seen)

    def memorise(
        self, memory: Memory, layer: int, x: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """k̃, ṽ (B, T, K, D) and None, from the layer's last state in the cache; k, v and k̃ as the
        keys to select by if the memory only selects. x (B, T, C), k before RoPE, v (B, T, K, D)."""
        state = self.cache.layers[layer].memory_state if self.cache is not None else None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not memory.selects):
            new_k, new_v, state = memory(x, k, v, state, self.step.lengths)
        if self.cache is not None:
            self.cache.layers[layer].remember(state)
        return (k, v, new_k) if memory.selects else (new_k, new_v, None)

    def keys_and_values(
        self,
        memory: Memory | None,
        layer: int,
        x: Tensor,
        k: Tensor,
        v: Tensor,
        rope: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`memorise`, with RoPE on the keys; k and v without a memory; rope as in `rotate`."""
        cache = self.cache
        if (
            cache is not None
            and isinstance(memory, Gate)
            and self._takes_one_pass(memory, layer, k, v)
        ):
            method, store = cache.engine.of(layer).method, cache.layers[layer]
            k, v, state, blocks = memory.prefill(
                x, k, v, rope, method.block_size, self.step.lengths
            )
            store.remember(state)
            store.representatives = method.represent_blocks(blocks)
            return k, v, None
        select_by = None
        if memory is not None:
            k, v, select_by = self.memorise(memory, layer, x, k, v)
        return rotate(k, rope), v, None if select_by is None else rotate(select_by, rope)

    def _takes_one_pass(self, memory: Gate, layer: int, k: Tensor, v: Tensor) -> bool:
        """Whether one kernel computes the memory, RoPE and blocks of this prompt."""
        if self.cache is None or not self.cache.is_empty or torch.is_grad_enabled():
            return False
        method = self.cache.engine.of(layer).method
        blocks = method.unit == "block" and method.block_size & (method.block_size - 1) == 0
        return memory.in_one_pass and blocks and use_triton(k, v)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, by: Tensor | None) -> Tensor:
        """Attention of the pass's tokens: q (B, H, T, D), k and v (B, K, T, D) -> (B, H, T, D);
        by (B, K, T, D): the keys that methods select by (None: k)."""
        states = States(layer, q, k, v, self.step, by)
        if self.cache is None:
            return self.engine.of(layer).prefill(states)
        return self.cache.attend(states)

    def close(self, x: Tensor) -> Tensor:
        """Count the tokens in the cache, and restore the padding of x (B, T, ·)."""
        if self.cache is not None:
            self.cache.advance(self.step, len(x))
        if self.pads is None:
            return x
        length = x.shape[1]
        index = torch.arange(length, device=x.device)
        return x.gather(1, ((index - self.pads[:, None]) % length)[..., None].expand_as(x))


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE of x (B, T, ·, D) by cosines and sines (B or 1, T, 1, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * rope[0] + torch.cat((-second, first), dim=-1) * rope[1]


def _left_padding(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """How many pads each row starts with, (B,); None without any."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    pads = (attention_mask == 0).sum(1)
    left = torch.arange(length, device=pads.device) < pads[:, None]
    if not torch.equal(attention_mask == 0, left):
        raise ValueError("padding must be on the left: set tokenizer.padding_side = 'left'")
    return pads
