import json
import shutil
from dataclasses import replace

import pandas as pd
import pytest
from ruler_file import write_jsonl

from ratplus_exp.analysis import tidy
from ratplus_exp.config import forms_of
from ratplus_exp.models.loading import load_tokenizer
from ratplus_exp.stages import pool, samples
from ratplus_exp.store import Store
from ratplus_exp.tasks import TASKS, Ruler, prompts


def frame(job):
    return tidy(Store(job.folder / "results"))


def small(models, backbone="ratplus", **extra):
    fields = {
        "model": f"pocket_{backbone}",
        "model.path": models[backbone],
        "model.sha256": "null",
        "budget": "1/4",
        "data.length": 128,
        "data.forms.number_digits": 4,
        "data.forms.reserve": 12,
        "data.block_size": 8,
        "data.window": 8,
        "data.first_token": "prefill",
        "data.tasks": "[S-1,MK-2,MV]",
        "data.examples": 3,
        "data.batch_size": 2,
    } | extra
    return [f"{key}={value}" for key, value in fields.items()]


@pytest.mark.parametrize("method", ["dense", "quest", "moba", "snapkv", "dilated"])
def test_a_job_fills_one_cell_a_task_and_writes_its_table(job, tiny_models, method):
    job(*small(tiny_models, method=method, budget="1/4"))
    cells = frame(job)
    assert set(cells["task"]) == {"S-1", "MK-2", "MV"}
    assert set(cells["n"]) == {3}
    assert set(cells["budget"]) == {{"dense": "1", "dilated": "1/8"}.get(method, "1/4")}
    measured = cells["budget_measured"]
    assert (measured == 1).all() if method == "dense" else (measured < 0.6).all()
    assert cells["effective_memory_length"].notna().all()
    for suffix in ("md", "csv", "tex"):
        assert (job.folder / "job" / f"table.{suffix}").stat().st_size


def test_the_other_backbone_has_a_column_for_equally_many_samples(job, tiny_models):
    job(*small(tiny_models, "attention", **{"data.tasks": "[S-1]"}))
    job(*small(tiny_models))
    table = pd.read_csv(job.folder / "job" / "table.csv").set_index("Task")
    assert (table["pocket_attention"] != "—").to_dict() == {
        "S-1": True, "MK-2": False, "MV": False, "Mean": False,
    }  # fmt: skip
    job(*small(tiny_models, **{"data.examples": 2, "data.tasks": "[S-1,MV]", "seed": 1}))
    assert "pocket_attention" not in pd.read_csv(job.folder / "job" / "table.csv")
    job(*small(tiny_models, "attention", **{"data.tasks": "[S-1]", "model.name": "mine"}))
    job(*small(tiny_models))
    table = pd.read_csv(job.folder / "job" / "table.csv")
    assert list(table["Task"]) == ["S-1", "MK-2", "MV", "Mean"]


def test_a_finished_job_runs_nothing_again(job, tiny_models, capsys, monkeypatch):
    job(*small(tiny_models))
    monkeypatch.setattr(pool, "tracked", lambda *_: pytest.fail("nothing to track"))
    before = {p: p.stat().st_mtime_ns for p in (job.folder / "results").rglob("*.jsonl")}
    job(*small(tiny_models))
    assert "nothing to run" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in (job.folder / "results").rglob("*.jsonl")}


def test_more_examples_extend_the_cells(job, tiny_models):
    job(*small(tiny_models))
    job(*small(tiny_models, **{"data.examples": 5}))
    for cell in Store(job.folder / "results").cells("eval"):
        assert list(cell.records()) == [f"{cell.key['task']}/validation/0/{i}" for i in range(5)]
        assert cell.done() == 5


