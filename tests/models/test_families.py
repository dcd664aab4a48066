"""The memory in OLMo2, Llama, Mistral and Qwen, and stock decoders with an engine."""

from __future__ import annotations

import json
import math
import pickle

import pytest
import torch
from tiny_models import TINY, shut, stock_model
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ratplus_exp.memory import Memory
from ratplus_exp.methods import Engine, Quest
from ratplus_exp.models import FAMILIES, add_memory, attach_engine, config_for, new_model

pytestmark = pytest.mark.usefixtures("no_grad")
families = pytest.mark.parametrize("family", sorted(FAMILIES))
stock_families = pytest.mark.parametrize("family", [*sorted(FAMILIES), "phi3", "gemma"])


# Any stock decoder.


@stock_families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_stock_model_with_an_engine_is_the_stock_model_bitwise(make_ids, family, dtype):
    model, ids = stock_model(family, dtype), make_ids(2, 20)
    wanted = model(ids).logits
    assert torch.equal(attach_engine(model)(ids).logits, wanted)
    assert torch.equal(model(ids, use_cache=False).logits, wanted)


@stock_families
def test_a_stock_model_with_an_engine_generates_as_without(make_ids, left_pad, family):
    model = stock_model(family, torch.float64)
    ids, mask = left_pad([make_ids(1, 12)[0], make_ids(1, 5)[0]])
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    wanted = model.generate(ids, **settings)
    assert torch.equal(attach_engine(model).generate(ids, **settings), wanted)
    beams = {"num_beams": 2, "max_new_tokens": 4}
    other = stock_model(family, torch.float64).generate(ids, **settings | beams)
    assert torch.equal(model.generate(ids, **settings | beams), other)


@stock_families
def test_a_stock_model_with_an_engine_is_saved_as_the_stock_model(make_ids, tmp_path, family):
    model, ids = attach_engine(stock_model(family)), make_ids(1, 9)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(stock_model(family)) and loaded.config.model_type == family
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_carrying_twice_changes_nothing(make_model):
    model = attach_engine(stock_model("llama"))
    assert attach_engine(model) is model
    ours = make_model()
    assert attach_engine(ours) is ours and type(ours).__name__ == "RatPlusForCausalLM"


def test_a_sparse_method_works_on_a_stock_model_with_an_engine(make_ids):
    model, ids = attach_engine(stock_model("qwen2")), make_ids(1, 30)
    cache = model.new_cache(Engine(Quest(4, 2)))
    model(ids[:, :29], past_key_values=cache)
    sparse = model(ids[:, 29:], past_key_values=cache).logits
    assert not torch.allclose(sparse, model(ids).logits[:, 29:])
    assert cache.engine.usage.fractions(1).item() < 0.3


def test_models_without_the_interface_are_refused():
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not supported: model=hf takes"):
        attach_engine(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=29)))


def test_a_context_longer_than_a_sliding_window_is_refused(make_ids):
    config = MistralConfig(**TINY, sliding_window=16)
    for model in (
        attach_engine(MistralForCausalLM(config).eval()),
        add_memory(MistralForCausalLM(config)).eval(),
    ):
        model(make_ids(1, 16))
        with pytest.raises(ValueError, match="window of 16 tokens only, and the context has 17"):
            model(make_ids(1, 17))
        cache = model.new_cache()
        model(make_ids(1, 15), past_key_values=cache)
        model(make_ids(1, 1), past_key_values=cache)
        with pytest.raises(ValueError, match="window of 16 tokens only, and the context has 17"):
            model(make_ids(1, 1), past_key_values=cache)


def test_logit_caps_are_refused(make_ids):
    model = attach_engine(stock_model("gemma2", head_dim=8, query_pre_attn_scalar=8))
    with pytest.raises(ValueError, match="caps its logits or has sinks"):
        model(make_ids(1, 5))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("diffllama", "DiffLlamaAttention is not supported: it attends twice"),
        ("doge", "DogeAttention is not supported: it adds a bias"),
        ("nemotron", "NemotronAttention is not supported"),
        ("deepseek_v3", "keys and values of different sizes"),
    ],
)
def test_other_kinds_of_attention_are_refused(make_ids, family, reason):
    sizes = {"kv_lora_rank": 8, "q_lora_rank": 8, "n_routed_experts": 4, "moe_intermediate_size": 8}
    sizes |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "n_group": 1}
    sizes |= {"topk_group": 1, "num_experts_per_tok": 2, "head_dim": 4}
    extra = sizes if family == "deepseek_v3" else {}
    model = attach_engine(stock_model(family, **extra))
    with pytest.raises(ValueError, match=reason), torch.no_grad():
        model(make_ids(1, 5))


def small_decoders():
    """Random decoders of at most 3M parameters, one of each family that is made of `sizes`."""
    sizes = TINY | {"vocab_size": 64, "eos_token_id": 2, "max_position_embeddings": 256}
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    sizes |= dict.fromkeys(experts, 4) | {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
    for family in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            config = AutoConfig.for_model(family, **sizes)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            if sum(p.numel() for p in model.parameters()) < 3e6:
                yield family, stock_model(family, **sizes)
        except Exception:  # the family needs other settings or packages
            continue


@pytest.mark.slow
def test_every_family_of_transformers_gives_its_stock_logits_or_is_refused():
    ids = torch.randint(3, 64, (2, 23), generator=torch.Generator().manual_seed(0))
    equal, refused = [], []
    for family, model in small_decoders():
        try:
            expected = model(ids).logits[:, -3:]
        except Exception:  # transformers itself does not run it
            continue
        try:
            attach_engine(model)
            cache = model.new_cache()
            model(ids[:, :-3], past_key_values=cache)
            steps = [model(x, past_key_values=cache).logits for x in ids[:, -3:].split(1, 1)]
        except ValueError as error:
            assert "supported" in str(error) or "sinks" in str(error), family
            refused.append(family)
        else:
            assert_close(torch.cat(steps, 1), expected, rtol=1e-3, atol=1e-3, msg=family)
            equal.append(family)
    assert len(equal) >= 40 and {"diffllama", "doge", "nemotron", "gpt2"} <= set(refused)


# The memory added.


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
    weights = add_memory(stock).state_dict()
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
