"""The memory in OLMo2, Llama, Mistral and Qwen."""

from __future__ import annotations

import json
import math
import pickle

import pytest
import torch
from tiny_models import TINY, shut, stock_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from ratplus_exp.memory import Memory
from ratplus_exp.models import FAMILIES, add_memory, config_for, new_model

pytestmark = pytest.mark.usefixtures("no_grad")
families = pytest.mark.parametrize("family", sorted(FAMILIES))


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("position", ["after_norm", "before_norm"])
def test_shut_gates_are_the_stock_model_bitwise(make_ids, family, dtype, position):
    stock, ids = stock_model(family, dtype), make_ids(2, 20)
    model = shut(add_memory(stock, memory_position=position)).eval()
    assert model.dtype == dtype
    assert torch.equal(model(ids).logits, stock(ids).logits)
    for layer in model.model.layers:
        layer.self_attn.memory.bias.zero_()
    assert not torch.allclose(model(ids).logits, stock(ids).logits)


@families
def test_the_class_without_memory_is_the_stock_model_bitwise(make_ids, family):
    stock, ids = stock_model(family), make_ids(2, 20)
    config = FAMILIES[family].config_class(**TINY, memory=False)
    model = FAMILIES[family](config).eval()
    model.load_state_dict(stock.state_dict())
    assert torch.equal(model(ids).logits, stock(ids).logits)


@families
def test_stock_weights_keep_their_names_and_gates_start_at_minus_four(family):
    stock = stock_model(family)
    stock.generation_config.eos_token_id = [3, 5]
    twin = add_memory(stock)
    assert twin.generation_config.eos_token_id == [3, 5]
    weights = twin.state_dict()
    assert all(torch.equal(weights[name], x) for name, x in stock.state_dict().items())
    new = {name: x for name, x in weights.items() if name not in stock.state_dict()}
    assert sorted(new) == [
        f"model.layers.{i}.self_attn.memory.{part}" for i in (0, 1) for part in ("bias", "weight")
    ]
    assert all((x == -4).all() for name, x in new.items() if name.endswith("bias"))
    assert not any(x.any() for name, x in new.items() if name.endswith("weight"))


@pytest.mark.parametrize("family", ["olmo2", "ratplus"])
def test_gates_start_at_their_bias_whatever_the_width_and_the_residual_stream(family):
    """OLMo2's memory sees the residual stream without a norm, whose size grows with depth."""
    wide = {"hidden_size": 4096, "num_hidden_layers": 1, "intermediate_size": 8}
    wide |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 29}
    model = new_model(config_for(wide | {"model_type": family}, False), 0)
    model = add_memory(model, gate_bias=-4.0)
    [memory] = (m for m in model.modules() if isinstance(m, Memory))
    gates = memory.gate_logits(4 * torch.randn(2, 16, 4096)).sigmoid()
    assert float(gates.mean()) == pytest.approx(1 / (1 + math.exp(4)), rel=1e-5)


