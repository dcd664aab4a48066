"""stage=look: what the page says that heads keep, against the queries and keys themselves and against
the records of stage=hit_rate."""

import json
import re

import numpy as np
import pytest
import torch

from ratplus_exp.memory import gate_statistics
from ratplus_exp.methods import Engine
from ratplus_exp.models.loading import load_model, load_tokenizer
from ratplus_exp.store import Store

BUDGET = ["budget=1/4", "data.tasks=[MK-3]"]


@pytest.fixture
def looked(job, pair, monkeypatch):
    """What look.html draws, and of each run along the right answer its (layer, q, k, positions)."""
    runs = {}

    def spy(name, where):
        original = getattr(Engine, name)

        def call(self, q, k, v, positions, *rest, **named):
            layer = ([positions, *rest][where], q[0], k[0], positions)
            if self.recorder is not None:
                runs.setdefault(id(self), (self, name, []))[2].append(layer)
            return original(self, q, k, v, positions, *rest, **named)

        monkeypatch.setattr(Engine, name, call)

    spy("decode", 2)
    spy("prefill", 1)
    job("stage=look", *look(pair), "stage.methods=[dense,quest,moba,snapkv]")
    page = (job.folder / "job" / "look.html").read_text()
    (data,) = re.findall(r'<script type="application/json" id=data>(.*?)</script>', page)
    assert (job.folder / "job" / "look.png").stat().st_size > 10_000
    return json.loads(data), list(runs.values())


def look(pair):
    """The fixture's overrides without those of a sweep."""
    return [x for x in pair if "workers" not in x] + BUDGET + ["stage.task=MK-3"]


def best_blocks(method, query, keys, own):
    """Quest's or MoBA's blocks of a query in block `own`, one after the other."""
    size = method.block_size
    scores = []
    for block in range(1, own):
        here = keys[block * size : (block + 1) * size]
        if type(method).__name__ == "MoBA":
            scores.append((float(query @ here.mean(0)), block))
        else:
            bound = torch.maximum(query * here.amin(0), query * here.amax(0)).sum()
            scores.append((float(bound), block))
    chosen = [block for _, block in sorted(scores, reverse=True)[: method.top_k - 2]]
    return sorted({0, own, *chosen})


def test_the_page_shows_what_each_head_selects(looked):
    data, runs = looked
    assert [view["method"] for view in data["views"]] == ["dense", "quest", "moba", "snapkv"] * 2
    compared = 0
    for method, called, name in (("quest", "decode", "Quest"), ("moba", "prefill", "MoBA")):
        views = [view for view in data["views"] if view["method"] == method]
        own = {}
        for engine, kind, calls in runs:
            if type(engine.method).__name__ == name:
                own.setdefault(id(engine), (engine.method, []))[1].extend(calls)
        for view, (settings, calls) in zip(views, own.values(), strict=True):
            assert view["layers"] == 2 and len(view["steps"]) > 3
            for step in view["steps"]:
                rows = iter(step["kept"])
                for layer in range(2):
                    for q, k, first in states(calls, layer, called, step["query"]):
                        for head in range(len(q)):
                            query = q[head, step["query"] - first]
                            block = step["query"] // settings.block_size
                            assert next(rows) == best_blocks(settings, query, k[head], block)
                            compared += 1
    assert compared > 50


def states(calls, layer, called, query):
    """(q, k, position of the first query) of the call in which a layer saw a query."""
    for where, q, k, positions in calls:
        first = int(positions[0, 0]) if called == "decode" else 0
        decoding = torch.is_tensor(positions) and positions.dim() == 2
        if where == layer and decoding == (called == "decode") and query - first < q.shape[1]:
            yield q, k, first


@pytest.mark.parametrize("method", ["quest", "snapkv"])
def test_heads_that_hold_the_answer_are_those_of_the_hit_rate_record(looked, job, pair, method):
    data, _ = looked
    names = [view["name"] for view in data["views"] if view["method"] == method]
    for number, name in enumerate(("attention", "ratplus")):
        model = [x for x in pair if x.startswith("hydra")]
        option = f"model={job.folder.name.replace('-', '_')}_{name}"
        settings = [x for x in look(pair) if not x.startswith("stage.") and x not in model]
        hits = ["stage=hit_rate", "stage.first_token=decode", f"method={method}", option]
        job(*model, *settings, *hits, "data.examples=1")
    cells = {
        cell.key["backbone"]: cell.records()
        for cell in Store(job.folder / "results").cells("hit_rate")
    }
    assert len(names) == len(cells) == 2
    for view in data["views"]:
        if view["method"] != method:
            continue
        (record,) = cells["ratplus" if "RAT+" in view["name"] else "attention"].values()
        held = [
            all(
                any(p // view["size"] in step["kept"][row] for p in places)
                for step in view["steps"]
                for places in step["gold"]
            )
            for row in range(4)
        ]
        assert np.ravel(record["hits"]).tolist() == held


def test_the_marked_positions_are_the_answers(looked, tiny_models):
    data, _ = looked
    said = "".join(data["tokens"][t] for t in data["gold"]).strip()
    answer = "".join(data["tokens"][data["prompt"] :]).strip()
    assert said == answer and len(data["gold"]) > 4
    ((start, end),) = data["needles"]
    assert (
        start < min(data["gold"]) and max(data["gold"]) < end - 1
    )  # its key before, a period behind
    asked = "".join(data["tokens"][data["question"] : data["prompt"]])
    key = "".join(data["tokens"][start : min(data["gold"])]).strip()
    assert asked.strip() == f"what is {key}"
    for view in data["views"]:
        for step in view["steps"] if view["method"] == "quest" else []:
            assert data["tokens"][step["gold"][0][0]] == step["label"]
            assert data["tokens"][step["query"] + 1] == step["label"]
    tokenizer = load_tokenizer(tiny_models["ratplus"])
    ids = tokenizer("".join(data["tokens"][: data["prompt"]]), return_tensors="pt").input_ids
    found = gate_statistics(load_model(tiny_models["ratplus"], torch.device("cpu")), ids)
    (memory,) = data["memories"]
    assert np.mean(memory["gates"]) == pytest.approx(found["gate_mean"], abs=1e-3)
    lengths = np.mean(memory["lengths"])
    assert lengths == pytest.approx(found["effective_memory_length"], abs=1e-2)
