"""stage=look: what the page says that heads keep, against the queries and keys themselves and the
records of stage=hit_rate."""

import inspect
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

    def spy(name):
        original = getattr(Engine, name)
        signature = inspect.signature(original)

        def call(self, *args, **named):
            given = signature.bind(self, *args, **named).arguments
            if self.recorder is not None:
                states = given["states"]
                first = int(states.step.positions[0, 0])
                seen = (name, given["layer"], states.q[0], states.k[0].clone(), first)
                runs.setdefault(id(self), (self, []))[1].append(seen)
            return original(self, *args, **named)

        monkeypatch.setattr(Engine, name, call)

    spy("decode")
    spy("prefill")
    job("stage=look", *look(pair), "stage.methods=[dense,quest,moba,snapkv]")
    page = (job.folder / "job" / "look.html").read_text()
    (data,) = re.findall(r'<script type="application/json" id=data>(.*?)</script>', page)
    assert (job.folder / "job" / "look.png").stat().st_size > 10_000
    return json.loads(data), list(runs.values())


def look(pair):
    """The fixture's overrides without those of a sweep."""
    return [x for x in pair if "workers" not in x] + BUDGET + ["stage.task=MK-3"]


def best_blocks(method, query, keys, t):
    """Quest's or MoBA's blocks of the query at position t, one after the other."""
    size, own, scores = method.block_size, t // method.block_size, []
    for block in range(1, own):
        here = keys[block * size : (block + 1) * size]
        if type(method).__name__ == "MoBA":
            scores.append((float(query @ here.mean(0)), block))
        else:
            bound = torch.maximum(query * here.amin(0), query * here.amax(0)).sum()
            scores.append((float(bound), block))
    chosen = [block for _, block in sorted(scores, reverse=True)[: method.top_k - 2]]
    return sorted({0, own, *chosen})


def test_the_page_shows_what_each_head_selects(looked, tiny_models):
    data, runs = looked
    methods = ["dense", "Quest", "MoBA", "SnapKV"]
    assert [view["method"] for view in data["views"]] == methods * 2
    compared = 0
    for name, called in (("Quest", "decode"), ("MoBA", "prefill")):
        views = [view for view in data["views"] if view["method"] == name]
        own = [run for run in runs if type(run[0].method).__name__ == name]
        for view, (engine, calls) in zip(views, own, strict=True):
            assert view["layers"] == 2 and len(view["steps"]) > 3
            for step in view["steps"]:
                rows, t = iter(step["kept"]), step["query"]
                for layer in range(2):
                    ((q, k, first),) = states(calls, layer, called, t)
                    for query, keys in zip(q[:, t - first], k, strict=True):
                        assert next(rows) == best_blocks(engine.method, query, keys, t)
                        compared += 1
                assert next(rows, None) is None
    assert compared > 50
    check_marks(data, tiny_models)


def states(calls, layer, called, query):
    """(q, k, position of the first query) of the calls in which a layer saw a query."""
    return [
        (q, k, first)
        for name, where, q, k, first in calls
        if (name, where) == (called, layer) and first <= query < first + q.shape[1]
    ]


def test_heads_that_hold_the_answer_are_those_of_the_hit_rate_record(looked, job, pair):
    data, _ = looked
    name = job.folder.name.replace("-", "_")
    settings = [x for x in look(pair) if not x.startswith(("stage", "pair"))]
    for number, view in enumerate(data["views"]):
        if view["method"] not in ("Quest", "SnapKV"):
            continue
        backbone, method = ("attention", "ratplus")[number // 4], view["method"].lower()
        chosen = [f"model={name}_{backbone}", f"method={method}", "data.examples=1"]
        job("stage=hit_rate", *settings, *chosen, "data.first_token=decode")
        cells = Store(job.folder / "results").cells("hit_rate")
        (cell,) = [x for x in cells if (x.key["backbone"], x.key["method"]) == (backbone, method)]
        (record,) = cell.records().values()
        held = [
            all(
                any(place // view["size"] in step["kept"][row] for place in places)
                for step in view["steps"]
                for places in step["gold"]
            )
            for row in range(4)
        ]
        assert np.ravel(record["hits"]).tolist() == held


def check_marks(data, tiny_models):
    """Gold positions, needle, question, steps and memory."""
    said = "".join(data["tokens"][t] for t in data["gold"]).strip()
    answer = "".join(data["tokens"][data["prompt"] :]).strip()
    assert said == answer and len(data["gold"]) == 16
    ((start, end),) = data["needles"]
    assert start < min(data["gold"]) and max(data["gold"]) == end - 2  # between key and period
    asked = "".join(data["tokens"][data["question"] : data["prompt"]])
    key = "".join(data["tokens"][start : min(data["gold"])]).strip()
    assert asked.strip() == f"what is the uuid of {key}? {key}"
    for view in data["views"]:
        for step in view["steps"] if view["method"] == "Quest" else []:
            ((place,),) = step["gold"]
            assert data["tokens"][place] == data["tokens"][step["query"] + 1]
    tokenizer = load_tokenizer(tiny_models["ratplus"])
    ids = tokenizer("".join(data["tokens"][: data["prompt"]]), return_tensors="pt").input_ids
    found = gate_statistics(load_model(tiny_models["ratplus"], torch.device("cpu")), ids)
    (memory,) = data["memories"]
    assert np.mean(memory["gates"]) == pytest.approx(found["gate_mean"], abs=1e-3)
    lengths = np.mean(memory["lengths"])
    assert lengths == pytest.approx(found["effective_memory_length"], abs=1e-2)
