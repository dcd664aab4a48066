"""A method's result does not depend on which class carries the model.

A Llama can be the very same function as a P2 backbone: an output gate of W_o = 0 is a factor 1/2 on
the output projection, and a gated FFN whose up-projection is a bias of one is a plain FFN. So the
same weights run through two classes that share no line of attention or FFN code.
"""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from ratplus_exp.methods import Dense, Dilated, Engine, MoBA, Quest, Random, SnapKV, TopK
from ratplus_exp.models import add_memory, attach_engine

METHODS = [
    Dense(),
    Quest(4, 3),
    MoBA(4, 3),
    SnapKV(top_k=12, window=4),
    Dilated(dilation=4, local=4, initial=1),
]


@pytest.fixture(scope="module")
def twins(make_model):
    """{memory: (P2's class, Llama's class)} with the same function and, but for norms, weights."""
    pairs = {}
    for memory in (False, True):
        model = make_model(memory=memory)
        config = model.config
        llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                num_key_value_heads=config.num_key_value_heads,
                hidden_act="gelu",
                mlp_bias=True,
                bos_token_id=1,
                eos_token_id=None,
                pad_token_id=0,
            )
        )
        llama = attach_engine((add_memory(llama) if memory else llama).double().eval())
        with torch.no_grad():
            for ours, theirs in zip(model.model.layers, llama.model.layers, strict=True):
                copy(ours, theirs, memory)
            llama.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight)
            llama.lm_head.weight.copy_(model.lm_head.weight)
        pairs[memory] = (model, llama)
    return pairs


def copy(ours, theirs, memory):
    ours.attention.in_proj.weight[:32] = 0  # W_o
    _, q, k, v = ours.attention.in_proj.weight.split(ours.attention.widths)
    attention, mlp = theirs.self_attn, theirs.mlp
    for projection, rows in ((attention.q_proj, q), (attention.k_proj, k), (attention.v_proj, v)):
        projection.weight.copy_(rows)
    attention.o_proj.weight.copy_(0.5 * ours.attention.out_proj.weight)
    if memory:
        attention.memory.load_state_dict(ours.attention.memory.state_dict())
    for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        linear.weight.zero_()
        linear.bias.zero_()
    mlp.gate_proj.weight.copy_(ours.ffn.fc1.weight)
    mlp.up_proj.bias.fill_(1)
    mlp.down_proj.weight.copy_(ours.ffn.fc2.weight)


@pytest.mark.parametrize("memory", [False, True], ids=["attention", "ratplus"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("selector", [TopK, lambda: Random(torch.tensor([3, 4]))])
def test_same_logits_and_same_measured_budget(twins, make_ids, left_pad, memory, method, selector):
    ids, mask = left_pad([make_ids(1, 24)[0], make_ids(1, 19, seed=1)[0]])
    answer = make_ids(2, 6, seed=2)
    found = []
    for model in twins[memory]:
        cache = model.new_cache(Engine(method, selector()))
        with torch.no_grad():
            prompt = model(ids, mask, past_key_values=cache).logits[mask == 1]
            steps = [model(t, past_key_values=cache).logits for t in answer.split(1, dim=1)]
        found.append((prompt, torch.cat(steps, 1), cache.engine.usage.fractions(2)))
    for ours, theirs in zip(*found, strict=True):
        # Llama computes its norms and angles in fp32.
        assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert type(method) is Dense or found[0][2].max() < 0.9


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions", "inputs_embeds"])
def test_what_a_model_does_not_do_is_refused(twins, name):
    value = torch.zeros(1, 4, 32) if name == "inputs_embeds" else True
    for model in twins[True]:
        with pytest.raises(ValueError, match=f"drop {name}"):
            model(torch.ones(1, 4, dtype=torch.long), **{name: value})


def test_a_prompt_in_chunks_is_refused(twins):
    for model in twins[True]:
        with pytest.raises(ValueError, match="prefill_chunk_size is not supported"):
            model.generate(torch.ones(1, 8, dtype=torch.long), prefill_chunk_size=4)