@pytest.mark.parametrize(
    "setting", [{}, {"selector": "random"}, {"method": "adakv"}, {"method": "h2o"}], ids=str
)
def test_batches_do_not_change_a_record(job, tiny_models, setting):
    """Neither an answer nor what was measured, whatever the other rows of a batch go on to say."""
    found = []
    for rows in (1, 3):
        job(*small(tiny_models, **setting, **{"data.batch_size": rows}))
        cells = list(Store(job.folder / "results").cells("eval"))
        records = [record for cell in cells for record in cell.records().values()]
        found.append([{k: x for k, x in r.items() if k != "seconds"} for r in records])
        shutil.rmtree(job.folder / "results")
    assert found[0] == found[1]
    assert len({record["budget_measured"] for record in found[0]}) > 1


def test_a_changed_setting_is_another_cell(job, tiny_models):
    one = {"data.tasks": "[S-1]", "data.examples": 1}
    job(*small(tiny_models, **one))
    for change in (
        {"budget": "1/8"},
        {"seed": 1},
        {"selector": "oracle"},
        {"selector": "oracle", "oracle_heads": "[0-1]"},
        {"selector": "random"},
        {"selector": "random", "selector_seed": 1},
        {"data.first_token": "decode"},
        {"method.block_size": 16},
        {"method.name": "mine"},
        {"method.name": "mine", "method.target": "ratplus_exp.methods.exact.TopKBlocks"},
    ):
        before = len(frame(job))
        job(*small(tiny_models, **one, **change))
        assert len(frame(job)) == before + 1


@pytest.mark.parametrize("method", ["dense", "quest", "snapkv"])
def test_the_first_token_can_come_from_a_decoding_step(job, tiny_models, method):
    """Then even an answer of one token is the method's; a dense one stays the same."""
    answers = []
    for first in ("prefill", "decode"):
        one = {
            "data.forms.number_digits": 2,
            "data.forms.reserve": 1,
            "data.tasks": "[S-1,S-2,MK-1]",
        }
        setting = {"data.first_token": first, "data.examples": 30} | one
        job(*small(tiny_models, method=method, budget="1/8", **setting))
        cells = frame(job)
        if method == "dense":
            assert len(cells) == 3 and cells["first_token"].isna().all()
            return
        cells = cells[cells["first_token"] == first]
        assert len(cells) == 3
        measured = cells["budget_measured"]
        assert (measured == 1).all() if first == "prefill" else (measured < 0.25).all()
        stored = {cell.id: cell for cell in Store(job.folder / "results").cells("eval")}
        records = [r for name in cells["cell"] for r in stored[name].records().values()]
        answers.append([r["prediction"] for r in records])
    assert answers[0] != answers[1]


def test_seeds_become_mean_and_deviation(job, tiny_models, capsys):
    for seed in (0, 1):
        for backbone in ("attention", "ratplus"):
            job(*small(tiny_models, backbone, seed=seed))
    job("stage=report", "data.length=128", "data.first_token=prefill")
    assert "±" in capsys.readouterr().out
    cells = pd.read_csv(job.folder / "job" / "cells.csv")
    assert sorted(cells["seed"].unique()) == [0, 1]


def test_rulers_own_files_can_be_evaluated(job, tiny_models, tmp_path):
    cfg = job.compose()
    niah = Ruler(load_tokenizer(tiny_models["ratplus"]), 128, forms_of(cfg))
    folder = tmp_path / "ruler" / TASKS["MK-2"].ruler_name
    folder.mkdir(parents=True)
    samples = [niah.sample("MK-2", 7, i) for i in range(3)]
    write_jsonl(samples, folder / "validation.jsonl")
    overrides = small(tiny_models, **{"data.tasks": "[MK-2]", "data.path": tmp_path / "ruler"})
    job(*overrides)
    (cell,) = Store(job.folder / "results").cells("eval")
    answers = [record["answers"] for record in cell.records().values()]
    assert answers == [list(sample.answers) for sample in samples]

    # Where a question begins is determined by its template, which is not in the file.
    split = [*overrides, "data.protocol=split"]
    job(*split)
    job(*split, 'data.forms.template="{context} of {query}"')
    keys = [cell.key for cell in Store(job.folder / "results").cells("eval")]
    assert len(keys) == 3 and sum("question" in key for key in keys) == 2
    for protocol in ("whole", "split"):  # which dense attention shares
        job(*overrides, "method=dense", f"data.protocol={protocol}")
    assert len([*Store(job.folder / "results").cells("eval")]) == 4

    text = (folder / "validation.jsonl").read_text().splitlines()
    (folder / "validation.jsonl").write_text("\n".join([text[0], "{broken", text[2]]))
    with pytest.raises(ValueError, match=r"validation\.jsonl.*2"):
        job(*overrides)


