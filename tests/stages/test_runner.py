"""Cells that share a prefill are filled together, and hold what each of them would hold alone."""

import pytest

from ratplus_exp.stages import pool, runner, sweep
from ratplus_exp.stages.evaluate import Accuracy
from ratplus_exp.store import Store

GRIDS = """{
  dense: {method: dense},
  top: {method: [quest, snapkv], budget: 1/4},
  random: {method: snapkv, budget: 1/4, selector: random, examples: 2},
  moba: {method: moba, budget: 1/4},
  hits: {stage: hit_rate, method: [quest, snapkv], budget: 1/8},
}"""


@pytest.fixture
def jobs(job, pair, tmp_path):
    """jobs(folder, **settings): the jobs of GRIDS for one model, whose store is in this folder."""
    (tmp_path / "conf" / "experiment").mkdir()
    text = f"# @package _global_\ndefaults:\n  - override /stage: sweep\nstage:\n  cells: {GRIDS}\n"
    (tmp_path / "conf" / "experiment" / "grids.yaml").write_text(text)

    def make(folder, *settings):
        results = f"results={tmp_path / folder}"
        line = ["experiment=grids", *pair, "data.examples=3", "data.batch_size=2", results]
        with job.ready(*line, *settings) as cfg:
            cfg.stage.models = [cfg.stage.models[1]]
            return cfg, [sweep.job_of(each) for each in sweep.expand(cfg)]

    return make


def stored(folder):
    """Records and metrics by cell, without times."""
    return {
        cell.id: (
            {i: {k: v for k, v in r.items() if k != "seconds"} for i, r in cell.records().items()},
            {k: v for k, v in cell.metrics().items() if k != "seconds"},
        )
        for cell in Store(folder).cells()
    }


@pytest.fixture
def alone(jobs, tmp_path):
    """What the cells hold that are filled one by one."""
    for each in jobs("alone")[1]:
        (task,) = each.cells
        assert not runner.fill([each], task, runner.Session(), lambda n: None)
    return stored(tmp_path / "alone")


def test_a_group_holds_what_its_cells_hold_alone(jobs, alone, tmp_path, monkeypatch, capsys):
    groups, fill = [], runner.fill
    monkeypatch.setattr(pool, "fill", lambda jobs, *x: groups.append(jobs) or fill(jobs, *x))
    assert not pool.fill_jobs(*jobs("together"))
    assert sorted(map(len, groups)) == [1, 6]  # MoBA; all others
    assert stored(tmp_path / "together") == alone

    monkeypatch.setattr(runner, "total_memory", lambda device: 1)
    assert not pool.fill_jobs(*jobs("little"))
    assert stored(tmp_path / "little") == alone
    assert "2 prefilled prompts need more than" in capsys.readouterr().err


@pytest.mark.parametrize("calls", [1, 4])
def test_a_group_that_was_cut_off_goes_on(jobs, alone, tmp_path, monkeypatch, calls):
    """After so many batches of its cells."""
    measure, seen = Accuracy.measure, []

    def cut(self, job, samples, *rest):
        if len(seen) == calls:
            raise KeyboardInterrupt
        seen.append(samples)
        return measure(self, job, samples, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Accuracy, "measure", cut)
        with pytest.raises(KeyboardInterrupt):
            pool.fill_jobs(*jobs("cut"))
    cells = list(Store(tmp_path / "cut").cells())
    assert sum(map(len, seen)) <= sum(len(cell.records()) for cell in cells) < 20
    lines = {p: p.read_bytes() for p in (tmp_path / "cut").rglob("samples.jsonl")}
    assert not pool.fill_jobs(*jobs("cut"))
    assert stored(tmp_path / "cut") == alone
    for path, before in lines.items():
        assert path.read_bytes().startswith(before)


def test_a_cell_of_another_process_holds_up_no_other(jobs, alone, tmp_path, capsys):
    (taken,) = jobs("busy")[1][1].cells.values()
    with taken.open({}):
        assert not pool.fill_jobs(*jobs("busy"))
    assert "1 cells are being written by another process" in capsys.readouterr().out
    found = stored(tmp_path / "busy")
    assert found.pop(taken.id) == ({}, {})
    assert found == {name: cell for name, cell in alone.items() if name != taken.id}
