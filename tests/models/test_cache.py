"""The cache: what it holds, and that decoding with it is one forward pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import backbones, heads
from torch.testing import assert_close
from transformers import DynamicCache

from ratplus_exp.methods import Dense, Engine, Layers, Quest, SnapKV
from ratplus_exp.methods.snapkv import PyramidKV
from ratplus_exp.models.cache_layer import ROOM

pytestmark = pytest.mark.usefixtures("no_grad")


@backbones
@heads
@pytest.mark.parametrize(
    "method", [Dense(), Quest(4, 2), SnapKV(top_k=12, window=4)], ids=["dense", "quest", "snapkv"]
)
@pytest.mark.parametrize("lengths", [(20, 20), (20, 9, 13)], ids=["alike", "of different length"])
def test_a_cache_keeps_keys_and_values_alive_and_nothing_else(
    make_model, make_ids, left_pad, memory, kv_heads, method, lengths
):
    model = make_model(memory=memory, num_key_value_heads=kv_heads)
    ids, mask = left_pad([make_ids(1, n)[0] for n in lengths])
    cache = model.new_cache(Engine(method))
    model(ids, mask, past_key_values=cache)
    stored = 12 if method.phase == "once" else 20
    before = []
    for layer in cache.layers:
        for states in (layer.keys, layer.values):
            assert states.untyped_storage().nbytes() == states.numel() * states.element_size()
            assert states.shape == (len(lengths), kv_heads, stored + ROOM, 8)
            before.append(states.data_ptr())
    model(ids[:, :1], past_key_values=cache)  # the first new token copies none of them
    after = [x.data_ptr() for layer in cache.layers for x in (layer.keys, layer.values)]
    assert before == after


def test_lengths_of_rows_are_asked_for_once_a_pass(make_model, make_ids, left_pad, monkeypatch):
    model = make_model(num_hidden_layers=3)
    ids, mask = left_pad([make_ids(1, n)[0] for n in (20, 9, 20)])
    asked = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: asked.append(x) or tolist(x))
    model(ids, mask, past_key_values=model.new_cache(Engine(SnapKV(top_k=12, window=4))))
    assert len(asked) == 1


@backbones
@heads
def test_prefill_and_decode_equal_one_forward_pass(make_model, make_ids, memory, kv_heads):
    model, ids = make_model(memory=memory, num_key_value_heads=kv_heads), make_ids(2, 16)
    whole = model(ids, use_cache=False).logits
    for splits in ([10] + [1] * 6, [4, 5, 7], [1] * 16):
        cache = model.new_cache()
        parts = [model(part, past_key_values=cache).logits for part in ids.split(splits, dim=1)]
        assert_close(torch.cat(parts, dim=1), whole)
        assert cache.get_seq_length() == 16


@backbones
def test_chunks_after_a_left_padded_prompt_equal_the_unpadded_rows(
    make_model, make_ids, left_pad, memory
):
    model = make_model(memory=memory)
    rows, more = [make_ids(1, n, seed=n)[0] for n in (12, 5)], make_ids(2, 6)
    ids, mask = left_pad(rows)
    cache = model.new_cache()
    prompt = model(ids, mask, past_key_values=cache).logits
    chunk = model(more, F.pad(mask, (0, 6), value=1), past_key_values=cache).logits
    for i, row in enumerate(rows):
        alone = model(torch.cat((row, more[i]))[None], use_cache=False).logits[0]
        assert_close(prompt[i, mask[i] == 1], alone[: len(row)])
        assert_close(chunk[i], alone[len(row) :])


@backbones
def test_generation_is_the_argmax_of_full_passes(make_model, make_ids, left_pad, memory):
    """With the default cache, without one, and row by row."""
    model = make_model(memory=memory)
    rows = [make_ids(1, n, seed=n)[0] for n in (12, 5, 1)]
    ids, mask = left_pad(rows)
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    tokens = model.generate(ids, **settings)[:, 12:]
    assert torch.equal(tokens, model.generate(ids, use_cache=False, **settings)[:, 12:])
    for row, new in zip(rows, tokens, strict=True):
        for token in new:
            assert model(row[None], use_cache=False).logits[0, -1].argmax() == token
            row = torch.cat((row, token[None]))


@backbones
def test_beam_search_with_the_default_cache_is_beam_search_without(
    make_model, make_ids, left_pad, memory
):
    model = make_model(memory=memory)
    ids, mask = left_pad([make_ids(1, 12)[0], make_ids(1, 7)[0]])
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "num_beams": 2}
    tokens = model.generate(ids, **settings)
    assert torch.equal(tokens, model.generate(ids, use_cache=False, **settings))
    assert not torch.equal(tokens, model.generate(ids, **settings | {"num_beams": 1}))


def test_a_cache_decodes_with_its_own_engine_only(make_model, make_ids):
    model, ids = make_model(), make_ids(1, 30)
    cache = model.new_cache(Engine(Quest(4, 2)))
    model(ids[:, :29], past_key_values=cache)
    sparse = model(ids[:, 29:], past_key_values=cache).logits
    assert not torch.allclose(sparse, model(ids, use_cache=False).logits[:, 29:])
    assert cache.engine.usage.fractions(1) < 0.3


def test_a_reset_cache_starts_over(make_model, make_ids):
    model, ids = make_model(), make_ids(2, 30)
    engine = Engine(layers := Layers(layers=(PyramidKV(top_k=12, window=4),), names=("pyramidkv",)))
    engine.for_layer(0)  # before a cache sets the number of layers
    cache, runs = model.new_cache(engine), []
    for rows in (2, 2, 1):  # another batch
        out = [model(part, past_key_values=cache).logits for part in ids[:rows].split(29, 1)]
        runs.append((*out, cache.engine.usage.fractions(rows)))
        slots = torch.stack(cache.engine.usage.slots)[:, 0].tolist()
        assert slots == [layers.layers[0].k(i, len(slots)) for i in range(len(slots))]
        cache.reset()
        assert cache.get_seq_length() == 0
    torch.testing.assert_close(runs[1], runs[0], rtol=0, atol=0)
    torch.testing.assert_close(runs[2], tuple(x[:1] for x in runs[0]))


@pytest.mark.parametrize("how", ["forward", "generate"])
def test_a_foreign_cache_is_refused(make_model, make_ids, how):
    model, ids = make_model(), make_ids(1, 5)
    call, settings = (model, {}) if how == "forward" else (model.generate, {"max_new_tokens": 2})
    with pytest.raises(TypeError, match="SparseCache, not DynamicCache; pass past_key_values="):
        call(ids, past_key_values=DynamicCache(), **settings)


def test_cropping_is_refused(make_model):
    with pytest.raises(ValueError, match="cannot be cropped.*run the shorter prompt again"):
        make_model().new_cache().crop(3)


def test_training_mode_keeps_no_cache(make_model, make_ids):
    model, ids = make_model(), make_ids(1, 5)
    assert model(ids).past_key_values is not None
    assert model.train()(ids).past_key_values is None
