"""An engine in transformers' own decoders: their logits, or a refusal."""

from __future__ import annotations

import pytest
import torch
from tiny_models import TINY, stock_model
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

from ratplus_exp.methods import Engine, Quest
from ratplus_exp.models import FAMILIES, add_memory, attach_engine

pytestmark = pytest.mark.usefixtures("no_grad")
stock_families = pytest.mark.parametrize("family", [*sorted(FAMILIES), "phi3", "gemma"])


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


def test_attaching_an_engine_twice_changes_nothing(make_model):
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
