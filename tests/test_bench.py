"""The bench runs from end to end, and its other forms of the scan compute the same."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from kernels.bench import cpu_cases, report, timing
from kernels.bench.scan_cases import both
from kernels.bench.timing import Case, Form, Machine, Row
from ratplus_exp import bench, latency

MACHINE = Machine(torch.device("cpu"), torch.float32, dry=True, bandwidth=1e9, matmul=1e12)


def loop(z, k, v):
    """Eq. 1 in float64, token by token."""
    z, k, v = (x.double() for x in (z, k, v))
    outs = []
    for x in (k, v):
        state, out = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = torch.sigmoid(z[:, t]) * state + torch.sigmoid(-z[:, t]) * x[:, t]
            out.append(state)
        outs.append(torch.stack(out, dim=1))
    return tuple(outs)


@pytest.mark.parametrize("form", cpu_cases.FORMS)
@pytest.mark.parametrize("length", [1, 7, 70])
def test_every_form_of_the_scan_is_the_same_operation(form, length):
    generator = torch.Generator().manual_seed(length)
    inputs = [torch.randn(2, length, 2, 3, generator=generator) for _ in range(3)]
    run = cpu_cases.FORMS[form]
    for out, wanted in zip(run(*inputs), loop(*inputs), strict=True):
        torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-5)
    exact = both(loop)(*(x.double() for x in inputs))
    for out, wanted in zip(both(run)(*inputs), exact, strict=True):
        torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_row_says_how_far_a_form_is_from_its_floor_and_from_the_truth():
    case = Case(
        "suite", "case", lambda seed: (torch.ones(4),),
        [Form("right", lambda x: 2 * x), Form("wrong", lambda x: 2.2 * x)],
        bytes=1e6, flops=2e9, reference=lambda x: 2 * x,
    )  # fmt: skip
    right, wrong = timing.measure(case, MACHINE)
    assert right.floor == pytest.approx(2e-3)  # 2e9 FLOP at 1e12 a second; the bytes take 1e-3
    assert right.seconds and right.seconds > 0
    assert right.error == 0 and wrong.error == pytest.approx(0.1)


def test_a_form_that_fails_is_a_row_without_a_number():
    def missing(_):
        import a_package_that_is_not_there  # type: ignore  # noqa: F401

    def broken(_):
        raise RuntimeError("first line\nsecond line")

    forms = [Form("a", missing), Form("b", broken), Form("c", broken, gpu=True)]
    rows = list(timing.measure(Case("s", "c", lambda seed: (1,), forms), MACHINE))
    assert [row.seconds for row in rows] == [None] * 3
    assert [row.note for row in rows] == [
        "not installed: a_package_that_is_not_there",
        "failed: RuntimeError: first line",
        "needs a GPU",
    ]


def test_the_table_shows_time_floor_and_ratios():
    rows = [
        Row("scan", "T=8", "kernel", seconds=2e-5, floor=1e-5, bytes=3e9),
        Row("scan", "T=8", "torch", seconds=5e-4, floor=1e-5, error=1e-3),
        Row("scan", "T=8", "other", note="not installed: other"),
    ]
    about = {
        "device": "D",
        "date": "2026",
        "commit": "c",
        "command": "x",
        "versions": {"torch": "2"},
    }
    text = report.markdown(rows, MACHINE, about | {"threads": 1})
    assert "| T=8 | kernel | 20 µs | 3 |  | 10 µs | 2.00 | 1.00 |" in text
    assert "| T=8 | torch | 500 µs |  |  | 10 µs | 50.00 | 25.00 | 1.0e-03 |" in text
    assert "| T=8 | other | — |" in text and "not installed: other |" in text


def test_a_compiled_form_that_does_not_finish_is_timed_out(monkeypatch):
    monkeypatch.setattr(cpu_cases, "TIME_LIMIT", 0.05)
    rows = list(cpu_cases._with_time_limit("log-depth, compiled", (1, 1, 2), (4, 8), MACHINE))
    assert [(row.case, row.note, row.seconds) for row in rows[::2]] == [
        ("B=1 T=4 H=1 D=2", "timed out", None),
        ("B=1 T=8 H=1 D=2", "timed out", None),
    ]
    assert {row.suite for row in rows} == set(cpu_cases.SUITES)


def test_models_are_measured_with_every_method():
    rows = list(latency.rows(MACHINE))
    names = {variant.name for variant in latency.variants(16, 4)}
    assert len(names) == 6
    for suite in latency.SUITES:
        assert {row.form for row in rows if row.suite == suite and row.seconds} == names


def test_without_a_gpu_the_way_out_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="make bench-cpu"):
        bench.main([])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parts", "suites"),
    [(["scan", "plans"], {"memory"}), (["sparse"], {"Quest", "MoBA", "SnapKV"})],
    ids=["scan", "sparse"],
)
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
    reason="needs Triton's interpreter",
)
def test_a_dry_run_measures_every_kernel_and_writes_its_report(parts, suites, tmp_path):
    bench.main(["--dry", "--only", *parts, "--out", str(tmp_path)])
    record = json.loads((tmp_path / "bench.json").read_text())
    rows = [Row(**row) for row in record["rows"]]
    failed = [f"{row.suite}: {row.form}: {row.note}" for row in rows if "failed" in row.note]
    assert not failed
    assert {row.suite.split(",")[0].split(" ")[0] for row in rows} == suites
    measured = [row for row in rows if row.note != "needs a GPU"]
    assert all(row.seconds and (row.error or 0) < 1e-4 for row in measured)
    assert "kernel" in {row.form for row in measured} or parts == ["plans"]
    assert "times mean nothing" in (tmp_path / "bench.md").read_text()
    assert (tmp_path / "bench.png").stat().st_size > 10_000
