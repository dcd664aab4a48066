"""Shape of the backbone: P2's architecture, with the memory on (RAT+) or off (attention)."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from ratplus_exp.memory import check_memory


class RatPlusConfig(PretrainedConfig):
    """Attention and RAT+ are one model: `memory` switches Eq. 1 on, and nothing else differs.

    Args:
        memory: whether K and V go through the exponentially decaying memory.
        gate_bias: where the gates start: one logit for all channels, or a pair of effective
            lengths in tokens over which the channels of every head are spread.
        memory_kind: what the memory is, see `KINDS`: the papers' gate, or a control.
        memory_on, shared_gate: for ablations and controls, see `Memory`.
        num_key_value_heads: fewer than num_attention_heads for grouped-query attention.
        intermediate_size: width of the FFN; P2 uses 4 · hidden_size.

    The other arguments carry their usual Hugging Face meaning; defaults are P2's 1.5B model.
    """

    model_type = "ratplus"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 32_000,
        hidden_size: int = 2048,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        intermediate_size: int | None = None,
        max_position_embeddings: int = 4096,
        rope_theta: float = 10_000.0,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        memory: bool = True,
        memory_kind: str = "gate",
        gate_bias: float | tuple[float, float] = 0.0,
        memory_on: str = "kv",
        shared_gate: bool = True,
        tie_word_embeddings: bool = True,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.intermediate_size = intermediate_size or 4 * hidden_size
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.memory = memory
        self.memory_kind = memory_kind
        self.gate_bias = gate_bias
        self.memory_on = memory_on
        self.shared_gate = shared_gate
        self.use_cache = use_cache
        check_memory(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
