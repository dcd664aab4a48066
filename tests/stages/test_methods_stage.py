"""stage=methods: every method at equal budgets, in one table and one figure."""

import json

import pandas as pd
import pytest

from ratplus_exp.analysis import sample_scores, tidy
from ratplus_exp.stages import evaluate
from ratplus_exp.store import Store

CHOICE = ["stage.selecting=[quest,tova]", "stage.budgets=[1/4,1/8]", "stage.random_examples=2"]


def test_methods_stand_in_one_table(job, pair, monkeypatch):
    # Untrained models never answer right, so the score is made from the answer's length.
    monkeypatch.setattr(evaluate, "exact", lambda task, text, answers: len(text) % 5 / 4)
    job("stage=methods", *pair, "data.tasks=[S-1,MV]", *CHOICE)
    table = pd.read_csv(job.folder / "job" / "methods.csv", keep_default_na=False)
    assert (job.folder / "job" / "methods.png").stat().st_size > 10_000
    store = Store(job.folder / "results")
    scores, cells = sample_scores(store), tidy(store)
    assert table["Budget"].tolist() == ["1", *["1/4"] * 3, *["1/8"] * 3]
    for _, row in table.iterrows():
        here = scores[(scores["method"] == row["Method"]) & (scores["budget"] == row["Budget"])]
        means = here.groupby(["selector", "backbone", "task"])["exact"].mean()
        means = 100 * means.groupby(["selector", "backbone"]).mean()
        for backbone in ("Attention", "RAT+"):
            assert float(row[backbone]) == pytest.approx(means["topk", backbone], abs=0.051)
            if row["Method"] in ("quest", "tova"):
                random = float(row[f"{backbone}, random"])
                assert random == pytest.approx(means["random", backbone], abs=0.051)
        same = cells[(cells["method"] == row["Method"]) & (cells["budget"] == row["Budget"])]
        read = same.loc[same["selector"] == "topk", "budget_measured"].mean()
        assert float(row["Read"]) == pytest.approx(read, abs=0.00051)
        assert (float(row["Choosing"]) > 0) == (row["Method"] == "quest")
    job("stage=methods", *pair, "data.tasks=[S-1,MV]", *CHOICE, "stage.models=[pocket_attention]")
    alone = pd.read_csv(job.folder / "job" / "methods.csv", keep_default_na=False)
    assert [x for x in alone if "RAT+" in x or "Δ" in x] == []
    same = alone.set_index(["Budget", "Method"])["Attention"]
    assert same.sort_index().equals(table.set_index(["Budget", "Method"])["Attention"].sort_index())
    job("stage=methods", *pair, "data.tasks=[S-1,MV]", *CHOICE)
    written = pd.read_csv(job.folder / "job" / "cells.csv")
    assert sorted(written["cell"]) == sorted(cells["cell"])
    provenance = json.loads((job.folder / "job" / "provenance.json").read_text())
    assert {x for entry in provenance for x in entry["cells"].values()} == {*cells["cell"]}
    own = ["budget=1/64", "stage.selecting=[quest]", "stage.budgets=[1/4]"]  # 1/64 is too small
    job("stage=methods", *pair, "data.tasks=[S-1,MV]", *CHOICE, *own)
    for _, rows in table.groupby("Budget"):
        assert rows["RAT+"].astype(float).is_monotonic_decreasing
