"""stage=sweep and stage=random_selector: what a table needs is run once, by whoever needs it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from ratplus_exp.analysis import tidy
from ratplus_exp.analysis.frame import GROUP
from ratplus_exp.analysis.pattern import scaled
from ratplus_exp.models.loading import weights_digest
from ratplus_exp.report import paper_tables
from ratplus_exp.stages import sweep
from ratplus_exp.store import Store

REPOSITORY = Path(__file__).parents[2]


def keys(job, experiment):
    """The cells of an experiment on the first trainings."""
    with job.ready(f"experiment={experiment}", "stage.trainings=[0]") as cfg:
        jobs = [sweep.job_of(each) for each in sweep.expand(cfg)]
    return {cell.id: cell.key for each in jobs for cell in each.cells.values()}


def test_the_experiments_hold_the_papers_settings_and_share_cells(job):
    of = {name: keys(job, name) for name in ("table2", "table3", "table4", "table5", "fig1")}
    assert of["table3"].keys() == of["table4"].keys() >= of["fig1"].keys()
    assert of["table2"].keys() < of["table5"].keys()
    topk = {i for i, key in of["table5"].items() if key["selector"] == "topk"}
    assert topk < of["table3"].keys() and len(topk) == 2 * 8 * 4
    for table, cells in of.items():
        if table == "fig1":
            continue
        frame = pd.DataFrame(cells.values())
        frame["backbone"] = frame["backbone"].replace({"attention": "Attention", "ratplus": "RAT+"})
        ours = frame[frame["method"] != "dense"]
        theirs = scaled(paper_tables(table), 1024)
        ours = ours[ours["selector"].isin(theirs["selector"])]
        place = [*GROUP, "task"]
        found, wanted = (set(map(tuple, x[place].to_numpy())) for x in (ours, theirs))
        assert found == wanted
        random = "random" in set(ours["selector"])
        assert set(ours["selector_seed"]) == ({0, 1, 2, 3, 4} if random else {0})
    whole = keys(job, "reproduce")
    assert all(cells.keys() < whole.keys() for cells in of.values())
    hits = [key for key in whole.values() if key["stage"] == "hit_rate"]
    assert len(hits) == 2 * 2 * 3 * 8 and {key["method"] for key in hits} == {"quest", "snapkv"}


def test_a_sweep_runs_what_is_missing_and_writes_the_report(job, pair, capsys):
    job("experiment=reproduce", *pair)
    out = capsys.readouterr().out
    folder = job.folder / "reports" / "tiny"
    names = [f"table{i}" for i in (2, 3, 4, 5)]
    names += ["selectors", "pattern", "fig2_heads", "fig3_heads"]
    for name in names:
        for suffix in ("md", "csv", "tex"):
            assert (folder / f"{name}.{suffix}").stat().st_size, name
    for name in ("fig1", "fig2", "fig3", "fig4", "selectors", "table3_gains"):
        assert (folder / f"{name}.png").stat().st_size and (folder / f"{name}.pdf").stat().st_size
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 6 and "Missing results" in page
    assert "The paper's Table 5, measured at tier pocket" in out
    cells = tidy(Store(job.folder / "results"))
    assert len(cells) == 2 * (13 + 5 * 3 + 3)  # Table 3 and dense, random, oracle
    assert set(cells["n"]) == {2}

    before = {p: p.stat().st_mtime_ns for p in (job.folder / "results").rglob("samples.jsonl")}
    job("experiment=table2", *pair)
    assert "nothing to run" in capsys.readouterr().out
    job("experiment=table5", *pair, "data.examples=3")
    after = tidy(Store(job.folder / "results"))
    assert len(after) == len(cells) and set(after["n"]) == {2, 3}
    untouched = [p for p, stamp in before.items() if p.stat().st_mtime_ns == stamp]
    assert len(before) - len(untouched) == 2 * (4 + 15 + 3)  # those of Table 5


def test_a_sweep_shows_its_settings_with_every_seed_and_a_report_shows_all(job, pair):
    model = next(x for x in (job.folder / "conf" / "model").iterdir() if "ratplus" in x.name).stem
    data = [x for x in pair if not x.startswith("stage.")]
    job(f"model={model}", "method=tova", "budget=1/4", *data)
    for seed in (0, 1):
        job("experiment=table2", *pair, f"seed={seed}")
    shown = pd.read_csv(job.folder / "reports" / "tiny" / "table2" / "cells.csv")
    assert set(shown["method"]) == {"quest", "moba"} and set(shown["seed"]) == {0, 1}
    job("stage=report", *data)
    assert "tova" in set(pd.read_csv(job.folder / "job" / "cells.csv")["method"])


def test_outputs_of_two_models_of_one_backbone_are_refused_before_they_are_measured(job, pair):
    attention, ratplus = sorted((job.folder / "conf" / "model").iterdir())
    text = ratplus.read_text().replace(f"name: {ratplus.stem}", "name: another")
    ratplus.with_name("another.yaml").write_text(text)
    models = f"stage.models=[{attention.stem},{ratplus.stem},another]"
    with pytest.raises(ValueError, match="one model of each backbone, not another,"):
        job("experiment=fig1", *pair, models)
    assert not any(Store(job.folder / "results").cells())


def test_trainings_are_a_level_of_every_table(job, pair, tiny_models, capsys):
    """Two trainings of either backbone, which differ in their weights."""
    conf = job.folder / "conf"
    for backbone, folder in tiny_models.items():
        (file,) = (conf / "model").glob(f"*_{backbone}.yaml")
        path = job.folder / backbone
        for training in (0, 1):
            shutil.copytree(folder, path / str(training))
        weights = load_file(path / "1" / "model.safetensors")
        changed = {name: value + 0.3 for name, value in weights.items()}
        save_file(changed, path / "1" / "model.safetensors", {"format": "pt"})
        digests = {t: weights_digest(path / str(t)) for t in (0, 1)}
        lines = [x for x in file.read_text().splitlines() if not x.startswith(("path:", "sha256:"))]
        lines += [f"path: {path}/${{.training}}", f"sha256: {digests}"]
        file.write_text("\n".join(lines))
    settings = [*pair, "stage.trainings=[0,1]"]
    job("experiment=fig2", *settings)
    job("experiment=table5", *settings)
    cells = tidy(Store(job.folder / "results"))
    assert set(map(tuple, cells[["backbone", "training"]].to_numpy())) == {
        (backbone, training) for backbone in ("Attention", "RAT+") for training in (0, 1)
    }
    assert cells["checkpoint"].nunique() == 4
    table = pd.read_csv(job.folder / "reports" / "tiny" / "table5" / "table5.csv")
    assert set(table.loc[table["Method"] == "quest", "trainings"]) == {2}
    ranked = pd.read_csv(job.folder / "reports" / "tiny" / "fig2" / "fig2_ranked_heads.csv")
    assert (ranked[ranked["rank"] == 1].groupby(["budget", "backbone"]).size() == 2).all()
    capsys.readouterr()
    job("experiment=fig2", *settings)
    cells = pd.read_csv(job.folder / "reports" / "tiny" / "table5" / "cells.csv")
    assert set(cells["selector"]) == {"random", "topk", "oracle"}  # still those of Table 5
    assert "nothing to run" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"model.training=2 is unknown: .* has 0, 1;"):
        job("experiment=fig2", *pair, "stage.trainings=[2]")


def test_random_selection_has_five_seeds_and_leaves_cells_for_the_tables(job, pair, capsys):
    model = next(x for x in (job.folder / "conf" / "model").iterdir() if "ratplus" in x.name).stem
    job("stage=random_selector", f"model={model}", "method=snapkv", "budget=1/4", *pair)
    cells = tidy(Store(job.folder / "results"))
    assert sorted(cells["selector_seed"][cells["selector"] == "random"].unique()) == [0, 1, 2, 3, 4]
    assert set(cells["selector"]) == {"random", "topk", "oracle"}
    table = pd.read_csv(job.folder / "job" / "random_selector.csv")
    assert list(table["Selector"]) == ["random", "topk", "oracle"]
    assert list(table["seeds"]) == [5, 1, 1] and "±" in table.loc[0, "Mean"]
    capsys.readouterr()
    job("stage=random_selector", f"model={model}", "method=snapkv", "budget=1/4", *pair)
    assert "nothing to run" in capsys.readouterr().out
    with pytest.raises(ValueError, match="needs a method that selects"):
        job("stage=random_selector", "method=dense")


def test_a_table_of_all_cells_waits_for_those_of_another_process(job, pair):
    model = next(x for x in (job.folder / "conf" / "model").iterdir() if "ratplus" in x.name).stem
    line = ["stage=random_selector", f"model={model}", "method=snapkv", "budget=1/4", *pair]
    sweep_of_it = ["experiment=fig1", *pair]
    with job.ready("method=snapkv", f"model={model}", "budget=1/4", *pair[:-1]) as cfg:
        (cell,) = sweep.job_of(cfg).cells.values()
    for waiting in (line, sweep_of_it):
        with cell.open({}), pytest.raises(ValueError, match="another process still writes"):
            job(*waiting)
    assert (job.folder / "reports" / "tiny" / "fig1" / "fig1.png").exists()  # of what there is
    job(*line)


@pytest.mark.slow
def test_a_cell_that_fails_stops_no_other(job, pair):
    overrides = ["experiment=fig3", *pair, "data.tasks=[MV,MQ]", "stage.workers=2"]
    with job.ready(*overrides) as cfg:
        cells = [cell for each in sweep.expand(cfg) for cell in sweep.job_of(each).cells.values()]
    (cells[0].path / "lock").mkdir(parents=True)  # cannot be opened
    with pytest.raises(ValueError, match=f"1 cells failed.*{cells[0].path.name}"):
        job(*overrides)
    assert [cell.done() for cell in cells] == [0, *[2] * (len(cells) - 1)]
    assert (job.folder / "reports" / "tiny" / "fig3" / "fig3.png").stat().st_size
    (cells[0].path / "lock").rmdir()
    job(*overrides)
    assert cells[0].done() == 2


def started(pair, folder, *overrides):
    command = [sys.executable, "run.py", f"output={folder}", "tracking=disabled", "device=cpu"]
    command += ["experiment=table3", *pair, "stage.workers=2", *overrides]
    log = (folder / "log").open("w")
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log, start_new_session=True)


def descendants(pid):
    """Child processes first, then theirs."""
    children = [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [y for x in children for y in descendants(x)]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", ["ctrl-c", "worker killed", "failures"])
def test_a_sweep_ends_in_time(pair, tmp_path, how):
    """Whatever ended it: it waits neither for cells nor for the workers' queues."""
    store = tmp_path / "results"
    if how == "failures":
        store.mkdir()
        (store / "eval").write_text("not a folder")
    process = started(pair, tmp_path, "data.examples=2000")
    try:
        if how != "failures":
            while not any(p.stat().st_size for p in store.rglob("samples.jsonl")):
                assert process.poll() is None
                time.sleep(0.1)
        workers = descendants(process.pid)
        if how == "ctrl-c":
            os.killpg(process.pid, signal.SIGINT)
        elif how == "worker killed":
            os.kill(workers[-1], signal.SIGKILL)
        assert process.wait(timeout=60) != 0
        end = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in workers):
            assert time.monotonic() < end
            time.sleep(0.1)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    said = (tmp_path / "log").read_text()
    wanted = {"worker killed": "stage.workers=1", "failures": "16 cells failed"}
    assert wanted.get(how, "the same command resumes") in said
    assert process.returncode == (130 if how == "ctrl-c" else 1)


