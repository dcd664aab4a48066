"""Greedy decoding in steps of one shape: what it says, and that its steps can be replayed."""

from __future__ import annotations

import pytest
import torch
from tape import tape
from tiny_models import TINY, backbones, stock_model
from transformers import MistralConfig, MistralForCausalLM

from ratplus_exp.methods import Dense, Dilated, Engine, MoBA, Oracle, Quest, Random, SnapKV
from ratplus_exp.methods.evicting import H2O
from ratplus_exp.methods.snapkv import AdaKV
from ratplus_exp.methods.twilight import Twilight
from ratplus_exp.models import FAMILIES, add_memory, attach_engine
from ratplus_exp.models.decoding import CudaGraphs, greedy
from ratplus_exp.models.prefill import PromptBatch

TOKENS = 11  # over two boundaries of blocks
METHODS = [
    Dense(),
    Quest(block_size=4, top_k=3),
    MoBA(block_size=4, top_k=3),
    SnapKV(top_k=12, window=4),
    Dilated(dilation=4, local=2, initial=1),
    AdaKV(top_k=8, window=4),
    H2O(top_k=12, window=4),
    Twilight(top_k=5, page=4, candidates=2),
]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda x: type(x).__name__)
feds = pytest.mark.parametrize("fed", [0, 1, 4])
both_lengths = pytest.mark.parametrize(
    "lengths", [(22, 22), (22, 9, 17)], ids=["alike", "of different length"]
)


@pytest.fixture
def decode(make_model, make_ids, left_pad):
    """decode(engine, lengths, …): the answers to prompts of these lengths, and the budgets."""

    def run(
        engine, lengths, *, tokens=TOKENS, eos=(), device="cpu", dtype=None, capture=None,
        fed=0, **sizes
    ):  # fmt: skip
        model = make_model(**sizes).to(device, dtype)
        ids, mask = left_pad([make_ids(1, n, seed=n + i)[0] for i, n in enumerate(lengths)])
        ids, mask = ids.to(device), mask.to(device)
        settings = {"eos": eos, "pad": 0, "capture": capture}
        out = greedy(PromptBatch(model, ids, mask, fed), engine, tokens, **settings)
        return out.cpu(), engine.usage.fractions(len(ids))

    return run


@torch.no_grad()
@every_method
@backbones
@feds
@both_lengths
def test_says_what_generate_says(
    make_model, make_ids, left_pad, decode, method, memory, fed, lengths
):
    model = make_model(memory=memory)
    ids, mask = left_pad([make_ids(1, n, seed=n + i)[0] for i, n in enumerate(lengths)])
    engine = Engine(method)
    cache = model.new_cache(engine)
    if fed:
        model(ids[:, :-fed], mask[:, :-fed], past_key_values=cache)
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)
    wanted = wanted[:, ids.shape[1] :]
    assert len(wanted.unique()) > 3
    tokens, fractions = decode(Engine(method), lengths, memory=memory, fed=fed)
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(fractions, engine.usage.fractions(len(ids)))


@pytest.mark.parametrize("capture", [None, tape], ids=["as it is", "replayed"])
def test_ends_with_the_last_row_and_pads_the_others(decode, capture):
    engine, lengths = Engine(Quest(block_size=4, top_k=3)), (22, 9, 17)
    free, _ = decode(engine, lengths)
    eos = int(free[1, 2])
    unseen = int(free.max()) + 1
    wanted = free.clone()
    ends = []
    for row in wanted:
        ends += [i for i, token in enumerate(row.tolist()) if token == eos][:1] or [TOKENS - 1]
        row[ends[-1] + 1 :] = 0
    assert min(ends) <= 2
    tokens, _ = decode(engine, lengths, eos=(unseen, eos), capture=capture)
    assert torch.equal(tokens, wanted[:, : max(ends) + 1])


