"""One forward pass: the interface between the attention layers of any model, cache and engine."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

import ratplus_kernels
from ratplus_exp.memory import Gate, Memory
from ratplus_exp.methods import Engine, States, Step
from ratplus_exp.models.cache import SparseCache
from ratplus_kernels.dispatch import use_triton

Rope = tuple[Tensor, Tensor]  # cosines and sines, (B or 1, T, 1, D)


@dataclass
class ForwardPass:
    """A pass's positions, and its cache or, without one, its engine; the layers that attended."""

    step: Step
    engine: Engine
    cache: SparseCache | None
    attended: set[int] = field(default_factory=set)

    @property
    def length(self) -> int:
        """Tokens of the longest row after this pass, plus the room for an answer at a prompt, since
        replayed steps have no checks."""
        length, cache = self.step.positions.shape[1], self.cache
        if cache is None:
            return length
        return length + ((cache.room or 0) if cache.is_empty else cache.seen)

    def apply_memory(
        self, memory: Memory | None, layer: int, x: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values (B, T, K, D), and the keys to select by (None: the keys).

        With a memory these are k̃ and ṽ, computed from the layer's last state in the cache; if the
        memory only selects, they are k and v, and k̃ to select by. x (B, T, C), k before RoPE and v
        (B, T, K, D).
        """
        if memory is None:
            return k, v, None
        state = self.cache.layers[layer].memory_state if self.cache is not None else None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not memory.selects):
            new_k, new_v, state = memory(x, k, v, state, self.step.lengths)
        if self.cache is not None:
            self.cache.layers[layer].remember(state)
        return (k, v, new_k) if memory.selects else (new_k, new_v, None)

    def apply_memory_and_rope(
        self, memory: Memory | None, layer: int, x: Tensor, k: Tensor, v: Tensor, rope: Rope
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`apply_memory`, with RoPE on the keys, as in `rotate`. For block methods one kernel
        computes both for a prompt, and the blocks' representatives."""
        cache = self.cache
        if (
            cache is not None
            and cache.is_empty
            and isinstance(memory, Gate)
            and (memory.memory_on, memory.shared_gate) == ("kv", True)
            and not torch.is_grad_enabled()
        ):
            method, store = cache.engine.for_layer(layer).method, cache.layers[layer]
            size = method.block_size
            if method.unit == "block" and size & (size - 1) == 0 and use_triton(k, v):
                z = memory.gate_logits(x, self.step.lengths)
                k, v, state, blocks = ratplus_kernels.memory_prefill(z, k, v, rope, size)
                store.remember(state)
                store.representatives = method.represent_blocks(blocks)
                return k, v, None
        k, v, by = self.apply_memory(memory, layer, x, k, v)
        return rotate(k, rope), v, None if by is None else rotate(by, rope)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, by: Tensor | None) -> Tensor:
        """Attention of the pass's tokens: q (B, H, T, D), k and v (B, K, T, D) -> (B, H, T, D);
        by (B, K, T, D): the keys that methods select by (None: k)."""
        states = States(q, k, v, self.step, by)
        if self.cache is None:
            return self.engine.for_layer(layer).prefill(states, layer)
        return self.cache.attend(layer, states)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """RoPE of x (B, T, ·, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * rope[0] + torch.cat((-second, first), dim=-1) * rope[1]
