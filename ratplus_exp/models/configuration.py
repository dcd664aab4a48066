"""Configurations with the memory, and that of P2's backbone."""

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from ratplus_exp.memory import check_memory


@dataclass(init=False, repr=False, kw_only=True)  # transformers makes the rest
class MemoryFields:
    """Fields of every config with the memory; attention and RAT+ differ in `memory` alone.

    memory: whether K and V go through the exponentially decaying memory (Eq. 1).
    gate_bias: the initial gates: one logit for all channels, or a pair of effective lengths in
        tokens over which the channels of every head are spread.
    memory_kind: a key of `KINDS`: the papers' gate, or a control.
    memory_on, shared_gate: for ablations and controls, see `Memory`.
    """

    memory: bool = True
    gate_bias: Any = 0.0
    memory_kind: str = "gate"
    memory_on: str = "kv"
    shared_gate: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        check_memory(self)
        super().__post_init__(**kwargs)  # type: ignore[misc]


class RatPlusConfig(MemoryFields, PretrainedConfig):
    """P2's backbone.

    Args:
        num_key_value_heads: default num_attention_heads; fewer for grouped-query attention.
        head_dim: default hidden_size / num_attention_heads.
        intermediate_size: width of the FFN, default P2's 4 · hidden_size.

    The other arguments have their usual Hugging Face meaning; defaults are P2's 1.5B model.
    """

    model_type = "ratplus"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 32_000
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: Any = None
    head_dim: Any = None
    intermediate_size: Any = None
    max_position_embeddings: int = 4096
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            if not (isinstance(size := getattr(self, name), int) and size > 0):
                raise ValueError(f"{name} is {size}: it must be a positive integer")
        for name in ("rope_theta", "rms_norm_eps"):
            if not (isinstance(amount := getattr(self, name), int | float) and amount > 0):
                raise ValueError(f"{name} is {amount}: it must be a positive number")
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}: RoPE needs an even number")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        super().__post_init__(**kwargs)
