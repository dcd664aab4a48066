"""One prefill for many methods gives what each one's own prefill gives, bit for bit."""

from __future__ import annotations

import pytest
import torch
from tiny_models import stock_model

from ratplus_exp.methods import Dense, Dilated, Engine, MoBA, Oracle, Quest, Random, SnapKV
from ratplus_exp.methods.evicting import H2O, TOVA
from ratplus_exp.methods.expected_attention import ExpectedAttention
from ratplus_exp.methods.kascade import Shared
from ratplus_exp.methods.snapkv import AdaKV, PyramidKV
from ratplus_exp.methods.sparq import SparQ
from ratplus_exp.methods.twilight import Twilight
from ratplus_exp.methods.vertical_slash import VerticalSlash
from ratplus_exp.methods.xattention import XAttention
from ratplus_exp.models import attach_engine
from ratplus_exp.models.decoding import greedy
from ratplus_exp.models.prefill import PromptBatch

TOKENS, WINDOW = 5, 6
METHODS = [
    Dense(),
    Quest(block_size=4, top_k=3),
    Quest(block_size=8, top_k=2),
    SnapKV(top_k=12, window=4),
    SnapKV(top_k=8, window=6, pooling="max", kernel=3),
    SnapKV(top_k=40, window=4),  # keeps all
    AdaKV(top_k=8, window=4),
    TOVA(top_k=12),
    MoBA(block_size=4, top_k=3),
    Dilated(dilation=4, local=2, initial=1),
]
IN_PIECES = [
    *METHODS[2:],
    PyramidKV(top_k=12, window=4),
    ExpectedAttention(top_k=8),
    H2O(top_k=12, window=4),
    Shared(top_k=8),
    SparQ(top_k=8),
    Twilight(top_k=8, page=4, candidates=2),
    XAttention(block_size=4, top_k=3, stride=2),
    VerticalSlash(top_k=12, window=8),
]
GOLD = torch.arange(22) % 7 == torch.tensor([[1], [2], [3]])
SELECTORS = {
    "topk": {},
    "random": {"selector": Random(torch.tensor([5, 6, 7]))},
    "oracle": {"selector": Oracle(GOLD)},
    "oracle in one head": {"selector": Oracle(GOLD, ((1, 0),))},
}
feds = pytest.mark.parametrize("fed", [0, 1, 4])
rows = pytest.mark.parametrize("lengths", [(22,) * 3, (22, 5, 17)], ids=["alike", "padded"])


def answers(prompts, method, chooser):
    """Tokens and usage without and with a recorder, and every row's selections."""

    def record(layer, rows, positions, selected):
        positions = positions.expand(len(rows), -1).tolist()
        for row, where, chosen in zip(rows.tolist(), positions, selected, strict=True):
            calls[layer, row, *where] = chosen.clone()

    calls, out = {}, []
    for recorder in (None, record):  # without a recorder a method goes its fast path
        engine = Engine(method, recorder=recorder, **SELECTORS[chooser])
        out.append(greedy(prompts, engine, TOKENS, eos=[], pad=0))
        usage = engine.usage
        out += [usage.fractions(3), usage.choosing_fractions(3), torch.stack(usage.slots)]
    return [*out, *(calls[place] for place in sorted(calls))]


@torch.no_grad()
@rows
@feds
@pytest.mark.parametrize(
    "fields",
    [
        {"memory": False},
        {"memory": True},
        {"num_key_value_heads": 4},
        {"memory_kind": "ema_fixed", "memory_on": "select"},
        {"memory_kind": "conv"},
        "llama",
    ],
    ids=str,
)
def test_a_shared_prefill_changes_nothing(make_model, make_ids, left_pad, lengths, fed, fields):
    if fields == "llama":
        model = attach_engine(stock_model("llama", torch.float32)).eval()
    else:
        model = make_model(**fields)
    ids, mask = left_pad([make_ids(1, n, seed=n + i)[0] for i, n in enumerate(lengths)])
    shared = PromptBatch(model, ids, mask, fed, shared=(WINDOW, TOKENS))
    for method in METHODS:
        for chooser in SELECTORS if method.phase else ["topk"]:
            own = answers(PromptBatch(model, ids, mask, fed), method, chooser)
            found = answers(shared, method, chooser)
            assert len(own) == len(found) and len(own[0].unique()) > 2
            for a, b in zip(own, found, strict=True):
                assert torch.equal(a, b), (method, chooser)


@torch.no_grad()
@rows
@pytest.mark.parametrize("fields", [{}, {"memory_kind": "ema_fixed", "memory_on": "select"}])
def test_rows_in_pieces_give_what_they_give_together(
    make_model, make_ids, left_pad, monkeypatch, lengths, fields
):
    model = make_model(memory=True, **fields).double()
    ids, mask = left_pad([make_ids(1, n, seed=n + i)[0] for i, n in enumerate(lengths)])
    for method in IN_PIECES:
        for chooser in ("topk", "random"):
            for shared in (None, (WINDOW, TOKENS)):
                monkeypatch.setattr("ratplus_exp.models.prefill.PIECE", 1 << 30)
                whole = answers(PromptBatch(model, ids, mask, shared=shared), method, chooser)
                monkeypatch.setattr("ratplus_exp.models.prefill.PIECE", 1)
                pieces = answers(PromptBatch(model, ids, mask, shared=shared), method, chooser)
                assert len(whole) == len(pieces), method
                for a, b in zip(whole, pieces, strict=True):
                    assert torch.equal(a, b), (method, chooser)


def test_the_model_reads_the_prompts_once(make_model, make_ids, monkeypatch):
    """But for methods with a prefill of their own."""
    model, ids = make_model(), make_ids(3, 22)
    read, forward = [], model.forward
    monkeypatch.setattr(
        model, "forward", lambda ids, *a, **k: read.append(ids) or forward(ids, *a, **k)
    )
    prompts = PromptBatch(model, ids, torch.ones_like(ids), shared=(WINDOW, TOKENS))
    for method in METHODS:
        greedy(prompts, Engine(method), TOKENS, eos=[], pad=0)
    assert sum(x.shape[1] == 22 for x in read) == 1 + 2


def test_methods_say_whether_their_prefill_is_dense():
    class Own(Quest):
        def attend_prefill(self, states):
            return None

    assert [m.dense_prefill for m in METHODS] == [True] * 8 + [False] * 2
    assert not Own().dense_prefill


def test_a_prefill_keeps_no_larger_tensors_alive(make_model, make_ids):
    """Such as the projection that values are a share of."""
    model, ids = make_model(memory=False), make_ids(2, 22)
    prompts = PromptBatch(model, ids, torch.ones_like(ids), shared=(WINDOW, TOKENS))
    prompts.prefill(model.new_cache(Engine()))
    prefilled, _ = prompts._prefilled
    for layer in prefilled.layers:
        for states in (layer.keys, layer.values, layer.queries):
            assert states.untyped_storage().nbytes() == states.numel() * states.element_size()
        assert layer.queries.shape[2] == WINDOW
