"""The interface of memories, which transform keys and values before attention."""

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Memory(nn.Module):
    """k̃ and ṽ from k and v.

    A leaf module, so that Hugging Face's initialisation reaches it and its parameters can have
    another learning rate, as in P1.

    Args:
        d_model: width of x.
        num_heads, head_dim: of the keys and values (under GQA, the KV heads).
        memory_on: "kv" as in the papers; for ablations "k" or "v" alone; "select": methods select
            by k̃, attention sees k and v.
        shared_gate: False for separate gates of K and V: K's are the first half of the rows.
    """

    learned: ClassVar[bool] = True
    state_size: int  # numbers in the state of one sequence

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        head_dim: int,
        memory_on: str = "kv",
        shared_gate: bool = True,
    ) -> None:
        super().__init__()
        self.selects = memory_on == "select"
        self.memory_on = "k" if self.selects else memory_on
        self.head_dim, self.shared_gate = head_dim, shared_gate

    def forward(
        self, x: Tensor, k: Tensor, v: Tensor, state: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """k̃, ṽ (B, T, heads, head_dim) and the final state (·, B, ..., heads, head_dim) in fp32.

        x is (B, T, d_model), k (before RoPE) and v as the result, state that of earlier
        tokens (None: the sequence starts), lengths (B,) real tokens per row (None: all T). The
        final state is that at each row's last real token.
        """
        raise NotImplementedError

    def initialize(self, std: float, bias: float | tuple[float, float]) -> None:
        """Initial parameters. std: of random weights, 0 if the memory is added to a trained model;
        bias: the config's gate_bias, for kinds with gates."""
        raise NotImplementedError

    def statistics(self, x: Tensor, real: Tensor) -> dict[str, Tensor]:
        """The effective "length" in tokens of each channel or head, and the mean "gate" if it has
        gates, over x (B, T, d_model) where real (B, T) is true."""
        raise NotImplementedError


@torch.no_grad()
def gate_statistics(
    model: Any,
    ids: Tensor,
    attention_mask: Tensor | None = None,
    forward: Callable[[Tensor], Any] | None = None,
) -> dict[str, float]:
    """Mean gate and effective memory length (tokens; mean and median over channels) on ids (B, T).

    Arguments as in `of_each_memory`. Kinds without gates have lengths alone, a model without the
    memory nothing.
    """
    layers = of_each_memory(
        model, lambda memory, *args: memory.statistics(*args), ids, attention_mask, forward
    )
    if not layers:
        return {}
    lengths = torch.stack([layer["length"] for layer in layers])
    gates = [layer["gate"] for layer in layers if "gate" in layer]
    statistics = {"gate_mean": round(float(torch.stack(gates).mean()), 4)} if gates else {}
    return statistics | {
        "effective_memory_length": round(float(lengths.mean()), 3),
        "effective_memory_length_median": round(float(lengths.median()), 3),
    }


@torch.no_grad()
def of_each_memory(
    model: Any,
    measure: Callable[[Memory, Tensor, Tensor], T],
    ids: Tensor,
    attention_mask: Tensor | None = None,
    forward: Callable[[Tensor], Any] | None = None,
) -> list[T]:
    """measure(memory, x, real) of each layer's memory on ids (B, T), x and real being as in
    `Memory.statistics`.

    attention_mask (B, T) is zero at left padding, which does not count. forward runs the model on
    ids where it can't be called itself, as inside FSDP.
    """
    # Inside the model rows start at their first token.
    real = (torch.ones_like(ids) if attention_mask is None else attention_mask.flip(1)).bool()
    results: list[T] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda memory, args: results.append(measure(memory, args[0], real))
        )
        for module in model.modules()
        if isinstance(module, Memory)
    ]
    try:
        if hooks and forward is not None:
            forward(ids)
        elif hooks:
            model.model(ids, attention_mask, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return results
