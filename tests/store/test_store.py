"""The store: what a kill, a second process, a changed key or a bad disk may and may not do."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ratplus_exp.store import Store, StoreBusy
from ratplus_exp.store import cells as store_module

ROOT = Path(__file__).parents[2]
KEY = {
    "stage": "eval",
    "model": "pocket_ratplus",
    "backbone": "ratplus",
    "checkpoint": "0f3a",
    "method": "quest",
    "block_size": 8,
    "top_k": 4,
    "budget": "1/16",
    "selector": "topk",
    "task": "MK-2",
    "seed": 0,
    "context_length": 512,
    "data": {"forms": ["a", "b"]},
}


def evaluate(root: Path, n: int = 8, batch: int = 3, pause: float = 0.0) -> None:
    """What a stage does; acknowledges in a file of its own what `append` said was stored."""
    cell = Store(root).cell(KEY)
    if cell.is_done(n):
        return
    with cell.open({"commit": "abc"}):
        done = cell.records()
        todo = [i for i in range(n) if f"s{i}" not in done]
        for start in range(0, len(todo), batch):
            chunk = todo[start : start + batch]
            cell.append([{"id": f"s{i}", "prediction": "é" * i} for i in chunk])
            with (root / "acknowledged").open("a") as file:
                file.write("".join(f"s{i}\n" for i in chunk))
            time.sleep(pause)
        cell.finish({"accuracy": 50.0})


def assert_whole(root: Path, n: int) -> None:
    """All samples, each once, in readable lines, under a marker that says so."""
    cell = Store(root).cell(KEY)
    lines = (cell.path / "samples.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["id"] for line in lines) == sorted(f"s{i}" for i in range(n))
    assert cell.is_done(n) and not cell.is_done(n + 1)
    assert cell.metrics() == {"accuracy": 50.0, "n": n}


def acknowledged(root: Path) -> set[str]:
    path = root / "acknowledged"
    return set(path.read_text().split()) if path.exists() else set()


def kill_at_line(step: int, root: Path) -> bool:
    """Evaluate in a forked child that kills itself before the step-th line of store.py."""
    pid = os.fork()
    if pid == 0:
        steps = iter(range(1, 1_000_000))

        def trace(frame, event, _):
            if frame.f_code.co_filename != store_module.__file__:
                return None
            if event == "line" and next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        try:
            sys.settrace(trace)
            evaluate(root)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_kill_before_any_line_of_the_store_loses_and_repeats_nothing(tmp_path):
    kills = 0
    for step in range(1, 10_000, 3):
        root = tmp_path / str(step)
        root.mkdir()
        if not kill_at_line(step, root):
            assert_whole(root, 8)
            break
        kills += 1
        assert acknowledged(root) <= set(Store(root).cell(KEY).records())
        evaluate(root)
        assert_whole(root, 8)
    assert kills > 30


def test_kill_at_random_moments(tmp_path):
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n"
    code += "from pathlib import Path; import test_store; print('ready', flush=True)\n"
    code += f"test_store.evaluate(Path({str(tmp_path)!r}), n=200, batch=2, pause=0.001)"
    generator, killed = random.Random(0), 0
    for _ in range(5):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
            assert child.stdout.readline() == b"ready\n"
            time.sleep(generator.uniform(0.0, 0.05))
            child.kill()
            killed += child.wait() == -signal.SIGKILL
        assert acknowledged(tmp_path) <= set(Store(tmp_path).cell(KEY).records())
    assert killed
    evaluate(tmp_path, n=200)
    assert_whole(tmp_path, 200)


def test_a_line_torn_at_any_byte_is_run_again(tmp_path):
    evaluate(tmp_path, n=3)
    cell = Store(tmp_path).cell(KEY)
    samples = cell.path / "samples.jsonl"
    whole = samples.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for lost in range(1, last + 1):
        (cell.path / "done").unlink()
        samples.write_bytes(whole[:-lost])
        assert list(cell.records()) == ["s0", "s1"]  # reading repairs nothing, and minds nothing
        evaluate(tmp_path, n=3)
        assert samples.read_bytes() == whole


def test_damage_inside_the_samples_is_reported_not_thrown_away(tmp_path):
    evaluate(tmp_path)
    samples = Store(tmp_path).cell(KEY).path / "samples.jsonl"
    lines = samples.read_text().splitlines(keepends=True)
    damaged = "".join([lines[0], "garbage\n", *lines[1:]])
    samples.write_text(damaged)
    with pytest.raises(ValueError, match="line 2 of .*delete that line"):
        evaluate(tmp_path, n=9)
    assert samples.read_text() == damaged


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path):
    cell, again = Store(tmp_path).cell(KEY), Store(tmp_path).cell(KEY)
    with cell.open({}):
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        code += "from ratplus_exp.store import Store\n"
        code += f"with Store({str(tmp_path)!r}).cell({KEY!r}).open({{}}): pass"
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert child.returncode == 1
        line = child.stderr.strip().splitlines()[-1]
        assert "StoreBusy" in line and f"process {os.getpid()} on" in line
        with pytest.raises(StoreBusy), again.open({}):
            pass
        assert len(cell.provenance()) == 1
    with again.open({}):
        again.append([{"id": "s0"}])


def test_more_samples_extend_a_finished_cell(tmp_path):
    evaluate(tmp_path, n=4)
    cell = Store(tmp_path).cell(KEY)
    written = (cell.path / "config.json").read_text()
    evaluate(tmp_path, n=3)  # fewer: nothing to do
    assert (cell.path / "config.json").read_text() == written
    with cell.open({"commit": "def"}):
        assert cell.is_done(4)
        cell.append([{"id": "s4"}])
        assert not cell.is_done(1)  # its metrics no longer cover all of its samples
    evaluate(tmp_path, n=6)
    assert_whole(tmp_path, 6)
    entries = [(entry["commit"], entry["from_sample"]) for entry in cell.provenance()]
    assert entries == [("abc", 0), ("def", 4), ("abc", 5)]


def test_a_sample_is_accepted_once_and_metrics_must_cover_all(tmp_path):
    cell = Store(tmp_path).cell(KEY)
    with cell.open({}):
        cell.append([{"id": "a"}, {"id": "b"}])
        for repeated in ([{"id": "b"}], [{"id": "c"}, {"id": "c"}]):
            with pytest.raises(AssertionError, match="twice"):
                cell.append(repeated)
        with pytest.raises(AssertionError, match="2 are stored"):
            cell.finish({"n": 1})
        cell.finish({"memory": float("nan"), "lengths": 3})
    assert list(cell.records()) == ["a", "b"]
    assert cell.metrics() == {"memory": None, "lengths": 3, "n": 2}


def test_asking_for_a_cell_writes_nothing(tmp_path):
    cell = Store(tmp_path / "new").cell(KEY)
    assert (cell.records(), cell.metrics(), cell.done(), cell.provenance()) == ({}, {}, 0, [])
    assert list(Store(tmp_path / "new").cells()) == []
    assert not (tmp_path / "new").exists()


def test_hash_is_pinned_and_the_name_is_readable(tmp_path):
    cell = Store(tmp_path).cell(KEY)
    name = "pocket_ratplus-quest-1_16-MK-2-seed0-99a45ecc8abfff2f"
    assert cell.path == tmp_path / "eval" / name
    assert Store(tmp_path).cell(dict(reversed(KEY.items()))).path == cell.path


def test_every_part_of_the_key_counts(tmp_path, monkeypatch):
    store = Store(tmp_path)
    changes = [{name: "other"} for name in KEY] + [{"new": None}, {"data": {"forms": ["b", "a"]}}]
    ids = {store.cell(KEY | change).id for change in changes} | {store.cell(KEY).id}
    assert len(ids) == len(changes) + 1
    evaluate(tmp_path)
    assert [cell.key for cell in store.cells()] == [KEY]
    monkeypatch.setattr(store_module, "FORMAT", 3)  # the same key now means other numbers
    assert store.cell(KEY).id not in ids and list(store.cells()) == []


@pytest.mark.parametrize("bad", [{"x": {1, 2}}, {"x": float("nan")}, {"x": Path("a")}])
def test_a_key_that_is_not_json_is_refused(tmp_path, bad):
    with pytest.raises(ValueError, match="plain JSON"):
        Store(tmp_path).cell(KEY | bad)
    with pytest.raises(ValueError, match="needs a 'stage'"):
        Store(tmp_path).cell(bad)


def test_no_part_of_a_key_leaves_the_root(tmp_path):
    cell = Store(tmp_path).cell({"stage": "../..", "model": "/etc/../x y", "task": "a" * 300})
    assert cell.path.parent.parent == tmp_path and ".." not in cell.path.parts
    with cell.open({}):
        pass


def test_config_changed_by_hand_is_noticed(tmp_path):
    evaluate(tmp_path)
    config = Store(tmp_path).cell(KEY).path / "config.json"
    config.write_text(config.read_text().replace('"MK-2"', '"MK-3"'))
    with pytest.raises(ValueError, match="delete the folder"):
        evaluate(tmp_path, n=9)
    with pytest.raises(ValueError, match="delete the folder"):
        list(Store(tmp_path).cells())


def test_a_root_that_cannot_be_written_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    cell = Store(tmp_path / "file" / "outputs").cell(KEY)
    says = r"cannot write results under .*choose another one"
    with pytest.raises(OSError, match=says), cell.open({}):
        pass
