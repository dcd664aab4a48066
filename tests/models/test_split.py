"""The split protocol: what is selected before the question doesn't depend on it."""

import pytest
import torch

from ratplus_exp.methods import Engine, MoBA, Quest, SnapKV
from ratplus_exp.models.decoding import greedy
from ratplus_exp.models.prefill import PromptBatch

CONTEXT, ASKED, TOKENS = 19, 4, 5
SNAPKV = SnapKV(top_k=10, window=4)


def kept(model, ids, fed, method=SNAPKV):
    """Which tokens each layer and head keeps."""
    calls = []
    engine = Engine(method, recorder=lambda layer, rows, at, selected: calls.append(selected))
    answer = greedy(
        PromptBatch(model, ids, torch.ones_like(ids), fed), engine, TOKENS, eos=(), pad=0
    )
    return torch.stack(calls), answer


@pytest.mark.parametrize("memory", [False, True])
def test_snapkv_selects_before_the_question_is_known(make_model, make_ids, memory):
    model = make_model(memory=memory)
    context = make_ids(2, CONTEXT)
    prompts = [torch.cat((context, make_ids(2, ASKED, seed=9 + i)), 1) for i in range(2)]
    whole, split = ([kept(model, ids, fed) for ids in prompts] for fed in (0, ASKED))
    assert not torch.equal(whole[0][0], whole[1][0])
    assert torch.equal(split[0][0], split[1][0])
    assert not torch.equal(split[0][1], split[1][1])  # the answers do depend on it
    alone, _ = kept(model, context, 0)
    assert torch.equal(split[0][0], alone)


@torch.no_grad()
@pytest.mark.parametrize("method", [SNAPKV, Quest(block_size=4, top_k=3)], ids=["snapkv", "quest"])
@pytest.mark.parametrize("memory", [False, True])
def test_the_question_runs_under_the_method_token_by_token(make_model, make_ids, method, memory):
    model, ids = make_model(memory=memory), make_ids(2, CONTEXT + ASKED)
    cache = model.new_cache(Engine(method))
    model(ids[:, :CONTEXT], past_key_values=cache)
    token, answer = ids[:, CONTEXT : CONTEXT + 1], []
    for step in range(1, ASKED + TOKENS):
        logits = model(token, past_key_values=cache).logits
        token = ids[:, CONTEXT + step, None] if step < ASKED else logits[:, -1:].argmax(-1)
        answer += [token] if step >= ASKED else []
    engine = Engine(method)
    prompts = PromptBatch(model, ids, torch.ones_like(ids), ASKED)
    found = greedy(prompts, engine, TOKENS, eos=(), pad=0)
    assert torch.equal(found, torch.cat(answer, 1))
    wanted = cache.engine.usage.fractions(2)
    torch.testing.assert_close(engine.usage.fractions(2), wanted)


@torch.no_grad()
def test_moba_is_the_same_under_both_protocols(make_model, make_ids):
    """A context token's blocks are its own choice, which no later token takes part in."""
    model, context = make_model(), make_ids(1, CONTEXT)
    engine = Engine(MoBA(block_size=4, top_k=3))
    first, second = (
        model(torch.cat((context, make_ids(1, ASKED, seed=i)), 1), engine=engine).logits
        for i in (3, 4)
    )
    torch.testing.assert_close(first[:, :CONTEXT], second[:, :CONTEXT])
    assert not torch.allclose(first[:, CONTEXT:], second[:, CONTEXT:])
