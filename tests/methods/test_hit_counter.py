"""The hit counter against loops over positions."""

import pytest
import torch

from ratplus_exp.methods import Quest, SnapKV
from ratplus_exp.methods.hits import HitCounter


def by_hand(selected, golden_of, owners, size):
    """selected[a]: chosen candidates of answer token a; golden_of[a]: its positions."""
    values = sorted({owner for owner in owners if owner >= 0})
    found = 0
    for value in values:
        steps = [a for a, owner in enumerate(owners) if owner == value]
        found += all(any(p // size in selected[a] for p in golden_of[a]) for a in steps)
    return len(values), found


@pytest.mark.parametrize("seed", range(5))
def test_quest_counts_each_step_with_its_own_selection(seed):
    rng = torch.Generator().manual_seed(seed)
    batch, layers, kv, group, answers, size, length = 3, 2, 2, 2, 5, 4, 24
    blocks = 8
    lengths = torch.tensor([24, 21, 18])
    owners = [[-1, 0, 0, -1, 1], [-1, 0, 0, 1, 1], [-1, 0, -1, -1, -1]]
    golden = torch.zeros(batch, answers, length, dtype=torch.bool)
    for row, tokens in enumerate(owners):
        for a, owner in enumerate(tokens):
            if owner >= 0:
                golden[row, a, torch.randint(0, 18, (2,), generator=rng)] = True
    counter = HitCounter(Quest(size, 4), golden, lengths, layers)
    chosen = torch.rand(layers, batch, kv, group, answers - 1, blocks, generator=rng) < 0.6
    positions = lengths[:, None] + torch.arange(answers - 1)  # query i predicts token i + 1
    for layer in range(layers):
        for q in range(answers - 1):  # one call a step, as in generation
            step = chosen[layer][..., q : q + 1, :]
            counter(layer, torch.arange(batch), positions[:, q : q + 1], step)
    counts, hits = counter.values(owners)
    for row, tokens in enumerate(owners):
        places = [golden[row, a].nonzero()[:, 0].tolist() for a in range(answers)]
        for layer in range(layers):
            for head in range(kv * group):
                picked = chosen[layer, row, head // group, head % group]
                sets = [set(), *(set(picked[q].nonzero()[:, 0].tolist()) for q in range(4))]
                expected = by_hand(sets, places, tokens, size)
                assert (counts[row], hits[row][layer][head]) == expected


def test_snapkv_holds_one_set_for_all_steps():
    golden = torch.zeros(2, 3, 10, dtype=torch.bool)
    golden[0, 0, 4] = golden[0, 1, 5] = golden[1, 1, 7] = golden[1, 1, 2] = True
    owners = [[0, 0, -1], [-1, 0, -1]]
    counter = HitCounter(SnapKV(top_k=4, window=1), golden, torch.tensor([10, 8]), layers=1)
    kept = torch.zeros(1, 2, 1, 1, 10, dtype=torch.bool)
    kept[0, 0, 0, 0, [4, 5]] = kept[0, 1, 0, 0, [4, 9]] = True
    counter(0, torch.tensor([0]), torch.tensor([[9]]), kept)
    shorter = torch.zeros(1, 2, 1, 1, 8, dtype=torch.bool)
    shorter[0, 1, 0, 0, 2] = True  # one of the two occurrences
    counter(0, torch.tensor([1]), torch.tensor([[7]]), shorter)
    assert counter.values(owners) == ([1, 1], [[[1, 0]], [[0, 1]]])
