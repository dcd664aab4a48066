"""stage=reads against attention that is weighed head by head, step by step."""

import math
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
import torch

from ratplus_exp.config import forms_of, method_of
from ratplus_exp.methods import Dense, Engine, Quest, SnapKV
from ratplus_exp.models.loading import load_model, load_tokenizer
from ratplus_exp.stages.reads import _remove
from ratplus_exp.store import Store
from ratplus_exp.tasks import Ruler
from ratplus_exp.tasks.sample import golden_answer

LENGTH, REACH = 128, 8
REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "outputs/reference/pocket/models/ratplus/0"  # a random model reads nothing


def run(job, method, budget, selector="topk", first="decode", more=""):
    grid = f"{{method: {method}, budget: {budget}, selector: {selector}{more}}}"
    fields = {
        "stage": "reads",
        "stage.models": "[]",
        "stage.trainings": "[0]",
        "stage.workers": 1,
        "+stage.cells.mine": grid,
        "method": method,
        "budget": budget,
        "data.length": LENGTH,
        "data.block_size": 8,
        "data.window": 8,
        "data.tasks": "[S-1,MV]",
        "data.examples": 3,
        "data.batch_size": 2,
        "data.first_token": first,
    }
    return job("~stage.cells.selectors", *(f"{key}={value}" for key, value in fields.items()))


class Spy(Engine):
    def decode(self, states, layer):
        self.seen[layer].append((states.q[0], states.k[0]))
        return super().decode(states, layer)


