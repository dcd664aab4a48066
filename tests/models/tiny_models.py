"""Tiny models for the tests of this folder, and the sizes that they are run with."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

backbones = pytest.mark.parametrize("memory", [False, True], ids=["attention", "ratplus"])
heads = pytest.mark.parametrize("kv_heads", [1, 2, 4], ids=["one KV head", "GQA", "MHA"])
TINY = {
    "vocab_size": 29,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


@torch.no_grad()
def stock_model(family, dtype=torch.float32, **fields):
    """A random model of transformers' own class."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **TINY | fields)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:  # so that it matters on which side of a norm something stands
            weight.copy_(1 + 0.5 * torch.randn_like(weight))
    return model


@torch.no_grad()
def shut(model):
    """Gates at zero: every token keeps all of itself."""
    for layer in model.model.layers:
        layer.self_attn.memory.weight.zero_()
        layer.self_attn.memory.bias.fill_(-1e4)
    return model
