"""Every method through the whole model: cache, generation and padded batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_methods import every_method
from torch.testing import assert_close

from ratplus_exp.methods import Dense, Engine, Quest, Random, SnapKV

backbones = pytest.mark.parametrize("memory", [False, True], ids=["attention", "ratplus"])
TOKENS = 7


@pytest.fixture(params=[2, 4], ids=["GQA", "MHA"])
def kv_heads(request):
    return request.param


def decode(model, ids, prompt, engine, at_once=1):
    """Logits of all positions: the prompt in one pass, then `at_once` tokens a pass."""
    cache = model.new_cache(engine)
    parts = [ids[:, :prompt], *ids[:, prompt:].split(at_once, dim=1)]
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)


def generate(model, ids, engine, mask=None, count=TOKENS):
    """Logits (B, count, V) of greedy generation, and the tokens, both on the CPU."""
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        past_key_values=model.new_cache(engine),
        max_new_tokens=count,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(out.logits, dim=1).cpu(), out.sequences[:, ids.shape[1] :].cpu()


@torch.no_grad()
@backbones
@every_method
def test_prefill_and_decode_with_full_k_equal_one_forward_pass(
    make_model, make_ids, memory, kv_heads, method
):
    model, ids = make_model(memory=memory, num_key_value_heads=kv_heads), make_ids(2, 30)
    method = replace(method, top_k=100)
    whole = model(ids, use_cache=False, engine=Engine(method)).logits
    assert_close(decode(model, ids, 21, Engine(method)), whole)
    if method.phase:
        assert_close(whole, model(ids, use_cache=False).logits)


@torch.no_grad()
@backbones
@every_method
def test_several_tokens_at_once_equal_one_at_a_time(make_model, make_ids, memory, method):
    model, ids = make_model(memory=memory), make_ids(2, 32)
    one = decode(model, ids, 21, Engine(method))
    assert_close(decode(model, ids, 21, Engine(method), at_once=6), one)
    dense = decode(model, ids, 21, Engine())
    assert torch.allclose(one, dense) == (method == Dense())


@torch.no_grad()
@backbones
@every_method
def test_left_padded_rows_generate_what_they_generate_alone(
    make_model, make_ids, left_pad, memory, kv_heads, method
):
    model = make_model(memory=memory, num_key_value_heads=kv_heads)
    rows = [make_ids(1, n, seed=n)[0] for n in (26, 9, 17)]
    ids, mask = left_pad(rows)
    logits, tokens = generate(model, ids, Engine(method), mask)
    for i, row in enumerate(rows):
        alone, alone_tokens = generate(model, row[None], Engine(method))
        assert_close(logits[i : i + 1], alone)
        assert torch.equal(tokens[i : i + 1], alone_tokens)


@torch.no_grad()
@pytest.mark.parametrize("method", [Quest(4, 3), SnapKV(top_k=12, window=4)], ids=str)
def test_random_selection_of_a_padded_row_is_its_own(make_model, make_ids, left_pad, method):
    model, seeds = make_model(), torch.tensor([3, 4, 5])
    rows = [make_ids(1, n, seed=n)[0] for n in (26, 9, 17)]
    ids, mask = left_pad(rows)
    logits, _ = generate(model, ids, Engine(method, Random(seeds)), mask)
    for i, row in enumerate(rows):
        alone, _ = generate(model, row[None], Engine(method, Random(seeds[i : i + 1])))
        assert_close(logits[i : i + 1], alone)


@torch.no_grad()
@every_method
def test_beams_follow_their_own_cache(make_model, make_ids, method):
    """Beam search reorders the cache; a beam's score must be that of its tokens decoded alone."""
    model, ids = make_model(), make_ids(1, 17)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=model.new_cache(Engine(method)),
        max_new_tokens=TOKENS,
        do_sample=False,
        num_beams=3,
        num_return_sequences=3,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    assert len(out.sequences.unique(dim=0)) == 3
    for sequence, score in zip(out.sequences, out.sequences_scores, strict=True):
        alone = decode(model, sequence[None], 17, Engine(method))[0, 16:-1].log_softmax(-1)
        by_hand = alone.gather(1, sequence[17:, None]).sum()
        assert_close(score.double(), by_hand, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@every_method
@pytest.mark.parametrize("how", ["reorder_cache", "batch_select_indices", "repeat"])
def test_rows_of_a_cache_keep_their_state_when_they_move(make_model, make_ids, method, how):
    """Once decoding has filled a block: until then the beams of a search share all blocks."""
    model, ids = make_model(), make_ids(3, 31)
    rows = torch.tensor([0, 0, 1, 1, 2, 2] if how == "repeat" else [2, 0, 2])
    cache = model.new_cache(Engine(method))
    for part in ids[:, :25].split([17] + [1] * 8, dim=1):
        model(part, past_key_values=cache)
    if how == "repeat":
        cache.batch_repeat_interleave(2)
    else:
        getattr(cache, how)(rows)
    moved = [model(ids[rows, t : t + 1], past_key_values=cache).logits for t in range(25, 31)]
    assert_close(torch.cat(moved, dim=1), decode(model, ids, 17, Engine(method))[rows, 25:])