def by_hand(cfg, model, tokenizer, sample):
    """reads, on_token, lost, echoes of one sample, by layer; and of each value, by step, reads and
    lost reads. One token a step, one row a batch."""
    answer, calls = golden_answer(sample, tokenizer), []
    fed = int(cfg.data.first_token == "decode")
    ids = torch.tensor([[*sample.input_ids, *answer.ids[:-1]]])
    layers = range(model.config.num_hidden_layers)

    def record(layer, rows, positions, selected):
        calls.append((layer, int(positions[0, 0]), selected[0].flatten(0, 1)[:, 0]))

    method, spy = method_of(cfg), Spy(Dense())
    spy.seen = [[] for _ in layers]
    for engine in (Engine(method, recorder=record), spy):
        cache, prompt = model.new_cache(engine), sample.length - fed
        with torch.inference_mode():
            model(ids[:, :prompt], past_key_values=cache)
            for t in range(prompt, ids.shape[1] - 1):
                model(ids[:, t : t + 1], past_key_values=cache)
    sums = torch.zeros(4, len(layers), dtype=torch.float64)
    steps = {}
    for layer in layers:
        for token, places, value in answer.steps(fed):
            step = steps.setdefault(value, {}).setdefault(token, [0, 0])
            at = sample.length + token - 1
            q, k = spy.seen[layer][token - 1 + fed]
            for head in range(len(q)):
                k_of = k[head * len(k) // len(q), : at + 1].double()
                weights = (k_of @ q[head, 0].double() / math.sqrt(k.shape[-1])).softmax(0)
                near = {t for p in places for t in range(p, p + REACH + 1) if t < sample.length}
                if not near or sum(weights[t] for t in near) <= 0.5:
                    continue
                sums[0, layer] += 1
                step[0] += 1
                sums[1, layer] += sum(weights[p] for p in places)
                (chosen,) = (
                    chosen[head * len(chosen) // len(q)]
                    for where, position, chosen in calls
                    if where == layer and (method.phase == "once" or position == at)
                )
                left = {
                    t: float(weights[t])
                    for t in range(at + 1)
                    if t // method.block_size >= len(chosen) or chosen[t // method.block_size]
                }
                rest = sum(left.values())
                lost = sum(left.get(t, 0) for t in near) <= 0.1 * rest
                sums[2, layer] += lost
                step[1] += int(lost)
                answered = sum(x for t, x in left.items() if t >= sample.length)
                sums[3, layer] += lost and answered > 0.5 * rest
    return sums, [[*steps[value].values()] for value in sorted(steps) if value >= 0]


@pytest.mark.parametrize(
    ("method", "first"), [("quest", "prefill"), ("snapkv", "decode"), ("h2o", "decode")]
)
def test_reads_are_those_of_a_model_stepped_by_hand(job, method, first):
    cfg = run(job, method, "1/8", first=first)
    model, tokenizer = load_model(FOLDER, torch.device("cpu")), load_tokenizer(FOLDER)
    ruler, total, shares = Ruler(tokenizer, LENGTH, forms=forms_of(cfg)), 0, []
    for cell in Store(job.folder / "results").cells("reads"):
        values = []
        for index, record in enumerate(cell.records().values()):
            sample = ruler.sample(cell.key["task"], 0, index)
            expected, steps = by_hand(cfg, model, tokenizer, sample)
            assert record["steps"] == steps, sample.id
            values += [[2 * lost > reads for reads, lost in value] for value in steps]
            for name, row in zip(("reads", "on_token", "lost", "echoes"), expected, strict=True):
                assert record[name] == pytest.approx(row.tolist(), abs=1e-3), (sample.id, name)
            total += expected
        ends = ([v[0] for v in values], [v[-1] for v in values], [any(v) for v in values])
        shares.append([100 * sum(x) / len(x) for x in ends])
    reads, on_token, lost, echoes = total.sum(1).tolist()
    assert 0 < on_token < reads and 0 < echoes < lost < reads
    (row,) = pd.read_csv(job.folder / "job" / "reads.csv").to_dict("records")
    assert row["Reads"] == reads
    assert row["Lost"] == pytest.approx(100 * lost / reads, abs=0.06)
    means = [sum(x) / len(x) for x in zip(*shares, strict=True)]
    assert [row[x] for x in ("First step", "Last step", "Any step")] == pytest.approx(
        means, abs=0.06
    )
    assert 0 < means[2] < 100


def test_random_selection_loses_reads_and_a_whole_budget_none(job):
    lost = {}
    for budget in ("1/4", "1/1"):
        run(job, "quest", budget, "random")
        (row,) = pd.read_csv(job.folder / "job" / "reads.csv").to_dict("records")
        lost[budget] = row["Lost"]
    assert lost["1/4"] > 5 and lost["1/1"] == 0


@pytest.mark.parametrize("method", ["quest", "snapkv"])
def test_a_selection_leaves_its_tokens_to_all_heads_of_a_group(method):
    """Rows 0 and 2 of three, 4 query heads on 2 KV heads, 3 steps, blocks of 2 tokens of 9."""
    kind, rows = {"quest": Quest(2), "snapkv": SnapKV()}[method], torch.tensor([0, 2])
    once, generator = method == "snapkv", torch.Generator().manual_seed(0)
    shape = (2, 2, 1, 1, 7) if once else (2, 2, 2, 4, 5)  # R, K, G, Q, N
    selected = torch.rand(shape, generator=generator) > 0.5
    steps = torch.tensor([[-1]] * 2 if once else [[-1, 0, 1, 2], [-2, -1, 0, 1]])
    left = torch.ones(3, 4, 3, 9, dtype=torch.bool)
    _remove(left, kind, rows, steps, selected)
    for row, head, step, token in product(range(3), range(4), range(3), range(9)):
        number = [0, 2].index(row) if row != 1 else None
        if number is None or (once and token >= 7) or (not once and step not in steps[number]):
            expected = True
        elif once:
            expected = selected[number, head // 2, 0, 0, token]
        else:
            query = steps[number].tolist().index(step)
            expected = selected[number, head // 2, head % 2, query, token // 2]
        assert left[row, head, step, token] == expected


@pytest.mark.parametrize(
    ("method", "message"), [("moba", "decodes densely"), ("sparq", "attends to more than")]
)
def test_methods_that_attend_to_more_than_a_selection_are_refused(job, method, message):
    with pytest.raises(ValueError, match=f"stage=reads can't measure {method}: .*{message}"):
        run(job, method, "1/4")


@pytest.mark.parametrize(
    ("more", "field"),
    [
        (", blocks: [8, 16]", "block_size"),
        (", selector_seed: [0, 1]", "selector_seed"),
    ],
)
def test_cells_of_one_row_are_refused_before_they_are_measured(job, more, field):
    with pytest.raises(ValueError, match=f"stage=reads averages .*differ in .*{field}"):
        run(job, "quest", "1/4", "random", more=more)
    assert not any(Store(job.folder / "results").cells())