@pytest.mark.slow
def test_a_killed_sweep_of_two_processes_goes_on(pair, tmp_path):
    command = [sys.executable, "run.py", f"output={tmp_path}", "tracking=disabled", "device=cpu"]
    command += ["experiment=table3", *pair, "stage.workers=2", "data.examples=10"]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    store = Store(tmp_path / "results")
    while sum(cell.done() > 0 for cell in store.cells()) < 3:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(5)  # its workers notice that it is gone
    done = {cell.path: (cell.path / "samples.jsonl").read_bytes() for cell in store.cells()}
    assert 3 <= len(done) < 26
    run = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert "26 cells" in run.stderr
    cells = list(store.cells())
    assert [cell.done() for cell in cells] == [10] * 26
    for cell in cells:
        assert len(set(cell.records())) == 10
        assert (cell.path / "samples.jsonl").read_bytes().startswith(done.get(cell.path, b""))
    shutil.rmtree(tmp_path / "reports")
    again = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert "nothing to run" in again.stdout and (tmp_path / "reports" / "tiny").exists()


def test_a_model_without_its_twin_is_ranked_beside_the_paper(job, pair, tmp_path):
    alone = f"pair.models=[{tmp_path.name.replace('-', '_')}_attention]"
    job(
        "experiment=table4",
        *pair,
        alone,
        "data.tasks=[S-1,MV]",
        "~stage.cells.small_blocks",
        "+stage.outputs.report=true",
    )
    ranks = pd.read_csv(job.folder / "reports/tiny/table4/ranks.csv")
    assert list(ranks["Over"]) == ["settings", "tasks"]  # a random model solves no task
    assert list(ranks["Count"]) == [11, 2] and ranks["Tasks"][0] == "S-1, MV"
