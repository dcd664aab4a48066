"""Cost estimates against parameter counts, FLOPs and bytes written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Olmo2Config, Olmo2ForCausalLM

from ratplus_exp.cost import (
    Shape,
    attended_keys,
    decode_hours,
    hours,
    training_memory,
)
from ratplus_exp.methods import Dilated
from ratplus_exp.models import RatPlusConfig, RatPlusForCausalLM


def shape_of(kind, config):
    with torch.device("meta"):
        return Shape.of(kind(config))


def ratplus_7b(memory):
    return RatPlusConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, memory=memory
    )


OLMO2_7B = Olmo2Config(
    vocab_size=100352,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
)


@pytest.mark.parametrize("memory", [False, True])
def test_the_parameters_of_p2s_7b(memory):
    shape = shape_of(RatPlusForCausalLM, ratplus_7b(memory))
    d = 4096
    gates = 32 * (d * d + d) if memory else 0
    by_hand = 32_000 * d + d + 32 * (4 * d * d + d * d + 8 * d * d + 2 * d) + gates
    assert shape.parameters == by_hand
    assert shape.memory_parameters == gates
    assert shape.multiplied == by_hand  # tied: the embedding is the head's product


def test_the_parameters_of_olmo2_7b():
    shape = shape_of(Olmo2ForCausalLM, OLMO2_7B)
    d, f, v = 4096, 11008, 100352
    layer = 4 * d * d + 3 * d * f + 4 * d  # q, k, v, o; gate, up, down; four norms
    assert shape.parameters == 2 * v * d + d + 32 * layer
    assert shape.multiplied == shape.parameters - v * d
    assert shape.memory_parameters == 0


def test_keys_and_values_under_grouped_query_attention():
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2
    )
    shape = shape_of(LlamaForCausalLM, config)
    assert shape.kv_bytes(100) == 3 * 2 * (2 * 8) * 100 * 2  # layers, K and V, 2 heads of 8, bf16


def test_attended_keys_are_counted_by_hand():
    assert attended_keys(None, 5) == (1 + 2 + 3 + 4 + 5) / 5
    dilation, local, initial, length = 4, 1, 1, 10
    seen = sum(
        (j + 1) % dilation == 0 or t - j <= local or j < initial
        for t in range(length)
        for j in range(t + 1)
    )
    assert attended_keys(Dilated(dilation=4, local=1, initial=1), length) == seen / length
    # Itself and half of every 64th position; the chunks are put together.
    assert attended_keys(Dilated(), 2048) == pytest.approx(1 + 2048 / 64 / 2, abs=1)


def test_flops_of_a_token(make_model):
    """The weights' products as torch counts them, and attention's by hand."""
    model = make_model(memory=False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(1, 16, dtype=torch.long))
    shape = Shape.of(model)
    assert 16 * shape.forward_flops(0) == pytest.approx(counter.get_total_flops(), 0.01)
    layers, heads, head_dim, keys = 2, 4, 8, 10  # q·k and p·v, a multiply-add a channel and key
    attention = sum(2 * 2 * head_dim for _ in range(layers * heads * keys))
    assert shape.forward_flops(keys) - shape.forward_flops(0) == attention


def test_the_papers_continued_pretraining_takes_its_ten_hours():
    """10B tokens on 64 GH200 in ≈10 h: two passes a batch at 40 % of 989 TFLOP/s."""
    shape = shape_of(Olmo2ForCausalLM, OLMO2_7B)
    gates = 32 * (4096 * 4096 + 4096)
    n = shape.multiplied + gates
    dense, dilated = (6 * n + 12 * 32 * 4096 * attended_keys(m, 4096) for m in (None, Dilated()))
    assert dense == pytest.approx(shape.training_flops(4097 / 2) + 6 * gates)
    assert hours(1e10 * (dense + dilated), 64, 989, 0.40) == pytest.approx(10, rel=0.25)


def test_the_papers_evaluation_takes_its_twenty_minutes():
    """8 tasks × 500 examples of 4096 tokens, answers of up to 128, on one GPU."""
    shape = shape_of(RatPlusForCausalLM, ratplus_7b(True))
    prompts = hours(4000 * 4096 * shape.forward_flops(2048), 1, 989, 0.4)
    answers = decode_hours(
        shape, examples=4000, batch=16, new_tokens=128, read=shape.kv_bytes(4096), bandwidth=4.0
    )
    assert (prompts + answers) * 60 == pytest.approx(20, rel=0.25)


def test_training_memory_counts_states_once_a_shard():
    shape = shape_of(RatPlusForCausalLM, ratplus_7b(True))
    how = {"rows": 1, "length": 4096, "checkpointing": True}
    one, many = (training_memory(shape, shards=n, **how) for n in (1, 64))
    states = "weights, gradients, Adam (fp32)"
    assert one[states] == 16 * shape.parameters == 64 * many[states]
    assert one["gathered layers"] == 0 < many["gathered layers"]
    kept = training_memory(shape, shards=1, **how | {"checkpointing": False})["activations"]
    assert kept > 5 * one["activations"]
