"""The backbone of P2 as a Hugging Face model: RAT+, or attention if `config.memory` is off.

Legend: B batch, T tokens, C hidden size, H query heads, K KV heads, D head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from ratplus_exp.memory import Memory, memory_of
from ratplus_exp.models.configuration import RatPlusConfig
from ratplus_exp.models.forward_pass import ForwardPass, Rope, rotate
from ratplus_exp.models.hf import EngineDecoder, SavedWithCode


class SelfAttention(nn.Module):
    """Gated attention of P2, over the memory's k̃ and ṽ if there is one (Eq. 1, 2).

    `in_proj` stacks the rows o, q, k, v. The memory's gate is a separate module, so that it can be
    trained at a different rate and be added to a trained attention model.
    """

    def __init__(self, config: RatPlusConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.widths = (width, width, kv_width, kv_width)
        self.in_proj = nn.Linear(config.hidden_size, sum(self.widths), bias=False)
        self.out_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.memory = memory_of(config, self.head_dim)

    def forward(self, x: Tensor, rope: Rope, forward_pass: ForwardPass) -> Tensor:
        o, q, k, v = self.in_proj(x).split(self.widths, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))  # (B, T, ·, D)
        k, v, by = forward_pass.apply_memory_and_rope(self.memory, self.layer, x, k, v, rope)
        q, k, v = (part.transpose(1, 2) for part in (rotate(q, rope), k, v))
        by = None if by is None else by.transpose(1, 2)
        out = forward_pass.attend(self.layer, q, k, v, by).transpose(1, 2).flatten(2)
        return self.out_proj(torch.sigmoid(o) * out)


class FeedForward(nn.Module):
    def __init__(self, config: RatPlusConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class DecoderLayer(nn.Module):
    """RMSNorm before each sublayer."""

    def __init__(self, config: RatPlusConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = SelfAttention(config, layer)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor, rope: Rope, forward_pass: ForwardPass) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, forward_pass)
        return x + self.ffn(self.ffn_norm(x))


class RatPlusPreTrainedModel(PreTrainedModel):
    config_class = RatPlusConfig
    base_model_prefix = "model"
    _no_split_modules = ("DecoderLayer",)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Memory):
            module.initialize(self.config.initializer_range, self.config.gate_bias)
        else:
            super()._init_weights(module)


class RatPlusModel(EngineDecoder, RatPlusPreTrainedModel):
    def __init__(self, config: RatPlusConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def run_layers(
        self, input_ids: Tensor, forward_pass: ForwardPass, **_: Any
    ) -> BaseModelOutputWithPast:
        x = self.embed_tokens(input_ids)
        cos, sin = _rope(forward_pass.step.positions, self.config.head_dim, self.config.rope_theta)
        dtype = _projected_dtype(x)  # under autocast x itself is fp32
        rope = (cos.to(dtype), sin.to(dtype))
        for layer in self.layers:
            x = layer(x, rope, forward_pass)
        cache: Any = forward_pass.cache
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=cache)


class RatPlusForCausalLM(SavedWithCode, RatPlusPreTrainedModel, GenerationMixin):
    """Takes `engine`, as RatPlusModel does, in addition to the usual arguments."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    forward = LlamaForCausalLM.forward

    def __init__(self, config: RatPlusConfig) -> None:
        super().__init__(config)
        self.model = RatPlusModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def _rope(positions: Tensor, head_dim: int, theta: float) -> Rope:
    """The half-rotation form of RoPE."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angle = positions[..., None].float() * theta**-exponent
    angle = torch.cat((angle, angle), dim=-1)[:, :, None]
    return angle.cos(), angle.sin()


def _projected_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer makes of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


AutoConfig.register("ratplus", RatPlusConfig)
AutoModel.register(RatPlusConfig, RatPlusModel)
AutoModelForCausalLM.register(RatPlusConfig, RatPlusForCausalLM)
