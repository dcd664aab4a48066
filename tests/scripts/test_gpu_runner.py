"""scripts/gpu.py runs pieces within limits and records them; gpu_collect.py copies the results."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from ratplus_bench import scan_cases, sparse_cases
from ratplus_bench.timing import Machine

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.chdir(ROOT)  # as the runner does
    for name in ("PYTHONPATH", "PYTHONUNBUFFERED", "HF_HUB_OFFLINE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))  # which it sets, and nothing puts back
    module = importlib.import_module("gpu")
    monkeypatch.setattr(module, "WORK", tmp_path / "work")
    monkeypatch.setattr(module, "OUT", tmp_path / "out")
    monkeypatch.setattr(module, "GRACE", 0.5)
    monkeypatch.setattr(module, "describe", lambda: {"device": "Card 1", "commit": "abc"})
    return module


def records(gpu, pieces, monkeypatch, *arguments):
    monkeypatch.setattr(gpu, "PIECES", {piece.__name__: piece for piece in pieces})
    gpu.main(list(arguments))
    return {piece.__name__: json.loads((gpu.WORK / f"{piece.__name__}.json").read_text())
            for piece in pieces}  # fmt: skip


@pytest.mark.parametrize("dry", [False, True])
def test_the_files_of_the_kernels_tests_exist(gpu, monkeypatch, tmp_path, dry):
    monkeypatch.setattr(gpu, "DRY", dry)
    commands = [command for _, commands in gpu.kernels(tmp_path) for command in commands]
    files = re.findall(r"tests/\S+", " ".join(commands))
    assert files and all((ROOT / file).exists() for file in files)


def test_pieces_end_within_their_limits_and_none_stops_another(gpu, monkeypatch, tmp_path):
    def slow(out):  # a child of a child that heeds no signal writes on until it is killed
        write = f"import time\nwhile True: open({str(out / 'beat')!r}, 'w'); time.sleep(.02)"
        save = f"trap 'sleep .2; touch {out}/saved; exit 1' TERM; while true; do sleep .02; done"
        first = f"trap '' TERM; echo begun; (trap '' TERM; python -c {shlex.quote(write)})"
        yield 1.0, [first, f"bash -c {shlex.quote(save)} && touch {out}/next"]
        yield 1.0, ["echo too late"]

    def broken(out):
        yield 20, ["echo fine", "python -c 'raise OSError(7)'"]
        raise RuntimeError("of the piece itself")

    def absent(out):
        raise gpu.SkipPiece("there is no wheel")
        yield

    def last(out):
        yield 20, [f"echo 1 > {out}/kept; echo 2 > {out}/checkpoint-2.pt"]

    pieces = (slow, broken, absent, last)
    found = records(gpu, pieces, monkeypatch)
    first, saving, second = found["slow"]["commands"]
    assert first["rc"] == -9 and first["output"] == "begun\n"
    assert saving["rc"] == 124 and (gpu.WORK / "slow" / "saved").exists()
    assert not (gpu.WORK / "slow" / "next").exists()
    assert second["output"] == "no time was left" and found["slow"]["seconds"] < 10
    (gpu.WORK / "slow" / "beat").unlink()
    time.sleep(0.3)
    assert not (gpu.WORK / "slow" / "beat").exists()
    assert "of the piece itself" in found["broken"]["note"] and found["broken"]["rc"] == 1
    assert [x["rc"] for x in found["broken"]["commands"]] == [0, 1]
    assert "OSError: 7" in found["broken"]["commands"][1]["output"]
    assert found["absent"]["rc"] is None and "no wheel" in found["absent"]["note"]
    assert found["last"]["rc"] == 0 and found["last"]["device"] == "Card 1"
    with tarfile.open(tmp_path / "out" / "last.tgz") as archive:
        assert set(archive.getnames()) == {"last/kept", "last/01.log", "last.json"}

    # What has a result is skipped, what could not run is tried again, and a name runs it anew.
    dates = {name: found[name]["date_end"] for name in found}
    marked = {name: found[name] | {"date_end": "before"} for name in found}
    for name, record in marked.items():
        (gpu.WORK / f"{name}.json").write_text(json.dumps(record))
    again = records(gpu, pieces, monkeypatch)
    assert [n for n in dates if again[n]["date_end"] != "before"] == ["absent"]
    assert records(gpu, pieces, monkeypatch, "last")["last"]["date_end"] != "before"
    with pytest.raises(SystemExit, match="no piece is called lst: choose of slow, broken"):
        gpu.main(["lst"])


def test_the_small_pairs_trainings_share_the_time_that_is_left(gpu, monkeypatch, tmp_path):
    now = [100.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    steps, given, limits = gpu.small(tmp_path), [], []
    for _ in range(3):
        limit, commands = next(steps)
        found = {float(re.search(r"optimizer\.seconds=(\S+)", x)[1]) for x in commands}
        assert len(found) == 1  # side by side
        given += found
        limits.append(100 + limit)
        now[0] += given[-1] + gpu.START + (5 if len(given) == 1 else 0)  # a slow start
        assert now[0] < limits[-1]
    left = [limit for limit, _ in steps]
    assert given[1] > given[0] > 30 and given[2] > 30  # the pair's documents take most
    assert now[0] - 100 == pytest.approx(0.8 * gpu.SMALL, abs=1)  # the slow start is made up for
    assert len(left) == 2 and left[-1] == gpu.SMALL


def test_weights_are_joined_of_their_parts(gpu, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(gpu.SkipPiece, match="there is no outputs/corpus/local"):
        next(gpu.smollm2(tmp_path))
    for folder in ("corpus/local", "models"):
        (tmp_path / "outputs" / folder).mkdir(parents=True)
    for name, text in (("ab", "second"), ("aa", "first, ")):
        (tmp_path / f"outputs/models/smollm2.gguf.{name}").write_text(text)
    (_, (join,)), (_, (train,)) = gpu.smollm2(tmp_path)
    subprocess.run(join.split(" && ")[0], shell=True, check=True)
    assert (tmp_path / "joined.gguf").read_text() == "first, second"
    assert "model.path=outputs/models/smollm2_135m " in join and "smollm2_ratplus" in train


def test_results_are_copied_and_shown(gpu, monkeypatch, tmp_path):
    collect = importlib.import_module("gpu_collect")
    about = {"device": "Card 1", "date": "2026-01-02T03", "commit": "abc", "dtype": "bfloat16",
             "copy_bytes_per_second": 3e12, "matmul_flop_per_second": 8e14}  # fmt: skip

    def row(suite, case, form, seconds, **more):
        return {"suite": suite, "case": case, "form": form, "seconds": seconds, "floor": 1e-3,
                "executed": 0, "note": ""} | more  # fmt: skip

    scan, case = "memory scan, forward", "B=1 T=32768 H=32 D=128"
    rows = [
        row(scan, case, "kernel", 1.2e-3),
        row(scan, case, "associative_scan, compiled (P2)", 6e-3),
        row(scan, case, "chunk_hgrn (fla-core)", None, note="not installed: fla"),
    ]
    about |= {"versions": {}, "threads": 1, "command": "bench", "dry": False}
    made = json.dumps({"runs": [{"about": about, "rows": rows}]})

    def bench(out):
        (out / "bench").mkdir()
        (out / "bench" / "bench.json").write_text(made)
        yield 20, ["echo measured"]

    records(gpu, (bench,), monkeypatch)
    monkeypatch.setattr(collect, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    for page in ("kernels", "small-tier"):
        text = "before\n" + "\nold\n".join(collect.MARKS) + "\nafter\n"
        (tmp_path / "docs" / f"{page}.md").write_text(text)
    collect.main([str(tmp_path / "out")])
    laid = tmp_path / "outputs/reference/bench/card-1"
    (run,) = json.loads((laid / "bench.json").read_text())["runs"]
    assert [x["seconds"] for x in run["rows"]] == [1.2e-3, 6e-3, None]
    assert json.loads((laid / "bench.record.json").read_text())["rc"] == 0
    page = (tmp_path / "docs" / "kernels.md").read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert f"| {scan} | {case} | kernel, time / floor | ≤ 1.5 | 1.20 |" in page
    assert "time / kernel | ≥ 10 | 5.00 (missed) |" in page
    assert "≥ 1 | not installed: fla |" in page and "≤ 1.4 | missing |" in page
    assert "Missing: the kernels' tests" in page and page.count("| aim |") == 1
    assert "Missing: Table 3 on a GPU." in (tmp_path / "docs" / "small-tier.md").read_text()


def test_the_aims_and_the_patterns_name_rows_of_the_bench(gpu):
    """The bench's suites, cases and forms are found by their names."""
    import torch

    collect = importlib.import_module("gpu_collect")
    pytest.importorskip("triton")
    machine = Machine(torch.device("cuda"), torch.bfloat16, False, 1e9, 1e12)
    names = [
        f"{case.suite} | {case.name} | {getattr(form, 'name', form)}"
        for module in (scan_cases, sparse_cases)
        for cases in (module.cases, module.plans)
        for case in cases(machine)
        for form in case.forms
    ]
    patterns = [
        shlex.split(command)[-1]
        for piece in (gpu.bench, gpu.baselines, gpu.profile)
        for _, commands in piece(Path("out"))
        for command in commands
    ]
    chosen = [[n for n in names if re.search(pattern, n)] for pattern in patterns]
    assert all(0 < len(found) < 100 for found in chosen), list(map(len, chosen))
    for suite, case, *_ in collect.AIMS:
        assert any(f"{suite} | {case} | kernel" in found for found in chosen)


def test_the_docs_show_what_the_files_say(gpu):
    collect = importlib.import_module("gpu_collect")
    for page, text in collect.tables(ROOT).items():
        current = (ROOT / page).read_text()
        assert collect.between_marks(current, text) == current, "run scripts/gpu_collect.py"
