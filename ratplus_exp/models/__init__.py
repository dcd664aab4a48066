"""Backbones as Hugging Face models; importing this package registers them with the Auto classes."""

from ratplus_exp.models.building import add_memory, config_for, new_model
from ratplus_exp.models.cache import SparseCache
from ratplus_exp.models.configuration import RatPlusConfig
from ratplus_exp.models.families import (
    FAMILIES,
    LlamaRatPlusConfig,
    LlamaRatPlusForCausalLM,
    LlamaRatPlusModel,
    MistralRatPlusConfig,
    MistralRatPlusForCausalLM,
    MistralRatPlusModel,
    Olmo2RatPlusConfig,
    Olmo2RatPlusForCausalLM,
    Olmo2RatPlusModel,
    Qwen2RatPlusConfig,
    Qwen2RatPlusForCausalLM,
    Qwen2RatPlusModel,
    Qwen3RatPlusConfig,
    Qwen3RatPlusForCausalLM,
    Qwen3RatPlusModel,
)
from ratplus_exp.models.hf import carry
from ratplus_exp.models.modeling import RatPlusForCausalLM, RatPlusModel

__all__ = [
    "RatPlusConfig",
    "RatPlusForCausalLM",
    "RatPlusModel",
    "SparseCache",
    "add_memory",
    "carry",
    "config_for",
    "new_model",
    "FAMILIES",
    "LlamaRatPlusConfig",
    "LlamaRatPlusForCausalLM",
    "LlamaRatPlusModel",
    "MistralRatPlusConfig",
    "MistralRatPlusForCausalLM",
    "MistralRatPlusModel",
    "Olmo2RatPlusConfig",
    "Olmo2RatPlusForCausalLM",
    "Olmo2RatPlusModel",
    "Qwen2RatPlusConfig",
    "Qwen2RatPlusForCausalLM",
    "Qwen2RatPlusModel",
    "Qwen3RatPlusConfig",
    "Qwen3RatPlusForCausalLM",
    "Qwen3RatPlusModel",
]
