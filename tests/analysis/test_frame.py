"""From a filled store to frames."""

from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from accuracy_cells import DENSE, add

from ratplus_exp.analysis import sample_scores, tidy
from ratplus_exp.analysis.frame import COLUMNS
from ratplus_exp.report.results import Results


def test_tidy_has_a_row_for_each_finished_cell(store):
    add(store, "ratplus", "MK-2", 7)
    add(store, "attention", "S-1", 9, **DENSE)
    with store.cell({"stage": "eval", "task": "S-2"}).open({}) as unfinished:
        unfinished.append([{"id": "a"}])
    frame = tidy(store)
    assert list(frame.columns) == [*COLUMNS] and len(frame) == 2
    row = frame[frame["task"] == "MK-2"].iloc[0]
    assert (row["backbone"], row["budget"], row["n"]) == ("RAT+", "1/16", 10)
    assert (row["exact"], row["substring"]) == (70.0, 50.0)
    dense = frame[frame["method"] == "dense"].iloc[0]
    assert dense["budget"] == "1" and pd.isna(dense["block_size"])


@pytest.mark.parametrize(
    "key", [{"seed": 2**63}, {"seed": 0.5}, {"top_k": 10**30}, {"method": None}]
)
def test_a_cell_that_cannot_be_meant_is_named_and_spoils_no_other(store, capsys, key):
    add(store, "ratplus", "MK-2", 7)
    good = tidy(store)["cell"].tolist()
    add(store, "ratplus", "MK-2", 7, **key)
    assert tidy(store)["cell"].tolist() == sample_scores(store)["cell"].unique().tolist() == good
    (bad,) = (cell for cell in store.cells() if cell.id not in good)
    assert f"warning: {bad.path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "was", "now"),
    [
        ("samples.jsonl", '"exact": 1.0, ', ""),
        ("samples.jsonl", '"substring": 0.5', '"substring": "0.5"'),
        ("metrics.json", '"exact": 70.0', '"exact": "abc"'),
    ],
)
def test_a_value_that_is_no_number_spoils_its_cell_alone(store, capsys, name, was, now):
    for task in ("MK-2", "MK-3"):
        add(store, "ratplus", task, 7)
    bad, good = store.cells()
    text = (bad.path / name).read_text()
    assert was in text
    (bad.path / name).write_text(text.replace(was, now, 1))
    assert tidy(store)["cell"].tolist() == [good.id]
    assert sample_scores(store)["cell"].unique().tolist() == [good.id]
    assert f"warning: {bad.path / name} has an invalid value" in capsys.readouterr().err


def test_an_empty_store_has_empty_frames_with_the_same_columns(store):
    assert list(tidy(store).columns) == [*COLUMNS]
    assert sample_scores(store).empty and "exact" in sample_scores(store)
    with pytest.raises(ValueError, match="no finished cells with tier=pocket"):
        Results.read(store, {"tier": "pocket"})


def test_sample_scores_pair_by_id(store):
    add(store, "ratplus", "MK-2", 7)
    add(store, "attention", "MK-2", 4)
    add(store, "attention", "MK-3", 4)
    frame = sample_scores(store, task=["MK-2"])
    wide = frame.pivot(index="id", columns="backbone", values="exact")
    assert len(wide) == 10 and (wide["RAT+"] - wide["Attention"]).sum() == 3
    with pytest.raises(ValueError, match="no column 'typo'"):
        sample_scores(store, typo=1)


def test_a_report_parses_the_samples_and_metrics_of_a_cell_once(store, monkeypatch):
    add(store, "ratplus", "MK-2", 7)
    opened, read = Path.open, []

    def reading(path, *args, **how):
        read.append(path.name)
        return opened(path, *args, **how)

    monkeypatch.setattr(Path, "open", reading)
    results = Results.read(store, {})
    assert len(results.cells) == 1 and len(results.samples) == 10
    # config.json is read to list the cell, and again with the cell's other files.
    assert Counter(read) == {"samples.jsonl": 1, "metrics.json": 1, "done": 1, "config.json": 2}