SELECTORS = {
    "topk": None,
    "random": Random(torch.tensor([5, 6, 7])),
    "oracle": Oracle(torch.arange(22) % 7 == torch.tensor([[1], [2], [3]])),
    "oracle in one head": Oracle(torch.arange(22) % 7 == torch.tensor([[1], [2], [3]]), ((1, 0),)),
}


@pytest.mark.parametrize(
    ("method", "selector"),
    [(m, name) for m in METHODS for name in SELECTORS if m.phase or name == "topk"],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
@backbones
@feds
def test_replayed_steps_say_the_same(decode, method, memory, fed, selector):
    chooser = {"selector": SELECTORS[selector]} if SELECTORS[selector] else {}
    setting = {"lengths": (22, 9, 17), "memory": memory, "fed": fed}
    wanted, budgets = decode(Engine(method, **chooser), **setting)
    calls = []

    def capture(step):
        replay = tape(step)
        return lambda: calls.append(1) or replay()

    tokens, fractions = decode(Engine(method, **chooser), **setting, capture=capture)
    assert len(calls) == TOKENS - 2
    assert torch.equal(tokens, wanted)
    assert torch.equal(fractions, budgets)
    assert len(wanted.unique()) > 3


@pytest.mark.parametrize(
    "fields",
    [
        {"memory_kind": "conv"},
        {"memory_kind": "shift"},
        {"memory_kind": "ema_fixed"},
        {"memory_kind": "ema_fixed", "memory_on": "select"},
    ],
    ids=str,
)
def test_replayed_steps_of_other_memories_say_the_same(decode, fields):
    setting = {"lengths": (22, 9, 17), **fields}
    wanted, _ = decode(Engine(Quest(block_size=4, top_k=3)), **setting)
    tokens, _ = decode(Engine(Quest(block_size=4, top_k=3)), **setting, capture=tape)
    assert torch.equal(tokens, wanted)


# Small, since the interpreter is slow.
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "tokens": 5}


