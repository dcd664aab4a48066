"""What single methods ask of the engine beside a score, each against loops."""

from __future__ import annotations

import pytest
import torch
from brute_force import seen
from brute_force_evicting import held
from engine_runs import attend, states
from plain_python import rows_of

from ratplus_exp.methods import (
    Dense,
    Engine,
    MoBA,
    Oracle,
    Quest,
    Random,
    SnapKV,
    States,
    Step,
    TopK,
)
from ratplus_exp.methods.evicting import H2O, TOVA
from ratplus_exp.methods.kascade import Shared
from ratplus_exp.methods.snapkv import AdaKV, PyramidKV
from ratplus_exp.methods.sparq import SparQ
from ratplus_exp.models.cache import SparseCache

PROMPTS, STEPS = [30, 9, 17], 7
stepwise = pytest.mark.parametrize("method", [TOVA(top_k=12), H2O(top_k=12, window=4)], ids=str)


def test_a_layer_takes_over_the_selection_of_its_anchor():
    method, parts = Shared(top_k=6, every=2), [states(2), states(2, seed=1)]
    cache, batch = SparseCache(2, Engine(method)), len(parts[0][0])
    chooser, own = (rows_of(*part, [30] * batch, STEPS) for part in parts)
    for start, end in [(0, 30), *((t, t + 1) for t in range(30, 30 + STEPS))]:
        step = Step(torch.arange(start, end).expand(batch, -1))
        for layer, part in enumerate(parts):
            out = cache.attend(layer, States(*(x[:, :, start:end] for x in part), step))
        cache.advance(step, batch)
        for b, head in ((b, head) for b in range(batch) for head in range(4) if start):
            where, row = seen(method, chooser[b], head, start), own[b]
            assert len(where) == method.top_k
            assert out[b, head, 0].tolist() == pytest.approx(row.attend(head, start, where))


def test_a_pyramid_keeps_less_in_later_layers_and_the_budget_on_average():
    method = PyramidKV(top_k=32, window=8)
    assert [method.k(layer, 4) for layer in range(4)] == [55, 40, 24, 9]
    cache = SparseCache(4, Engine(PyramidKV(top_k=12, window=4)), room=0)
    q, k, v = states(2)
    for layer in range(4):
        cache.attend(layer, States(q, k, v, Step(torch.arange(37)[None])))
    assert [layer.keys.shape[2] for layer in cache.layers] == [20, 15, 9, 4]


def test_heads_that_share_a_budget_keep_it_on_average_and_their_floor():
    method = AdaKV(top_k=12, window=4, floor_share=0.5)
    _, cache = attend(Engine(method), *states(4), [30, 30, 30], 0)
    kept = (cache.layers[0].held < 30).sum(-1)
    assert (kept.sum(-1) == 4 * 12).all() and (kept >= 6).all()
    assert len(kept.unique()) > 1
    assert cache.layers[0].width == kept.max() and (cache.layers[0].held[..., 30:] > 99).all()


@pytest.mark.parametrize(
    ("method", "numbers"),
    [
        (Dense(), lambda t: 0),
        (SnapKV(top_k=12, window=4), lambda t: 0),
        (Quest(4, 3), lambda t: (t // 4 + 1) * 8 + 2 * 3),  # D = 4: minima, maxima; three indices
        (MoBA(4, 3), lambda t: (t // 4 + 1) * 4 + 2 * min(3, t // 4 + 1)),
        (SparQ(top_k=8, channels=0.5), lambda t: (t + 1) * 2 + 2 * 8),
        (Shared(top_k=8), lambda t: (t + 1) * 4 + 2 * 8),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_choosing_reads_is_counted(method, numbers):
    engine = Engine(method)
    attend(engine, *states(2), PROMPTS, STEPS)
    for found, prompt in zip(engine.usage.choosing_fractions(3).tolist(), PROMPTS, strict=True):
        steps = range(prompt) if method.phase == "prefill" else range(prompt, prompt + STEPS)
        dense = 2 * 4 * sum(t + 1 for t in steps)
        assert found == pytest.approx(sum(map(numbers, steps)) / dense)


@stepwise
def test_steps_take_no_more_memory(method):
    _, cache = attend(Engine(method), *states(2), PROMPTS, STEPS)
    assert cache.layers[0].keys.shape[2] == cache.layers[0].held.shape[2] == method.top_k + 1


@stepwise
@pytest.mark.parametrize("selector", ["random", "oracle"])
def test_a_selector_decides_who_leaves(method, selector):
    q, k, v = states(2)
    gold = torch.zeros(3, 30, dtype=torch.bool)
    gold[:, 2:5] = True
    chooser = Oracle(gold) if selector == "oracle" else Random(torch.tensor([5, 6, 7]))
    out, fractions = {}, []
    for one in (TopK(), chooser):
        seen_at = []
        engine = Engine(method, one, lambda *x, seen_at=seen_at: seen_at.append(x[3].clone()))
        out[type(one)], _ = attend(engine, q, k, v, PROMPTS, STEPS)
        fractions.append(engine.usage.fractions(3))
        kept = torch.stack([x[:, :, 0, 0, 2:5].all() for x in seen_at if len(x) == 3])
        assert kept.all() == isinstance(one, Oracle)
    assert torch.equal(*fractions)
    assert not torch.allclose(*out.values(), equal_nan=True)
    if selector == "random":
        alone, _ = attend(
            Engine(method, chooser.rows(torch.tensor([2]))), q[2:], k[2:], v[2:], [17], 7
        )
        torch.testing.assert_close(alone, out[Random][2:], equal_nan=True)


@stepwise
def test_what_a_step_attended_to_is_recorded(method):
    q, k, v = states(2, batch=1)
    calls = []
    attend(Engine(method, recorder=lambda *x: calls.append(x)), q, k, v, [30], STEPS)
    [row] = rows_of(q, k, v, [30], STEPS)
    assert [x[2].tolist() for x in calls] == [[[29]], *([[t]] for t in range(30, 30 + STEPS))]
    for step, (_, _, _, selected) in enumerate(calls[1:]):
        for head in range(2):
            tokens = selected[0, head, 0, 0].nonzero()[:, 0].tolist()
            assert tokens == sorted(held(method, row, head)[step])
