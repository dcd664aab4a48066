"""The bench runs from end to end, and its other forms of the scan compute the same."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from ratplus_bench import __main__ as bench
from ratplus_bench import models, report, scan_cases, sparse_cases, timing
from ratplus_bench.scan_cases import both
from ratplus_bench.timing import Case, Form, Machine, Row
from ratplus_exp.methods import Engine, MoBA
from ratplus_exp.provenance import REPOSITORY
from ratplus_kernels import memory_scan

MACHINE = Machine(torch.device("cpu"), torch.float32, dry=True, bandwidth=1e9, matmul=1e12)


@pytest.mark.parametrize("form", scan_cases.CPU_FORMS)
@pytest.mark.parametrize("length", [1, 7, 70])
def test_every_form_of_the_scan_is_the_same_operation(form, length):
    generator = torch.Generator().manual_seed(length)
    inputs = [torch.randn(2, length, 2, 3, generator=generator) for _ in range(3)]
    doubles = [x.double() for x in inputs]  # tests/kernels proves memory_scan on float64
    run = scan_cases.CPU_FORMS[form]
    for out, wanted in zip(run(*inputs)[:2], memory_scan(*doubles)[:2], strict=True):
        torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-5)
    for out, wanted in zip(both(run)(*inputs), both(memory_scan)(*doubles), strict=True):
        torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-5)


def test_a_row_says_how_far_a_form_is_from_its_floor_and_from_the_truth():
    case = Case(
        "suite", "case", lambda seed: (torch.ones(4),),
        {"right": Form(lambda x: 2 * x), "wrong": Form(lambda x: 2.2 * x)},
        bytes=1e6, flops=2e9, exact=True,
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

    forms = {"a": Form(missing), "b": Form(broken)}
    rows = list(timing.measure(Case("s", "c", lambda seed: (1,), forms), MACHINE))
    assert [row.seconds for row in rows] == [None] * 2
    absent = "not installed: a_package_that_is_not_there"
    assert [x.note for x in rows] == [absent, "failed: RuntimeError: first line"]


@pytest.mark.parametrize(
    ("inputs", "touched", "held", "wanted"),
    [
        (67e6, 5.2e6, 68e6, 77),  # Quest at 4096 tokens: few of its inputs are read
        (67e6, 0, 134e6, 6),  # nothing said: all inputs are
        (1e5, 1e5, 2e5, 4001),  # a memory step: many, to touch 400 MB
        (1e3, 1e3, 1e3, 4096),  # but not without end
        (2e9, 167e6, 2e9, 3),
        (2e9, 10e6, 2e9, 10),  # 20 GB of memory at most
        (40e9, 40e9, 80e9, 1),
    ],
)
def test_inputs_rotate_until_none_is_in_the_l2_cache(inputs, touched, held, wanted):
    assert timing.copies(inputs, touched, held) == wanted


def test_inputs_leave_the_devices_own_generator_alone():
    # After a capture that failed it may raise wherever it is used.
    before = torch.get_rng_state()
    for case in (*scan_cases.cases(MACHINE), *sparse_cases.cases(MACHINE)):
        for form in case.forms.values():
            inputs = case.inputs(0)
            if form.setup:
                form.setup(*inputs)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_replay_leaves_is_checked():
    outputs = [(torch.zeros(4), torch.zeros(2, dtype=torch.long)) for _ in range(2)]
    wanted = [torch.ones(4, dtype=torch.float64)]

    def replay(fills):
        return lambda: [out[0][:n].fill_(x) for out, (n, x) in zip(outputs, fills, strict=True)]

    assert timing.checked(replay([(4, 1.0), (4, 3.0)]), outputs, wanted) == 0
    assert timing.checked(replay([(4, 1.5), (4, 3.0)]), outputs, wanted) == 0.5
    assert timing.checked(replay([(4, 1.0), (4, 3.0)]), outputs, None) is None
    for fills in ([(3, 1.0), (4, 3.0)], [(4, 1.0), (3, 3.0)]):  # one is not written
        with pytest.raises(ValueError, match="NaN after a replay"):
            timing.checked(replay(fills), outputs, wanted)


def a_run(rows, **about):
    fields = {"device": "D", "date": "2026", "commit": "c", "command": "x", "threads": 1}
    rates = {"copy_bytes_per_second": 1e9, "matmul_flop_per_second": 1e12}
    kind = {"dtype": "float32", "dry": True, "versions": {"torch": "2"}}
    return report.Run(fields | kind | rates | about, rows)


def test_the_table_shows_time_floor_and_ratios():
    rows = [
        Row("scan", "T=8", "kernel", seconds=2e-5, floor=1e-5, bytes=3e9),
        Row("scan", "T=8", "torch", seconds=5e-4, floor=1e-5, error=1e-3),
        Row("scan", "T=8", "other", note="not installed: other"),
        Row("scan", "T=8", "tiles", seconds=1e-3, flops=1e8, executed=5e8, gpu_seconds=5e-4),
    ]
    text = report.markdown([a_run(rows)])
    assert "| T=8 | kernel | 20 µs | 3 |  | 10 µs | 2.00 | 1.00 |" in text
    assert "| T=8 | torch | 500 µs |  |  | 10 µs | 50.00 | 25.00 | 1.0e-03 |" in text
    assert "| T=8 | other | — |" in text and "not installed: other |" in text
    assert "GPU 500 µs; 5.00 × the FLOPs on the tiles it computes, 50% of the matrix" in text


def test_runs_of_parts_add_up_and_the_later_row_counts(tmp_path):
    first = a_run([Row("s", "a", "kernel", 1.0), Row("s", "a", "torch", 2.0)], command="first")
    second = a_run([Row("t: plans", "b", p, s) for p, s in (("P", 3e-6), ("Q", 2e-6))])
    report.write(tmp_path, [first], plot=False)
    report.write(tmp_path, [*report.read(tmp_path, second.about), second], plot=False)
    again = a_run([Row("s", "a", "kernel", 0.5)], command="again")
    report.write(tmp_path, [*report.read(tmp_path, again.about), again], plot=True)

    found = report.read(tmp_path, again.about)
    assert [run.about["command"] for run in found] == ["first", "x", "again"]
    assert [[row.form for row in run.rows] for run in found] == [["torch"], ["P", "Q"], ["kernel"]]
    text = (tmp_path / "bench.md").read_text()
    assert text.index("| a | kernel | 500 ms") < text.index("| a | torch | 2 s")
    assert "| 4.00 |" in text  # of the first form, which the later run measured
    assert "- t: plans, b: Q 2 µs" in text
    assert json.loads((tmp_path / "bench.json").read_text())["fastest_plans"] == {
        "t: plans": {"b": "Q 2 µs"}
    }
    with pytest.raises(
        ValueError, match="device=D and this run E: remove it, or set another folder"
    ):
        report.read(tmp_path, a_run([], device="E").about)
    (tmp_path / "bench.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"bench\.json is not a benchmark result: remove it"):
        report.read(tmp_path, again.about)


def test_the_reference_is_read_and_written_as_it_stands(tmp_path):
    folder = REPOSITORY / "outputs/reference/bench/x86-64-cpu"
    run = json.loads((folder / "bench.json").read_text())["runs"][0]
    report.write(tmp_path, report.read(folder, run["about"]), plot=False)
    for name in ("bench.json", "bench.md"):
        assert (tmp_path / name).read_text() == (folder / name).read_text()


def test_flex_attention_is_charged_for_the_tiles_that_it_computes():
    """Queries that agree need few blocks a tile; random ones nearly all of them."""
    done = []
    for correlated in (False, True):
        shape, size, top_k = (1, 2, 2, 1024, 16), 16, 4
        case = sparse_cases.moba(shape, size, top_k, correlated, MACHINE)
        q, k, v, means = case.inputs(0)
        assert q.std() == pytest.approx(1, abs=0.1)
        scores = (q @ means.transpose(-1, -2)).masked_fill(
            torch.arange(64) >= torch.arange(1024)[:, None] // 16, -torch.inf
        )
        own = torch.arange(1024) // 16
        tiles = 0
        for head in range(2):
            for start in range(0, 1024, 128):
                blocks = {0, *own[start : start + 128].tolist()}
                for t in range(start, start + 128):
                    ranked = scores[0, head, t, 1:].argsort(descending=True) + 1
                    free = [b for b in ranked.tolist()[:2] if b < own[t]]
                    blocks.update(free)
                tiles += len(blocks)
        done.append(sparse_cases.tile_flops(Engine(MoBA(size, top_k)), q, means))
        assert done[-1] == tiles * 128 * 16 * 4 * 16
    assert done[1] < 0.8 * done[0]


def test_models_are_measured_with_every_method_against_what_it_reads():
    rows = {(row.suite, row.form): row for row in models.rows(MACHINE)}
    forms = {"attention, dense"} | {
        f"RAT+, {name}" for name in ("dense", "Quest", "MoBA", "SnapKV", "dilated")
    }
    assert {form for (_, form), row in rows.items() if row.seconds} == forms
    prefill, decode, throughput = models.SUITES
    assert len(rows) == 3 * len(forms)
    # 16 tokens, blocks of 4, of which two are selected; two heads of size 4, one layer, fp32.
    cached = {form: rows[throughput, form].bytes / (2 * 8 * 4) for form in forms}
    assert cached["RAT+, dense"] == cached["RAT+, MoBA"] == 17
    assert cached["RAT+, Quest"] == 4 + 1 + 16 / 4  # the first block, the own one, the bounds
    assert cached["RAT+, SnapKV"] == 9  # eight are kept
    assert cached["RAT+, dilated"] == 5 + 1 + 3  # window and own, first, multiples before
    dense, moba = (rows[prefill, f"RAT+, {name}"].flops for name in ("dense", "MoBA"))
    keys = [t + 1 if t < 8 else 4 + t % 4 + 1 for t in range(16)]
    assert dense - moba == pytest.approx(4 * 2 * 4 * (16 * 17 / 2 - sum(keys)))
    weights = rows[decode, "RAT+, dense"].bytes - rows[throughput, "RAT+, dense"].bytes
    assert weights == rows[decode, "RAT+, Quest"].bytes - rows[throughput, "RAT+, Quest"].bytes > 0


def test_models_on_a_cpu_stand_beside_their_floors_and_transformers():
    rows = list(models.cpu_rows(MACHINE))
    assert all(row.seconds for row in rows)
    assert all(row.floor for row in rows if "kvpress" not in row.form)
    sparse = ("Quest", "MoBA", "SnapKV", "dilated")
    pocket = {"attention, dense", "RAT+, dense"} | {f"RAT+, {name}" for name in sparse}
    llama = {"dense", "transformers, SDPA", *sparse}
    if models.KVPRESS.exists():
        llama.add("SnapKV, kvpress")
    for suite in models.SUITES[:2]:
        for case, wanted in (("pocket B=2 T=992", pocket), ("Llama B=1 T=64 layers=1", llama)):
            assert {x.form for x in rows if (x.suite, x.case) == (suite, case)} == wanted


def test_without_a_gpu_the_way_out_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="make bench-cpu"):
        bench.main([])


def test_parts_are_of_the_gpus_run():
    with pytest.raises(SystemExit, match="leave them out with --cpu"):
        bench.main(["--cpu", "--match", "T=256"])


dry = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
    reason="needs Triton's interpreter",
)


@dry
def test_parts_run_one_after_the_other_end_in_one_report(tmp_path, capsys):
    for part in (["scan", "--match", "memory step"], ["sparse", "--match", "^SnapKV gather"]):
        bench.main(["--dry", "--out", str(tmp_path), "--only", *part])
    runs = json.loads((tmp_path / "bench.json").read_text())["runs"]
    suites = [{row["suite"] for row in run["rows"]} for run in runs]
    assert suites == [{"memory step"}, {"SnapKV gather"}]
    text = (tmp_path / "bench.md").read_text()
    assert all(f"## {suite}\n" in text for part in suites for suite in part)
    with pytest.raises(SystemExit, match="no case has that"):
        bench.main(["--dry", "--out", str(tmp_path), "--only", "plans", "--match", "nothing"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parts", "suites"),
    [(["scan", "plans"], {"memory", "Quest", "MoBA"}), (["sparse"], {"Quest", "MoBA", "SnapKV"})],
    ids=["scan", "sparse"],
)
@dry
def test_a_dry_run_measures_every_kernel_and_writes_its_report(parts, suites, tmp_path):
    bench.main(["--dry", "--only", *parts, "--out", str(tmp_path)])
    record = json.loads((tmp_path / "bench.json").read_text())
    rows = [Row(**row) for run in record["runs"] for row in run["rows"]]
    failed = [f"{row.suite}: {row.form}: {row.note}" for row in rows if "failed" in row.note]
    assert not failed
    assert {row.suite.split(",")[0].split(" ")[0] for row in rows} == suites
    assert all(row.seconds and (row.error or 0) < 1e-4 for row in rows)
    assert "kernel" in {row.form for row in rows}
    assert "times mean nothing" in (tmp_path / "bench.md").read_text()
    assert (tmp_path / "bench.png").stat().st_size > 10_000