def test_steps_through_kernels_can_be_replayed(decode, triton_device):
    setting = {"lengths": (15, 9), "device": triton_device, "dtype": torch.float32, **SIZES}
    wanted, budgets = decode(Engine(METHODS[1]), **setting)
    capture = CudaGraphs() if triton_device.type == "cuda" else tape
    tokens, fractions = decode(Engine(METHODS[1]), **setting, capture=capture)
    assert torch.equal(tokens, wanted)
    assert torch.equal(fractions, budgets)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "change"),
    [(family, attach_engine) for family in (*sorted(FAMILIES), "phi3")]
    + [(family, add_memory) for family in sorted(FAMILIES)],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_steps_of_other_models_can_be_replayed(make_ids, family, change):
    model = change(stock_model(family, torch.float64)).eval()
    ids, mask = make_ids(2, 22), torch.ones(2, 22)
    mask[1, :9] = 0
    wanted, out = (
        greedy(PromptBatch(model, ids, mask), Engine(METHODS[1]), 6, eos=[], pad=0, capture=capture)
        for capture in (None, tape)
    )
    assert torch.equal(out, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_method
@backbones
@both_lengths
def test_a_gpu_replays_its_graph(decode, method, memory, lengths, dtype, recwarn):
    setting = {"lengths": lengths, "device": "cuda", "memory": memory, "dtype": dtype}
    wanted, budgets = decode(Engine(method), **setting)
    graphs = CudaGraphs()
    for _ in range(3):  # each graph in the memory of the one before
        tokens, fractions = decode(Engine(method), **setting, capture=graphs)
        assert torch.equal(tokens, wanted)
        assert torch.equal(fractions, budgets)
    assert not [x for x in recwarn if "CUDA graphs" in str(x.message)]


@pytest.mark.parametrize("capture", [None, tape, "failing"], ids=["as it is", "tape", "failing"])
def test_every_token_is_counted_once(make_model, make_ids, monkeypatch, capture):
    """Whatever has been counted when a capture fails."""
    model, engine = make_model(), Engine(METHODS[1])
    cache = model.new_cache(engine, room=TOKENS)
    monkeypatch.setattr(model, "new_cache", lambda *_, **__: cache)

    def failing(step):
        cache.seen += 1
        engine.usage.add(torch.ones(2, 1), torch.ones(2, 1))

    ids = make_ids(2, 22)
    how = {"eos": [], "pad": 0, "capture": failing if capture == "failing" else capture}
    tokens = greedy(PromptBatch(model, ids, torch.ones_like(ids)), engine, TOKENS, **how)
    assert tokens.shape == (2, TOKENS)
    fed = 22 + TOKENS - 1
    assert cache.seen == int(cache.processed[0]) == fed
    attended = torch.cat([x for x, _, _ in engine.usage.counts], 1)
    assert len(attended[0]) == 2 * (TOKENS - 1)  # layers × steps


@pytest.mark.gpu
def test_a_failed_capture_says_why_and_is_the_last(decode, recwarn):
    class Asking(Quest):
        def score(self, queries, representatives):
            assert queries.sum().item() != 0
            return super().score(queries, representatives)

    graphs = CudaGraphs()
    setting = {"lengths": (22, 9, 17), "device": "cuda", "dtype": torch.float32}
    wanted, budgets = decode(Engine(Asking(block_size=4, top_k=3)), **setting)
    for _ in range(2):
        engine = Engine(Asking(block_size=4, top_k=3))
        tokens, fractions = decode(engine, **setting, capture=graphs)
        assert torch.equal(tokens, wanted) and torch.equal(fractions, budgets)
    [warning] = [x for x in recwarn if "CUDA graphs" in str(x.message)]
    assert "captur" in str(warning.message)


@pytest.mark.parametrize("what", ["a number", "a list"])
def test_a_tape_refuses_what_a_graph_cannot_hold(decode, what):
    class Asking(Quest):
        def score(self, queries, representatives):
            if what == "a number":
                assert queries.sum().item() != 0
                return super().score(queries, representatives)
            return super().score(queries, representatives) + torch.tensor([1.0, 1.0])[0]

    with pytest.raises(RuntimeError, match="while recording"):
        decode(Engine(Asking(block_size=4, top_k=3)), (22, 9, 17), capture=tape)


@torch.no_grad()
@pytest.mark.parametrize("capture", [None, tape], ids=["as it is", "replayed"])
def test_an_answer_that_may_outgrow_a_sliding_window_is_refused(make_ids, capture):
    model = attach_engine(MistralForCausalLM(MistralConfig(**TINY, sliding_window=24)).eval())
    ids, how = make_ids(1, 20), {"eos": [], "pad": 0, "capture": capture}
    prompts = PromptBatch(model, ids, torch.ones_like(ids))
    assert greedy(prompts, Engine(), 4, **how).shape == (1, 4)
    with pytest.raises(ValueError, match="window of 24 tokens only, and the context has 25"):
        greedy(prompts, Engine(), 5, **how)


@torch.no_grad()
@every_method
def test_a_cache_with_room_stays_where_it_is_and_takes_no_more(make_model, make_ids, method):
    model, ids = make_model(), make_ids(2, 22)
    cache = model.new_cache(Engine(method), room=4)

    def places():
        names = ("keys", "values", "memory_state", "representatives")
        tensors = [getattr(layer, name) for layer in cache.layers for name in names]
        tensors += [cache.processed, cache.prompt]
        return [None if x is None else (x.data_ptr(), x.shape) for x in tensors]

    model(ids, past_key_values=cache)
    model(ids[:, :1], past_key_values=cache)
    before = places()
    for i in range(3):
        model(ids[:, i : i + 1], past_key_values=cache)
        assert places() == before
    with pytest.raises(ValueError, match="room for 4 tokens after the prompt only"):
        model(ids[:, :1], past_key_values=cache)
