"""The store: what a kill, a second process, a changed key or a bad disk may and may not do."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ratplus_exp.store import Store, StoreBusy, write_atomically
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


def evaluate(root: Path, n: int = 8) -> None:
    """What a stage does; acknowledges in a file of its own what `append` said was stored."""
    cell = Store(root).cell(KEY)
    if cell.done() >= n:
        return
    with cell.open({"commit": "abc"}):
        done = cell.records()
        todo = [i for i in range(n) if f"s{i}" not in done]
        for start in range(0, len(todo), 3):
            chunk = todo[start : start + 3]
            cell.append([{"id": f"s{i}", "prediction": "é" * i} for i in chunk])
            with (root / "acknowledged").open("a") as file:
                file.write("".join(f"s{i}\n" for i in chunk))
        cell.finish({"accuracy": 50.0})


def assert_whole(root: Path, n: int) -> None:
    """All samples, each once, in readable lines, under a marker that says so."""
    cell = Store(root).cell(KEY)
    lines = (cell.path / "samples.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["id"] for line in lines) == sorted(f"s{i}" for i in range(n))
    assert cell.done() == n
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
            evaluate(root, n=4)
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
            assert_whole(root, 4)
            break
        kills += 1
        assert acknowledged(root) <= set(Store(root).cell(KEY).records())
        evaluate(root, n=4)
        assert_whole(root, 4)
    assert kills > 30


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


def _edit(name, change):
    def damage(folder):
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


def _history_of_numbers(text):
    return json.dumps(json.loads(text) | {"provenance": [5]}).encode()


DERIVED = {  # computed again
    "empty done": _edit("done", lambda text: b""),
    "a list as done": _edit("done", lambda text: b"[8]"),
    "done of more samples": _edit("done", lambda text: b'{"n": 9}'),
    "truncated metrics": _edit("metrics.json", lambda text: text[:9]),
    "other metrics": _edit("metrics.json", lambda text: text.replace(b"8", b"7")),
    "no metrics": lambda folder: (folder / "metrics.json").unlink(),
    "no samples": lambda folder: (folder / "samples.jsonl").unlink(),
}
ASIDE = {
    "empty config": _edit("config.json", lambda text: b""),
    "truncated config": _edit("config.json", lambda text: text[:99]),
    "config without history": _edit("config.json", lambda text: b'{"format": 2}'),
    "another key": _edit("config.json", lambda text: text.replace(b'"MK-2"', b'"MK-3"')),
    "garbage inside": _edit("samples.jsonl", lambda text: b"garbage\n" + text),
    "not UTF-8 inside": _edit("samples.jsonl", lambda text: b"\xff\n" + text),
    "an id twice": _edit("samples.jsonl", lambda text: text + text.splitlines(keepends=True)[0]),
    "history of numbers": _edit("config.json", _history_of_numbers),
    "an id that is none": _edit("samples.jsonl", lambda text: b'{"id": []}\n' + text),
}


@pytest.mark.parametrize("what", [*DERIVED, *ASIDE])
def test_a_damaged_cell_is_named_counts_as_missing_and_is_filled_again(tmp_path, capsys, what):
    other = Store(tmp_path).cell(KEY | {"task": "MV"})
    with other.open({}):
        other.append([{"id": "a"}])
        other.finish({})
    evaluate(tmp_path)
    cell = Store(tmp_path).cell(KEY)
    (DERIVED | ASIDE)[what](cell.path)
    left = {path.name: path.read_bytes() for path in cell.path.iterdir()}
    found = {c.id: c.done() for c in Store(tmp_path).cells()}
    assert found.pop(other.id) == 1 and set(found.values()) <= {0} and not cell.done()
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(f"warning: {cell.path}/" in x and "run its job again" in x for x in lines)
    evaluate(tmp_path)
    assert_whole(tmp_path, 8)
    assert {c.id: c.done() for c in Store(tmp_path).cells()} == {other.id: 1, cell.id: 8}
    aside = list(cell.path.parent.glob("*.damaged1"))
    assert len(aside) == (what in ASIDE)
    for folder in aside:  # nothing is thrown away
        assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "lock"} == {
            name: content for name, content in left.items() if name != "lock"
        }


def test_drafts_of_killed_processes_go_with_the_next_run(tmp_path):
    evaluate(tmp_path, n=2)
    draft = Store(tmp_path).cell(KEY).path / ".config.json.99.tmp"
    draft.write_text("{")
    evaluate(tmp_path, n=3)
    assert not draft.exists()


def test_a_full_disk_names_the_file_and_leaves_no_draft(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_atomically(tmp_path / "metrics.json", "{}")
    assert error.value.filename == str(tmp_path / "metrics.json")
    assert not any(tmp_path.iterdir())


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
        assert cell.done() == 4
        cell.append([{"id": "s4"}])
        assert not cell.done()  # its metrics no longer cover all of its samples
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
    with pytest.raises((TypeError, ValueError), match="JSON"):
        Store(tmp_path).cell(KEY | bad)


def test_no_part_of_a_key_leaves_the_root(tmp_path):
    cell = Store(tmp_path).cell({"stage": "../..", "model": "/etc/../x y", "task": "a" * 300})
    assert cell.path.parent.parent == tmp_path and ".." not in cell.path.parts
    with cell.open({}):
        pass


def test_a_root_that_cannot_be_written_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    cell = Store(tmp_path / "file" / "outputs").cell(KEY)
    says = r"cannot write results under .*choose another one"
    with pytest.raises(OSError, match=says), cell.open({}):
        pass