def test_the_backbone_from_scratch_has_random_gates():
    config = config_for({"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}, True)
    [memory] = (m for m in new_model(config, 0).modules() if isinstance(m, Memory))
    assert float(memory.weight.std()) == pytest.approx(config.initializer_range, rel=0.1)


@families
def test_saved_and_loaded_by_the_auto_classes(make_ids, tmp_path, family):
    model, ids = add_memory(stock_model(family), output_gate=True).eval(), make_ids(2, 12)
    for layer in model.model.layers:
        layer.self_attn.memory.bias.normal_()
        layer.self_attn.output_gate.weight.normal_()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == f"{family}_ratplus" and saved["memory"] is True
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is FAMILIES[family] is pickle.loads(pickle.dumps(type(model)))
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@families
def test_decoding_and_left_padding_equal_one_pass_over_each_row(make_ids, left_pad, family):
    model = add_memory(stock_model(family, torch.float64), gate_bias=1.0).eval()
    rows, more = [make_ids(1, n, seed=n)[0] for n in (12, 5)], make_ids(2, 4)
    ids, mask = left_pad(rows)
    cache = model.new_cache()
    prompt = model(ids, mask, past_key_values=cache).logits
    steps = [model(token, past_key_values=cache).logits for token in more.split(1, dim=1)]
    for i, row in enumerate(rows):
        whole = model(torch.cat((row, more[i]))[None], use_cache=False).logits[0]
        # RMSNorm and RoPE of transformers compute in fp32.
        assert_close(prompt[i, mask[i] == 1], whole[: len(row)], rtol=1e-4, atol=1e-4)
        assert_close(torch.cat(steps, 1)[i], whole[len(row) :], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["olmo2", "qwen3", "llama"])
@pytest.mark.parametrize("position", ["after_norm", "before_norm"])
def test_the_memory_stands_where_the_config_says(make_ids, family, position):
    """Against Eq. 1 and the norms written out: OLMo2 norms all heads together, Qwen3 each one."""
    settings = {"gate_bias": 0.5, "memory_position": position}
    model = add_memory(stock_model(family, torch.float64), **settings).eval()
    length, ids = 7, make_ids(1, 7)
    layer = model.model.layers[0]
    x = model.model.embed_tokens(ids)[0]
    if family != "olmo2":  # OLMo2 norms what comes out of a layer, the others what goes in
        x = layer.input_layernorm(x[None])[0]
    attention = layer.self_attn
    k, v = attention.k_proj(x), attention.v_proj(x)  # (T, 16)
    gate = torch.sigmoid(x @ attention.memory.weight.T + attention.memory.bias)

    def norm(k):
        if family == "llama":
            return k
        rows = k if family == "olmo2" else k.view(length, 2, 8)
        scale = (rows.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).rsqrt()
        return (rows * scale * attention.k_norm.weight).reshape(length, 16)

    def decayed(x):
        rows, state = [], torch.zeros(16, dtype=torch.float64)
        for t in range(length):
            state = gate[t] * state + (1 - gate[t]) * x[t]
            rows.append(state)
        return torch.stack(rows)

    k = decayed(norm(k)) if position == "after_norm" else norm(decayed(k))
    base = model.config.rope_parameters["rope_theta"]
    angle = torch.outer(torch.arange(length), base ** -(torch.arange(4, dtype=torch.float64) / 4))
    turned = torch.complex(*k.view(length, 2, 2, 4).unbind(2))
    turned = turned * torch.polar(torch.ones_like(angle), angle)[:, None]
    cache = model.new_cache()
    model(ids, past_key_values=cache)
    keys = cache.layers[0].keys[0, :, :length].transpose(0, 1)  # (T, 2, 8)
    assert_close(keys, torch.cat((turned.real, turned.imag), -1), rtol=1e-4, atol=1e-4)
    values = cache.layers[0].values[0, :, :length].transpose(0, 1).flatten(1)
    assert_close(values, decayed(v), rtol=1e-4, atol=1e-4)


def test_the_output_gate_starts_as_one_and_then_gates(make_ids):
    stock, ids = stock_model("olmo2"), make_ids(1, 9)
    model = shut(add_memory(stock, output_gate=True)).eval()
    assert torch.equal(model(ids).logits, stock(ids).logits)
    attention, seen = model.model.layers[0].self_attn, []
    attention.output_gate.weight.normal_()
    with attention.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        model(ids)
        plain = attention.output_gate.weight.clone()
        attention.output_gate.weight.zero_()
        model(ids)
    x = model.model.embed_tokens(ids)
    assert_close(seen[0], seen[1] * 2 * torch.sigmoid(x @ plain.T))


def test_gradients_reach_the_memory(make_ids):
    model = add_memory(stock_model("olmo2"), output_gate=True).train()
    with torch.enable_grad():
        assert model(make_ids(2, 8)).past_key_values is None
        model(make_ids(2, 8), labels=make_ids(2, 8)).loss.backward()
    assert all(bool(p.grad.any()) for p in model.parameters())


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("olmo2", {"memory_position": "inside"}, "use after_norm or before_norm"),
        ("gemma", {}, "no memory for gemma models: use ratplus, olmo2, llama"),
    ],
)
def test_what_no_family_has_is_refused(family, fields, message):
    with pytest.raises(ValueError, match=message):
        add_memory(stock_model(family), **fields)


def test_an_architecture_becomes_a_config_and_fresh_weights_of_a_seed(make_ids):
    architecture = TINY | {"model_type": "olmo2"}
    state = torch.random.get_rng_state()
    models = [new_model(config_for(architecture, memory), 3) for memory in (False, True)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [m.config.model_type for m in models] == ["olmo2", "olmo2_ratplus"]
    assert all(m.new_cache().get_seq_length() == 0 for m in models)
    again = new_model(config_for(architecture, True), 3)
    assert torch.equal(again(make_ids(1, 5)).logits, models[1](make_ids(1, 5)).logits)
    with torch.device("meta"):
        assert new_model(config_for(architecture, True), 0).lm_head.weight.is_meta
    with pytest.raises(ValueError, match="model_type=abacus is unknown"):
        config_for({"model_type": "abacus"}, False)
