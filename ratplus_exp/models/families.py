"""The memory for OLMo2, Llama, Mistral and Qwen: their stock decoders with Eq. 1 in every layer.

P1 continues OLMo2-7B with the memory added. Only `self_attn` differs from the stock layer, and all
stock weights keep their names, so stock checkpoints load. The memory runs over k and v between the
projections and RoPE, before or after the k-norm.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.olmo2 import modeling_olmo2 as olmo2
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from ratplus_exp.memory import Memory, memory_of
from ratplus_exp.models.configuration import MemoryFields
from ratplus_exp.models.forward_pass import ForwardPass
from ratplus_exp.models.hf import ATTENTION, EngineDecoder, SavedWithCode, attention

POSITIONS = ("after_norm", "before_norm")


@dataclass(init=False, repr=False, kw_only=True)
class FamilyFields(MemoryFields):
    """Fields that a family's config adds to the stock one's.

    gate_bias: −4 lets each token keep 98 % of itself, so that training starts near the stock model.
        W_g starts at 0: in OLMo2 x is the residual stream without a norm, and a random W_g would
        outweigh any bias.
    memory_position: whether the memory runs over keys "after_norm" or "before_norm", if the family
        has a k-norm (OLMo2, Qwen3); P1 leaves it open.
    output_gate: whether the attention output is multiplied by a gate of x, as in P2's models; P1
        leaves it open for OLMo2.
    """

    gate_bias: Any = -4.0
    memory_position: str = "after_norm"
    output_gate: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.memory_position not in POSITIONS:
            raise ValueError(
                f"memory_position={self.memory_position} is unknown: use {' or '.join(POSITIONS)}"
            )
        super().__post_init__(**kwargs)


class OutputGate(nn.Linear):
    """2 σ(W_o x): P2's output gate, doubled so that W_o = 0 does not change a trained model."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * torch.sigmoid(super().forward(x))


class MemoryAttention(nn.Module):
    """Mixin for stock attention layers. Shapes: (B, T, ·, D) up to RoPE, (B, ·, T, D) after."""

    rotate: ClassVar[Callable[..., tuple[Tensor, Tensor]]]  # the family's apply_rotary_pos_emb
    config: Any
    layer_idx: int
    head_dim: int
    scaling: float
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.memory = memory_of(config, self.head_dim)
        # Qwen has a window per layer, Mistral one in its config.
        window = getattr(config, "sliding_window", None)
        self.sliding_window: int | None = getattr(self, "sliding_window", window)
        width = config.num_attention_heads * self.head_dim
        self.output_gate = (
            OutputGate(config.hidden_size, width, bias=False) if config.output_gate else None
        )

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        *,
        forward_pass: ForwardPass,
        **_: Any,
    ) -> tuple[Tensor, None]:
        x, position = hidden_states, self.config.memory_position
        projections = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (states.unflatten(-1, (-1, self.head_dim)) for states in projections)
        if position == "after_norm":
            k = self._norm("k_norm", k)
        k, v, select_by = forward_pass.apply_memory(self.memory, self.layer_idx, x, k, v)
        if position == "before_norm":
            k = self._norm("k_norm", k)
            select_by = None if select_by is None else self._norm("k_norm", select_by)
        q = self._norm("q_norm", q)
        q, k, v = (states.transpose(1, 2) for states in (q, k, v))
        if select_by is not None:
            select_by = self.rotate(q, select_by.transpose(1, 2), *position_embeddings)[1]
        q, k = self.rotate(q, k, *position_embeddings)
        settings: Any = {"scaling": self.scaling, "sliding_window": self.sliding_window}
        settings |= {"forward_pass": forward_pass, "select_by": select_by}
        out = attention(self, q, k, v, None, **settings)[0].flatten(2)
        if self.output_gate is not None:
            out = self.output_gate(x) * out
        return self.o_proj(out), None

    def _norm(self, name: str, states: Tensor) -> Tensor:
        """The family's q-norm or k-norm, over each head (Qwen3) or over all heads (OLMo2)."""
        norm = getattr(self, name, None)
        if norm is None:
            return states
        if norm.weight.numel() == self.head_dim:
            return norm(states)
        return norm(states.flatten(2)).view_as(states)


class MemoryDecoder(EngineDecoder):
    """Mixin for stock decoders: replaces their attention layers by `attention_class`."""

    attention_class: ClassVar[type[MemoryAttention]]

    def __init__(self, config: Any) -> None:
        config._attn_implementation = ATTENTION
        super().__init__(config)  # type: ignore[call-arg]
        for index, layer in enumerate(self.layers):  # type: ignore[attr-defined]
            layer.self_attn = self.attention_class(config, index)
        self.post_init()  # type: ignore[attr-defined]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Memory):
            module.initialize(0.0, self.config.gate_bias)  # type: ignore[attr-defined]
        elif isinstance(module, OutputGate):
            nn.init.zeros_(module.weight)
        else:
            super()._init_weights(module)  # type: ignore[misc]


class MemoryCausalLM(SavedWithCode):
    """Mixin for stock causal models: replaces their decoder by `decoder_class`."""

    config_class: ClassVar[type[Any]]
    decoder_class: ClassVar[type[Any]]

    def __init__(self, config: Any) -> None:
        config._attn_implementation = ATTENTION
        PreTrainedModel.__init__(self, config)
        self.model = self.decoder_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[attr-defined]


def _family(prefix: str, stock: ModuleType) -> type[MemoryCausalLM]:
    """A family's causal model with the memory, derived with its parts from transformers' classes.

    prefix: of the names of the classes in `stock`, the family's modeling module. The new classes
    are importable by name, for saved models and pickles.
    """

    def derive(name: str, mixin: type, base: str, **attributes: Any) -> Any:
        attributes |= {"__module__": __name__}
        new = type(prefix + name, (mixin, getattr(stock, prefix + base)), attributes)
        return globals().setdefault(new.__name__, new)

    rotate = staticmethod(stock.apply_rotary_pos_emb)
    kind = f"{prefix.lower()}_ratplus"
    config = derive("RatPlusConfig", FamilyFields, "Config", model_type=kind)
    layer = derive("MemoryAttention", MemoryAttention, "Attention", rotate=rotate)
    fields = {"config_class": config, "attention_class": layer}
    decoder = derive("RatPlusModel", MemoryDecoder, "Model", **fields)
    fields = {"config_class": config, "decoder_class": decoder}
    causal = derive("RatPlusForCausalLM", MemoryCausalLM, "ForCausalLM", **fields)
    AutoConfig.register(kind, config)
    AutoModel.register(config, decoder)
    AutoModelForCausalLM.register(config, causal)
    return causal


FAMILIES: dict[str, type[MemoryCausalLM]] = {
    "olmo2": _family("Olmo2", olmo2),
    "llama": _family("Llama", llama),
    "mistral": _family("Mistral", mistral),
    "qwen2": _family("Qwen2", qwen2),
    "qwen3": _family("Qwen3", qwen3),
}
