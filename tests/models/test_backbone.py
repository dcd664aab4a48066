"""The backbone as a Hugging Face model: saving, gates, padding, the loss."""

from __future__ import annotations

import pytest
import torch
from tiny_models import backbones, heads
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ratplus_exp.methods import Engine
from ratplus_exp.models import RatPlusConfig, RatPlusForCausalLM, RatPlusModel, add_memory

pytestmark = pytest.mark.usefixtures("no_grad")


# Saving and loading.


@backbones
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_auto_classes_save_and_load_bitwise(make_model, make_ids, tmp_path, memory, dtype):
    model, ids = make_model(memory=memory, dtype=dtype), make_ids(2, 12)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is RatPlusConfig and config.memory == memory
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is RatPlusForCausalLM and loaded.dtype == dtype
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any("memory.bias" in name for name in before) == memory
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_base_model_loads_without_the_head(make_model, make_ids, tmp_path):
    model, ids = make_model(dtype=torch.float32), make_ids(1, 6)
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is RatPlusModel
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_tied_as_the_config_says(make_model, tmp_path, tied):
    make_model(tie_word_embeddings=tied).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight) == tied


def config_arguments():
    return {"vocab_size": 29, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("gate_bias", "logits"),
    [
        (-4.0, torch.full((8,), -4.0)),
        ((2.0, 256.0), (2.0 ** torch.arange(1, 9) - 1).log()),  # a length L is the logit log(L − 1)
    ],
    ids=["one logit", "lengths"],
)
def test_gates_start_where_the_config_says(tmp_path, gate_bias, logits):
    config = RatPlusConfig(**config_arguments(), gate_bias=gate_bias)
    attention = RatPlusForCausalLM(RatPlusConfig(**config_arguments(), memory=False))
    attention.save_pretrained(tmp_path)
    for model, std in (
        (RatPlusForCausalLM(config), 0.02),
        (AutoModelForCausalLM.from_config(config), 0.02),
        (RatPlusForCausalLM.from_pretrained(tmp_path, config=config), 0.02),
        (add_memory(attention, gate_bias=gate_bias), 0.0),  # the bias alone
    ):
        for layer in model.model.layers:
            gate = layer.attention.memory
            assert_close(gate.bias, logits.repeat(4), rtol=1e-4, atol=1e-4)
            assert float(gate.weight.std()) == pytest.approx(std, rel=0.15)


def test_trained_gates_are_not_initialised_again_on_loading(make_model, tmp_path):
    model = make_model(gate_bias=-4.0, dtype=torch.float32)
    for layer in model.model.layers:
        layer.attention.memory.bias.normal_()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for a, b in zip(model.model.layers, loaded.model.layers, strict=True):
        assert torch.equal(a.attention.memory.bias, b.attention.memory.bias)


@pytest.mark.parametrize("settings", [{"memory_on": "v"}, {"shared_gate": False}], ids=str)
def test_a_variant_of_the_memory_decodes_is_saved_and_added(
    make_model, make_ids, tmp_path, settings
):
    model, ids = make_model(**settings), make_ids(2, 16)
    whole = model(ids, use_cache=False).logits
    assert not torch.allclose(whole, make_model()(ids, use_cache=False).logits)
    cache = model.new_cache()
    parts = [model(part, past_key_values=cache).logits for part in ids.split([9, 1, 6], dim=1)]
    assert_close(torch.cat(parts, dim=1), whole)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, whole)
    added = add_memory(make_model(memory=False), **settings)
    assert added.state_dict().keys() == model.state_dict().keys()
    assert added.config.to_dict().items() >= settings.items()


def test_query_heads_that_do_not_divide_are_refused():
    with pytest.raises(
        ValueError, match=r"num_attention_heads \(4\) must be a multiple of .* \(3\)"
    ):
        RatPlusConfig(**config_arguments(), num_key_value_heads=3)


# Attention and RAT+ are one model.


@heads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_open_gates_are_the_attention_model_bitwise(
    make_model, make_ids, left_pad, kv_heads, dtype
):
    settings = {"num_key_value_heads": kv_heads, "dtype": dtype}
    attention = make_model(memory=False, **settings)
    ratplus = make_model(memory=True, gate_bias=-1e4, **settings)
    missing, unexpected = ratplus.load_state_dict(attention.state_dict(), strict=False)
    assert len(missing) == 4 and not unexpected
    ids, mask = left_pad([make_ids(1, 20)[0], make_ids(1, 13)[0]])
    for layer in ratplus.model.layers:
        layer.attention.memory.weight.zero_()
    assert torch.equal(ratplus(ids).logits, attention(ids).logits)
    logits = [model(ids, mask, use_cache=False).logits for model in (ratplus, attention)]
    assert torch.equal(logits[0][mask == 1], logits[1][mask == 1])
    for layer in ratplus.model.layers:
        layer.attention.memory.bias.zero_()
    assert not torch.allclose(ratplus(ids).logits, attention(ids).logits)


