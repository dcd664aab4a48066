"""Random and oracle selection, and what the recorder gets."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from engine_runs import attend, states
from plain_python import rows_of

from ratplus_exp.methods import Engine, MoBA, Oracle, Quest, Random, SnapKV, TopK
from ratplus_exp.methods.selectors import Candidates
from ratplus_exp.methods.xattention import XAttention
from ratplus_kernels.selection import select

QUEST = Quest(block_size=4, top_k=6)
N = 16  # blocks; the query stands in the last, so 14 are free and 4 of them are picked
PICKS = 4


def draw(seeds, layer=0, positions=(N * 4 - 1,), heads=4, kv_heads=2, method=QUEST):
    """What Random selects: (B, heads, Q, N) bool."""
    engine = Engine(method, Random(torch.as_tensor(seeds)))
    representatives = engine.block_representatives(torch.zeros(len(seeds), kv_heads, N * 4, 4))
    q = torch.zeros(len(seeds), heads, len(positions), 4)
    positions = torch.tensor(positions).expand(len(seeds), -1)
    return engine.select_blocks(q, representatives, positions, layer).flatten(1, 2)


def test_random_selects_k_in_all_with_the_first_and_the_own_block():
    positions = [3, 7, 20, 26, 27, 28, 63]
    selected = draw(range(50), positions=positions)
    for i, position in enumerate(positions):
        own = position // 4
        chosen = selected[:, :, i]
        assert chosen[..., 0].all() and chosen[..., own].all()
        assert not chosen[..., own + 1 :].any()
        assert (chosen.sum(-1) == min(own + 1, QUEST.top_k)).all()


@pytest.mark.parametrize("phase", ["decode", "once", "prefill"])
def test_random_attends_to_as_much_as_top_k(phase):
    methods = {"decode": QUEST, "once": SnapKV(top_k=12, window=4), "prefill": MoBA(4, 3)}
    method, fractions = methods[phase], []
    for selector in (TopK(), Random(torch.tensor([5, 6, 7]))):
        engine = Engine(method, selector)
        # Prompts end with a block, since the forced own block may be less than a whole one.
        attend(engine, *states(2), [32, 9, 16], 4)
        fractions.append(engine.usage.fractions(3))
    assert method.phase == phase
    assert torch.equal(*fractions)


def test_random_is_uniform_over_blocks_and_over_pairs_of_blocks():
    draws = draw(range(2000)).flatten(0, 2)[:, 1 : N - 1].double()  # (8000, 14)
    free = draws.shape[1]
    together = draws.T @ draws
    for pairs, p in [
        (together.diagonal(), PICKS / free),
        (together[~torch.eye(free, dtype=torch.bool)], PICKS * (PICKS - 1) / free / (free - 1)),
    ]:
        spread = math.sqrt(len(draws) * p * (1 - p))
        assert ((pairs - len(draws) * p).abs() < 5 * spread).all()


@pytest.mark.parametrize("what", ["seed", "layer", "head", "position"])
def test_random_draws_anew_for_another(what):
    """Two independent draws of 4 of 14 share 4 · 4 / 14 blocks on average."""
    seeds = torch.arange(1000)
    if what == "seed":
        a, b = draw(seeds), draw(seeds + 1)
    elif what == "layer":
        a, b = draw(seeds), draw(seeds, layer=1)
    elif what == "head":
        a, b = draw(seeds)[:, [0, 0, 1]], draw(seeds)[:, [1, 2, 3]]  # of one group and of two
    else:
        a, b = draw(seeds), draw(seeds, positions=(N * 4 - 2,))
    shared = (a & b)[..., 1 : N - 1].sum(-1).double()
    wanted = PICKS * PICKS / (N - 2)
    variance = wanted * (1 - PICKS / (N - 2)) * (N - 2 - PICKS) / (N - 3)  # hypergeometric
    assert abs(float(shared.mean()) - wanted) < 5 * math.sqrt(variance / shared.numel())


def test_random_draws_once_for_queries_that_select_together():
    selected = draw(range(50), positions=range(40, 48), method=XAttention(4, 6, stride=2))
    assert torch.equal(selected[:, :, :4], selected[:, :, :1].expand(-1, -1, 4, -1))
    assert not torch.equal(selected[:, :, 4], selected[:, :, 3])


def test_random_ignores_scores():
    scores = torch.randn(2, 2, 2, 3, 9)
    where = Candidates(1, torch.tensor([[3, 4, 5]]), 4)
    selector = Random(torch.tensor([1, 2]))
    assert torch.equal(selector(scores, where), selector(-scores, where))


@pytest.mark.parametrize("method", [QUEST, MoBA(4, 3), SnapKV(top_k=12, window=4)], ids=str)
def test_random_draw_is_the_samples_own_whatever_its_batch(method):
    q, k, v = states(2)
    prompts, seeds = [30, 9, 17], torch.tensor([5, 2**40 + 1, 7])
    together, _ = attend(Engine(method, Random(seeds)), q, k, v, prompts, 4)
    by_score, _ = attend(Engine(method), q, k, v, prompts, 4)
    assert not torch.allclose(together[0], by_score[0], equal_nan=True)
    for b in range(3):
        one = slice(b, b + 1)
        for selector in (Random(seeds[one]), Random(seeds).rows(torch.tensor([b]))):
            alone, _ = attend(Engine(method, selector), q[one], k[one], v[one], prompts[one], 4)
            torch.testing.assert_close(alone, together[one], equal_nan=True)


def test_every_selector_narrows_to_rows():
    rows = torch.tensor([2, 0])
    gold = torch.tensor([[1, 0], [0, 0], [0, 1]], dtype=torch.bool)
    assert Random(torch.tensor([5, 6, 7])).rows(rows).seeds.tolist() == [7, 5]
    assert torch.equal(Oracle(gold).rows(rows).gold, gold[rows])
    assert TopK().rows(rows) == TopK()


class Recorder(list):
    def __call__(self, layer, rows, positions, selected):
        assert selected.dtype == torch.bool
        self.append((layer, rows.clone(), positions.clone(), selected.flatten(1, 2).clone()))


def gold_at(*places, rows=3, length=30):
    gold = torch.zeros(rows, length, dtype=torch.bool)
    for row, position in places:
        gold[row, position] = True
    return gold


GOLD = gold_at((0, 6), (0, 14), (0, 15), (1, 5), (2, 9), (2, 12))  # two blocks of four at most


@pytest.mark.parametrize("method", [Quest(4, 4), MoBA(4, 4)], ids=str)
def test_oracle_always_selects_the_blocks_of_the_gold_tokens(method):
    missed = {}
    for selector in (Oracle(GOLD), TopK()):
        recorder = Recorder()
        engine = Engine(method, selector, recorder)
        attend(engine, *states(2), [30, 9, 17], 7)
        missed[type(selector)] = 0
        for _, _, positions, selected in recorder:
            positions = positions.expand(3, -1)
            for row, position in GOLD.nonzero().tolist():
                behind = positions[row] >= position  # what is ahead cannot be seen
                hit = selected[row, :, behind, position // 4]
                missed[type(selector)] += int((~hit).sum())
    assert missed[Oracle] == 0 < missed[TopK]


def test_oracle_always_keeps_the_gold_tokens():
    method = SnapKV(top_k=12, window=4)
    q, k, v = states(2)
    kept = {
        type(selector): Engine(method, selector).keep(q, k, v, 0)[0]
        for selector in (
            Oracle(gold_at(*itertools.product(range(3), range(9, 17)), length=37)),
            TopK(),
        )
    }
    wanted = torch.tensor([*range(9, 17), 33, 34, 35, 36])
    assert torch.equal(kept[Oracle], wanted.expand(3, 2, 12))
    assert not torch.equal(kept[TopK], kept[Oracle])


def test_oracle_fills_up_with_the_methods_own_choice():
    scores = torch.tensor([5.0, 1, 4, 2, 3, 0]).view(1, 1, 1, 1, 6)
    gold = gold_at((0, 3), rows=1, length=5)  # shorter than six blocks of two: generated tokens
    ranked = Oracle(gold)(scores, Candidates(0, torch.tensor([[11]]), 2))
    chosen = select(ranked, 3, allowed=torch.ones(6, dtype=torch.bool), forced=torch.arange(6) == 5)
    assert chosen.flatten().nonzero()[:, 0].tolist() == [0, 1, 5]  # best, gold, forced


def test_forced_candidates_come_before_gold_ones():
    gold = torch.ones(3, 37, dtype=torch.bool)
    recorder = Recorder()
    attend(Engine(Quest(4, 2), Oracle(gold), recorder), *states(2), [30, 9, 17], 4)
    for _, _, positions, selected in recorder:
        own = (positions // 4)[:, None, :, None].expand(-1, 4, -1, 1)
        assert selected.gather(3, own).all() and selected[..., 0].all()
        assert (selected.sum(-1) == 2).all()


@pytest.mark.parametrize(
    "selector", [TopK(), Random(torch.tensor([5, 6, 7]))], ids=["top", "random"]
)
@pytest.mark.parametrize("method", [Quest(4, 3), MoBA(4, 3)], ids=str)
def test_what_is_recorded_of_blocks_is_what_was_attended(method, selector):
    q, k, v = states(2)
    prompts, steps, recorder = [30, 9, 17], 4, Recorder()
    out, _ = attend(Engine(method, selector, recorder), q, k, v, prompts, steps, layer=1)
    compared = 0
    for layer, _, positions, selected in recorder:
        assert layer == 1
        for b, row in enumerate(rows_of(q, k, v, prompts, steps)):
            for i, t in enumerate(positions.expand(3, -1)[b].tolist()):
                if t >= row.prompt and method.phase == "prefill":
                    continue  # padding
                for head in range(4):
                    blocks = set(selected[b, head, i].nonzero()[:, 0].tolist())
                    where = [j for j in range(t + 1) if j // 4 in blocks]
                    assert out[b, head, t].tolist() == pytest.approx(row.attend(head, t, where))
                    compared += 1
    queries = sum(prompts) if method.phase == "prefill" else 3 * steps
    assert compared == 4 * queries


@pytest.mark.parametrize("selector", [TopK(), Random(torch.tensor([5]))], ids=["top", "random"])
def test_what_is_recorded_of_tokens_is_what_was_kept(selector):
    q, k, v = states(2, batch=1)
    recorder = Recorder()
    engine = Engine(SnapKV(top_k=12, window=4), selector, recorder)
    out, _ = attend(engine, q, k, v, [30], 4, layer=1)
    [(layer, rows, positions, selected)] = recorder
    assert (layer, rows.tolist(), positions.tolist()) == (1, [0], [[29]])
    assert selected.shape == (1, 2, 1, 30)
    [row] = rows_of(q, k, v, [30], 4)
    for head, t in itertools.product(range(4), range(30, 34)):
        where = selected[0, row.kv(head), 0].nonzero()[:, 0].tolist() + list(range(30, t + 1))
        assert out[0, head, t].tolist() == pytest.approx(row.attend(head, t, where))


def test_what_is_recorded_names_the_rows_of_the_batch_even_where_all_is_kept():
    recorder = Recorder()
    attend(Engine(SnapKV(top_k=12, window=4), TopK(), recorder), *states(2), [30, 9, 30], 4)
    told = {tuple(rows.tolist()): selected for _, rows, _, selected in recorder}
    assert set(told) == {(0, 2), (1,)}
    assert told[0, 2].shape[-1] == 30 and (told[0, 2].sum(-1) == 12).all()
    assert told[1,].shape[-1] == 9 and told[1,].all()  # nine tokens fit into twelve


@pytest.mark.parametrize("method", [QUEST, SnapKV(top_k=12, window=4)])
def test_an_oracle_tells_only_the_heads_it_names(method):
    torch.manual_seed(0)
    size = method.block_size
    scores = torch.randn(2, 2, 2 if method is QUEST else 1, 3, 8)
    gold = torch.zeros(2, 8 * size, dtype=torch.bool)
    gold[0, 3 * size], gold[1, 5 * size] = True, True
    positions = torch.full((2, 3), 8 * size - 1)
    first, second = (Candidates(layer, positions, size) for layer in (1, 2))
    everyone = Oracle(gold)(scores, first)
    named = Oracle(gold, ((0, 0), (1, 1)))
    assert torch.equal(named(scores, second), scores)
    told = named.rows(torch.tensor([1]))(scores[1:], first).flatten(1, 2)
    assert torch.equal(told[:, 1], everyone[1:].flatten(1, 2)[:, 1])
    assert torch.equal(told[:, 0], scores[1:].flatten(1, 2)[:, 0])
    assert not torch.equal(everyone, scores)