def test_an_answer_longer_than_its_room_is_refused_wherever_it_is(job, tiny_models, monkeypatch):
    make = Ruler.sample

    def sample(self, task, seed, index, *rest):
        made = make(self, task, seed, index, *rest)
        return replace(made, answers=("1234 " * 99,)) if index == 2 else made

    monkeypatch.setattr(Ruler, "sample", sample)
    monkeypatch.setattr(prompts, "_kept", {})
    with pytest.raises(ValueError, match=r"S-1/\S*/2: the answer has .* raise it"):
        job(*small(tiny_models, **{"data.tasks": "[S-1]"}))


def test_an_invalid_value_in_a_cell_names_the_folder(job, tiny_models, capsys):
    overrides = small(tiny_models, **{"data.tasks": "[S-1,S-2]"})
    job(*overrides)
    file = next((job.folder / "results").rglob("metrics.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"exact": "x"}))
    with pytest.raises(ValueError, match="1 of the cells have invalid values: delete the folders"):
        job(*overrides)
    assert f"{file} has an invalid value" in capsys.readouterr().err


def test_prompts_are_made_once_and_only_where_they_are_needed(job, tiny_models, monkeypatch):
    made, make = [], Ruler.sample
    monkeypatch.setattr(Ruler, "sample", lambda self, *x: [made.append(x[:3]), make(self, *x)][1])
    monkeypatch.setattr(prompts, "_kept", {})
    setting = {"data.tasks": "[S-1]", "data.examples": 20}
    job(*small(tiny_models, **setting))
    job(*small(tiny_models, method="snapkv", **setting))
    job(*small(tiny_models, "attention", **setting))
    assert made == [("S-1", 0, i) for i in range(20)]
    monkeypatch.setattr(prompts, "_kept", {})
    job(*small(tiny_models, **setting | {"data.examples": 22}))
    assert set(made[20:]) == {("S-1", 0, i) for i in (*range(16), 20, 21)}  # 16 for the metrics


def test_prompts_made_ahead_change_nothing(job, tiny_models, monkeypatch, makers_are_threads):
    found, made, call = [], [], prompts.Workers.call
    monkeypatch.setattr(prompts.Workers, "call", lambda *x: made.append(x) or call(*x))
    for workers in (0, 2):
        assert not made
        monkeypatch.setattr(samples, "_workers", lambda _, n=workers: n)
        job(*small(tiny_models, **{"data.examples": 5}))
        job(*small(tiny_models, **{"data.examples": 8}))
        found.append([without_times(cell) for cell in Store(job.folder / "results").cells()])
        shutil.rmtree(job.folder / "results")
    assert found[0] == found[1]
    assert made and prompts._kept.popitem()[1].pool is None


def without_times(cell):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in cell.records().values()]


@pytest.mark.parametrize("method", ["quest", "snapkv", "moba"])
def test_protocols_have_cells_of_their_own_where_they_differ(job, tiny_models, method):
    tasks = {"data.tasks": "[MQ,vt]", "data.length": 256, "method": method}
    job(*small(tiny_models, **tasks))
    job(*small(tiny_models, **tasks, **{"data.protocol": "split"}))
    cells = frame(job)
    kinds = cells["first_token"].tolist()
    if method == "moba":  # selects for every token by that token alone
        assert len(cells) == 2 and cells["first_token"].isna().all()
    else:
        assert sorted(kinds) == ["prefill", "prefill", "split", "split"]
        assert cells["n"].eq(3).all()
        # The question's queries count, which an answer's alone do not.
        assert cells.groupby("first_token")["budget_measured"].nunique().sum() > 2