def test_a_layer_is_memory_then_gated_attention(make_model, make_ids):
    """Eq. 1 before RoPE, on K and V, then softmax attention, gated by sigmoid(W_o x)."""
    model, ids = make_model(), make_ids(1, 9)
    block, length = model.model.layers[0], 9
    x = block.attention_norm(model.model.embed_tokens(ids))[0]
    o, q, k, v = block.attention.in_proj(x).split([32, 32, 16, 16], dim=-1)
    gate = torch.sigmoid(block.attention.memory.gate_logits(x[None])[0])  # (T, 2, 8)
    q, k, v = q.view(length, 4, 8), k.view(length, 2, 8), v.view(length, 2, 8)
    for t in range(length):
        before_k, before_v = (k[t - 1], v[t - 1]) if t else (0, 0)
        k[t] = gate[t] * before_k + (1 - gate[t]) * k[t]
        v[t] = gate[t] * before_v + (1 - gate[t]) * v[t]

    def rotated(vector, position):
        pairs = torch.complex(vector[:4], vector[4:])
        angle = position * 10_000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
        turned = pairs * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((turned.real, turned.imag))

    out = torch.zeros(length, 4, 8, dtype=torch.float64)
    for t in range(length):
        for head in range(4):
            keys = torch.stack([rotated(k[j, head // 2], j) for j in range(t + 1)])
            weights = (keys @ rotated(q[t, head], t) / 8**0.5).softmax(0)
            out[t, head] = weights @ v[: t + 1, head // 2]
    wanted = block.attention.out_proj(torch.sigmoid(o) * out.flatten(1))
    found = []
    with block.attention.register_forward_hook(lambda module, args, output: found.append(output)):
        model(ids, use_cache=False)
    assert_close(found[0][0], wanted, rtol=1e-5, atol=1e-5)  # RoPE's angles are fp32


@backbones
def test_everything_in_attention_is_bf16_under_autocast(make_model, make_ids, monkeypatch, memory):
    model, ids = make_model(memory=memory, dtype=torch.float32), make_ids(1, 6)
    seen = []
    prefill = Engine.prefill

    def watched(self, states, layer):
        seen.extend(x.dtype for x in (states.q, states.k, states.v))
        return prefill(self, states, layer)

    monkeypatch.setattr(Engine, "prefill", watched)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, use_cache=False)
    assert set(seen) == {torch.bfloat16}


# Padding and the loss.


@pytest.mark.parametrize("mask", [[1, 1, 1, 0], [1, 0, 1, 1], [0, 1, 0, 1]])
def test_padding_anywhere_but_on_the_left_is_refused(make_model, make_ids, mask):
    with pytest.raises(ValueError, match="padding_side = 'left'"):
        make_model()(make_ids(1, 4), torch.tensor([mask]))


@backbones
def test_what_stands_in_the_padding_never_matters(make_model, make_ids, left_pad, memory):
    model = make_model(memory=memory)
    ids, mask = left_pad([make_ids(1, 12)[0], make_ids(1, 7)[0]])
    other = ids.where(mask == 1, 3)
    assert not torch.equal(ids, other)
    assert torch.equal(model(ids, mask).logits[mask == 1], model(other, mask).logits[mask == 1])


def test_logits_to_keep_are_the_last(make_model, make_ids):
    model, ids = make_model(), make_ids(2, 8)
    whole = model(ids).logits
    assert whole.shape == (2, 8, 29)
    assert_close(model(ids, logits_to_keep=3).logits, whole[:, -3:])


def test_loss_is_the_mean_cross_entropy_of_the_next_labelled_tokens(make_model, make_ids):
    model, ids = make_model(), make_ids(2, 8)
    labels = ids.clone()
    labels[0, :5] = -100
    labels[1, 3] = -100
    out = model(ids, labels=labels)
    log_p = out.logits.log_softmax(-1)
    terms = [
        -log_p[b, t, labels[b, t + 1]] for b in range(2) for t in range(7) if labels[b, t + 1] >= 0
    ]
    assert len(terms) == 9
    assert_close(out.loss.double(), sum(terms) / 9, rtol=1e-6, atol=0)
    assert model(ids).loss is None
