"""stage=hit_rate against a model that is stepped by hand, token by token."""

import pandas as pd
import pytest
import torch

from ratplus_exp.config import method_of
from ratplus_exp.methods import Engine
from ratplus_exp.models.loading import load_model, load_tokenizer
from ratplus_exp.store import Store
from ratplus_exp.tasks import Ruler
from ratplus_exp.tasks.sample import target_ids


def small(models, **extra):
    fields = {
        "stage": "hit_rate",
        "model.path": models["ratplus"],
        "model.sha256": "null",
        "budget": "1/2",
        "data.length": 128,
        "data.block_size": 8,
        "data.window": 8,
        "data.first_token": "prefill",
        "data.tasks": "[S-3,MV]",
        "data.examples": 3,
        "data.batch_size": 2,
    } | extra
    return [f"{key}={value}" for key, value in fields.items()]


def by_hand(cfg, model, tokenizer, sample, first):
    """Hit values by (layer, head), one decoding step a token, one row a batch."""
    answer, calls = target_ids(sample, tokenizer), []

    def record(layer, rows, positions, selected):
        for q, position in enumerate(positions[0].tolist()):
            calls.append((layer, position, selected[0].flatten(0, 1)[:, q]))

    method = method_of(cfg)
    cache = model.new_cache(Engine(method, recorder=record))
    ids = torch.tensor([[*sample.input_ids, *answer[:-1]]])
    prompt = sample.length - (first == "decode")
    with torch.inference_mode():
        model(ids[:, :prompt], past_key_values=cache)
        for t in range(prompt, ids.shape[1] - 1):
            model(ids[:, t : t + 1], past_key_values=cache)
    spoken = []  # (token of the answer, its golden positions, its value): found by their text
    cursor = 0
    for number, value in enumerate(sample.answers):
        size = len(tokenizer(" " + value, add_special_tokens=False).input_ids)
        for j in range(size):
            places = [start + j for start, _ in sample.gold_spans[value]]
            spoken.append((cursor + j, places, number))
        cursor += size + 1  # the comma
    hits = {}
    for layer in range(model.config.num_hidden_layers):
        for head in range(model.config.num_attention_heads):
            held = 0
            for number in range(len(sample.answers)):
                steps = [(a, p) for a, p, n in spoken if n == number and (a or first == "decode")]
                good = True
                for a, places in steps:
                    sets = [
                        chosen[head]
                        for where, position, chosen in calls
                        if where == layer
                        and (method.phase == "once" or position == sample.length + a - 1)
                    ]
                    (chosen,) = sets
                    good &= any(bool(chosen[p // method.block_size]) for p in places)
                held += good
            hits[layer, head] = held
    return hits


@pytest.mark.parametrize(("method", "first"), [("quest", "prefill"), ("snapkv", "decode")])
def test_hits_are_those_of_a_model_stepped_by_hand(job, tiny_models, method, first):
    cfg = job(*small(tiny_models, method=method, **{"data.first_token": first}))
    model = load_model(tiny_models["ratplus"], torch.device("cpu"))
    tokenizer = load_tokenizer(tiny_models["ratplus"])
    niah = Ruler(tokenizer, 128, forms=_forms(cfg))
    total = 0
    for cell in Store(job.folder / "results").cells("hit_rate"):
        records = list(cell.records().values())
        for index, record in enumerate(records):
            sample = niah.sample(cell.key["task"], 0, index)
            expected = by_hand(cfg, model, tokenizer, sample, first)
            assert record["values"] == len(sample.answers)
            found = {(i, j): x for i, row in enumerate(record["hits"]) for j, x in enumerate(row)}
            assert found == expected
            total += sum(expected.values())
        rates = cell.metrics()["hit_rate"]
        hits = sum(record["hits"][1][0] for record in records)
        assert rates[1][0] == pytest.approx(100 * hits / cell.metrics()["values"], abs=1e-3)
    assert total > 0
    frame = pd.read_csv(job.folder / "job" / "hit_rate.csv")
    assert len(frame) == 2 * 2 * 2 and set(frame["method"]) == {method}


def _forms(cfg):
    from ratplus_exp.config import forms_of

    return forms_of(cfg)


def test_with_the_whole_budget_every_head_always_hits(job, tiny_models):
    job(*small(tiny_models, budget="1/1", method="quest"))
    for cell in Store(job.folder / "results").cells("hit_rate"):
        assert cell.metrics()["hit_rate"] == [[100, 100], [100, 100]]


@pytest.mark.parametrize(
    ("method", "message"), [("moba", "decodes densely"), ("dense", "a method that selects")]
)
def test_methods_without_a_selection_while_decoding_are_refused(job, tiny_models, method, message):
    with pytest.raises(ValueError, match=message):
        job(*small(tiny_models, method=method))
    assert not list(job.folder.rglob("config.json"))
