"""Every method against its definition in plain Python (brute_force.py), and what all must keep."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from brute_force import seen
from brute_force_evicting import kept
from engine_runs import attend, attend_by_hand, states
from plain_python import rows_of

from ratplus_exp.budget import Budget
from ratplus_exp.methods import Dense, Dilated, Engine, MoBA, Quest, SnapKV
from ratplus_exp.methods import engine as engine_module
from ratplus_exp.methods.evicting import H2O, TOVA
from ratplus_exp.methods.exact import TopKBlocks, TopKTokens
from ratplus_exp.methods.expected_attention import ExpectedAttention
from ratplus_exp.methods.kascade import Shared
from ratplus_exp.methods.keydiff import KeyDiff
from ratplus_exp.methods.snapkv import AdaKV, PyramidKV
from ratplus_exp.methods.sparq import SparQ
from ratplus_exp.methods.streaming import StreamingLLM
from ratplus_exp.methods.twilight import Twilight
from ratplus_exp.methods.union import MoBADilated, QuestDilated
from ratplus_exp.methods.vertical_slash import VerticalSlash
from ratplus_exp.methods.xattention import XAttention
from ratplus_exp.models.cache_layer import ROOM
from ratplus_kernels.selection import inner_products

# A new method adds its line here. Its definition in brute_force.py makes these tests independent of
# its own score; a method that selects tokens or has a pattern needs one.
METHODS = [
    Dense(),
    Quest(block_size=4, top_k=4),
    Quest(block_size=8, top_k=2),
    MoBA(block_size=4, top_k=4),
    MoBA(block_size=8, top_k=2),
    SnapKV(top_k=12, window=4),
    SnapKV(top_k=12, window=4, pooling="max", kernel=7),
    SnapKV(top_k=12, window=4, kernel=1),
    Dilated(dilation=4, local=2, initial=1),
    Dilated(dilation=0, local=3, initial=2),
    Dilated(dilation=4),
    StreamingLLM(initial=2, local=5),
    TopKTokens(top_k=8),
    TopKBlocks(block_size=4, top_k=4),
    QuestDilated(block_size=4, top_k=3, dilation=5),
    MoBADilated(block_size=4, top_k=3, dilation=5),
    KeyDiff(top_k=12),
    AdaKV(top_k=12, window=4),
    PyramidKV(top_k=12, window=4, beta=1),
    ExpectedAttention(top_k=12),
    TOVA(top_k=12),
    H2O(top_k=12, window=4),
    SparQ(top_k=8, channels=0.5),
    SparQ(top_k=8, channels=0.5, mean_value=False),
    Twilight(top_k=5, page=4, candidates=2),
    Shared(top_k=8),
    XAttention(block_size=4, top_k=4, stride=2),
    VerticalSlash(top_k=12, window=4),
]
every_method = pytest.mark.parametrize("method", METHODS, ids=str)
selecting = pytest.mark.parametrize("method", [m for m in METHODS if m.phase], ids=str)

STEPS = 7  # decoded tokens: from inside a block into the next
BATCHES = {"alike": [30, 30, 30], "of different length": [30, 9, 17]}  # 9: less than SnapKV keeps
batches = pytest.mark.parametrize("prompts", BATCHES.values(), ids=BATCHES)


@every_method
@pytest.mark.parametrize("kv_heads", [2, 4], ids=["GQA", "MHA"])
@batches
def test_attends_as_defined(method, kv_heads, prompts):
    q, k, v = states(kv_heads)
    out, _ = attend(Engine(method), q, k, v, prompts, STEPS)
    wanted = attend_by_hand(method, q, k, v, prompts, STEPS)
    torch.testing.assert_close(out, wanted, equal_nan=True)


@selecting
@pytest.mark.parametrize("kv_heads", [2, 4], ids=["GQA", "MHA"])
@batches
def test_selects_by_other_keys_than_it_attends_to(method, kv_heads, prompts):
    q, k, v = states(kv_heads)
    _, other, _ = states(kv_heads, seed=1)
    out, cache = attend(Engine(method), q, k, v, prompts, STEPS, select_by=other)
    wanted = attend_by_hand(method, q, k, v, prompts, STEPS, select_by=other)
    torch.testing.assert_close(out, wanted, equal_nan=True)
    own, _ = attend(Engine(method), q, k, v, prompts, STEPS)
    all_forced = method.top_k == method.forced
    assert torch.allclose(own, wanted, equal_nan=True) == all_forced
    assert (cache.layers[0].select_by is None) == (method.phase not in ("decode", "step"))


@selecting
def test_scores_of_bf16_are_not_rounded_to_it(method):
    # The kernels' are not, and hit rates and oracles must rank as they do.
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 3, 4, 8, generator=generator).bfloat16()
    width = 8 * (1 + method.reads_values)
    k = torch.randn(1, 2, 6, method.block_size, width, generator=generator).bfloat16()
    r = method.represent(k if method.unit == "block" else k.flatten(2, 3))
    scores = method.score(q, r)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, method.score(q.double(), r.double()).float())


# Sums of exponentials tie exactly only where all are equal, so SnapKV gets no periodic keys.
TIES = [
    (method, data)
    for data, units in {"equal": ("block", "token"), "periodic": ("block",)}.items()
    for method in METHODS
    if method.phase and method.unit in units
]


@pytest.mark.parametrize(("method", "data"), TIES, ids=str)
def test_ties_go_to_the_lowest_index(method, data):
    q, k, v = states(2, data=data)
    out, _ = attend(Engine(method), q, k, v, [30, 9, 17], STEPS)
    wanted = attend_by_hand(method, q, k, v, [30, 9, 17], STEPS)
    torch.testing.assert_close(out, wanted, equal_nan=True)


@every_method
@batches
def test_usage_is_the_counted_fraction(method, prompts):
    q, k, v = states(2)
    engine = Engine(method)
    attend(engine, q, k, v, prompts, STEPS)
    last = torch.tensor([prompt + i for i, prompt in enumerate(prompts)])  # rows end at their own
    wanted = {True: [], False: []}
    for i, row in enumerate(rows_of(q, k, v, prompts, STEPS)):
        sparse = {  # by phase; a pattern holds throughout
            "prefill": range(row.prompt),
            "decode": range(row.prompt, row.prompt + STEPS),
            "once": range(row.prompt, row.prompt + STEPS),
            "step": range(row.prompt, row.prompt + STEPS),
            None: range(row.prompt + STEPS),
        }[method.phase]
        for cut in wanted:
            those = [t for t in sparse if not cut or t <= last[i]]
            attended = sum(len(seen(method, row, head, t)) for t in those for head in range(4)) / 4
            wanted[cut].append(attended / sum(t + 1 for t in those))
    assert engine.usage.fractions(3).tolist() == pytest.approx(wanted[False], rel=1e-6)
    assert engine.usage.fractions(3, last).tolist() == pytest.approx(wanted[True], rel=1e-6)
    assert (engine.usage.fractions(3) == 1).all() == (method == Dense())


@selecting
@batches
def test_enough_for_everything_is_dense(method, prompts):
    q, k, v = states(2)
    engine = Engine(replace(method, top_k=80))
    out, _ = attend(engine, q, k, v, prompts, STEPS)
    dense, _ = attend(Engine(), q, k, v, prompts, STEPS)
    torch.testing.assert_close(out, dense, equal_nan=True)
    assert (engine.usage.fractions(3) == 1).all()


@selecting
def test_less_than_what_is_always_kept_is_refused(method):
    least = max(method.forced, 1)
    replace(method, top_k=least).validate()
    with pytest.raises(ValueError, match="raise the budget") as error:
        replace(method, top_k=least - 1).validate()
    problem = f"always keeps {method.forced} {method.unit}s, but its budget gives only {least - 1}:"
    assert problem in str(error.value)


def test_what_selects_nothing_needs_no_budget():
    Dense(top_k=0).validate()
    Dilated(top_k=0).validate()


@pytest.mark.parametrize("method", [m for m in METHODS if type(m) is SnapKV], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_snapkv_stores_exactly_what_it_keeps(method, kv_heads):
    q, k, v = states(kv_heads)
    prompts = [30, 9, 17]
    _, cache = attend(Engine(method), q, k, v, prompts, 0)
    layer = cache.layers[0]
    assert layer.keys.shape[2] == layer.values.shape[2] == method.top_k + ROOM
    for b, row in enumerate(rows_of(q, k, v, prompts, 0)):
        for head in range(kv_heads):
            where = kept(method, row, head)
            assert torch.equal(layer.keys[b, head, : len(where)], k[b, head, where])
            assert torch.equal(layer.values[b, head, : len(where)], v[b, head, where])


def test_snapkv_keeps_a_lone_spike_with_its_neighbours():
    k = torch.zeros(1, 1, 30, 4, dtype=torch.float64)
    k[0, 0, 10] = 9  # all mass on one token
    q = torch.ones(1, 1, 30, 4, dtype=torch.float64)
    for pooling, kernel, reach in [("avg", 5, 2), ("max", 7, 3), ("avg", 1, 0)]:
        method = SnapKV(top_k=4 + 2 * reach + 1, window=4, pooling=pooling, kernel=kernel)
        slots = Engine(method).keep(q, k, k, 0)[0][0, 0].tolist()
        assert slots == [*range(10 - reach, 10 + reach + 1), 26, 27, 28, 29]


def test_dilated_pattern_of_p2():
    def sees(query, **sizes):
        pattern = Dilated(**sizes).pattern(torch.tensor(query), torch.arange(query + 1))
        return pattern.nonzero()[:, 0].tolist()

    assert sees(9, dilation=4, local=1, initial=1) == [0, 3, 7, 8, 9]
    assert sees(7, dilation=4, local=0, initial=0) == [3, 7]
    assert sees(6, dilation=4, local=0, initial=0) == [3, 6]
    assert sees(6, dilation=0, local=2, initial=2) == [0, 1, 4, 5, 6]


@pytest.mark.parametrize("chunk", [1, 7, 30])
def test_prompt_queries_may_be_selected_for_in_chunks(monkeypatch, chunk):
    q, k, v = states(2)
    whole, _ = attend(Engine(MoBA(4, 3)), q, k, v, [30, 9, 17], 0)
    monkeypatch.setattr(engine_module, "QUERY_CHUNK", chunk)
    parts, _ = attend(Engine(MoBA(4, 3)), q, k, v, [30, 9, 17], 0)
    torch.testing.assert_close(parts, whole, equal_nan=True)


@pytest.mark.parametrize("length", [1, 3, 4, 5])
@every_method
def test_prompts_shorter_than_a_block_or_a_window(method, length):
    q, k, v = states(2, batch=1, length=length + 2)
    out, _ = attend(Engine(method), q, k, v, [length], 2)
    torch.testing.assert_close(out, attend_by_hand(method, q, k, v, [length], 2))


@pytest.mark.parametrize("method", [m for m in METHODS if type(m) is not VerticalSlash], ids=str)
def test_what_follows_a_query_never_matters(method):
    """Or its block, where the queries of a block choose together."""
    q, k, v = states(2)
    out, _ = attend(Engine(method), q, k, v, [30, 9, 17], 0)
    k2, v2 = k.clone(), v.clone()
    size = method.block_size if method.by_query_block else 1
    ends = [-(-end // size) * size for end in (22, 5, 15)]
    for b, end in enumerate(ends):
        k2[b, :, end:], v2[b, :, end:] = 99.0, 99.0
    changed, _ = attend(Engine(method), q, k2, v2, [30, 9, 17], 0)
    for b, end in enumerate([22, 5, 15]):
        torch.testing.assert_close(changed[b, :, :end], out[b, :, :end])


def test_h2o_keeps_half_of_its_size_for_the_newest_unless_a_window_is_set():
    assert H2O(top_k=12).window == 6 and H2O(top_k=12, window=4).window == 4
    assert H2O().with_budget(Budget.parse("1/4"), 64).window == 8


@pytest.mark.parametrize("heads", [1, 3])
def test_scores_of_a_group_are_those_of_its_heads(heads):
    q, k = torch.randn(2, 2, heads, 5, 8).bfloat16(), torch.randn(2, 2, 1, 7, 8).bfloat16()
    found = inner_products(q, k)
    by_head = torch.einsum("bkgqd,bkxnd->bkgqn", q.double(), k.double())
    assert found.dtype == torch.float32 and found.shape == by_head.shape
    torch.testing.assert_close(found.double(), by_head, rtol=1e-5, atol=1e-5)
