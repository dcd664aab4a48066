"""Measure the kernels and the models on this machine: `make bench` (GPU), `make bench-cpu`.

bench.json, a table (bench.md) and a plot (bench.png) go into outputs/bench/<device>/. The first two
are written after every row, so that an interrupted run keeps its rows. Runs of parts (--only,
--match) add to the folder's rows and replace those that they measure again.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from ratplus_bench import models, report, scan_cases, sparse_cases
from ratplus_bench.timing import Case, Machine, Row, measure
from ratplus_exp.provenance import REPOSITORY, provenance
from ratplus_kernels.dispatch import interpreted

PACKAGES = ("triton", "fla-core", "flash-attn")
Cases = tuple[Callable[[Machine], Iterator[Case]], ...]
# Models have rows instead of cases.
PARTS: dict[str, Cases] = {
    "scan": (scan_cases.cases,),
    "sparse": (sparse_cases.cases,),
    "models": (),
    "plans": (scan_cases.plans, sparse_cases.plans),
}
CPU_PARTS: dict[str, Cases] = {"scan": (scan_cases.cpu_cases,), "models": ()}


def main(argv: list[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    dry, on_cpu = arguments.dry, device.type == "cpu"
    if arguments.cpu and (arguments.match or {*(arguments.only or ())} - {*CPU_PARTS}):
        sys.exit("--match and other parts than scan and models: leave them out with --cpu")
    if on_cpu and not (arguments.cpu or dry):
        sys.exit("no CUDA GPU is there: run `make bench-cpu`, or with --dry to test the bench")
    if on_cpu and dry and os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("a dry run without a GPU needs TRITON_INTERPRET=1 in its environment")
    if on_cpu:
        torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # a baseline is compiled again for every shape
    machine = Machine.measure(device, torch.float32 if on_cpu else torch.bfloat16, dry)
    run = report.Run(_about(arguments, machine), [])
    folder = arguments.out or REPOSITORY / "outputs" / "bench" / report.slug(run.about["device"])
    try:
        earlier = report.read(folder, run.about)
    except ValueError as error:
        sys.exit(str(error))
    with interpreted() if dry and on_cpu and not arguments.cpu else nullcontext():
        for row in _rows(machine, arguments):
            run.rows.append(row)
            print(_line(row, machine), flush=True)
            report.write(folder, [*earlier, run], plot=False)
    if not run.rows:
        sys.exit(f"--match {arguments.match}: no case has that in its name")
    report.write(folder, [*earlier, run])
    print(f"Written: {folder}/bench.json, bench.md, bench.png")


def _rows(machine: Machine, arguments: argparse.Namespace) -> Iterator[Row]:
    def matches(name: str) -> bool:
        return re.search(arguments.match, name) is not None

    parts = CPU_PARTS if arguments.cpu else PARTS
    for part in arguments.only or parts:
        if part == "models":
            yield from models.cpu_rows(machine) if arguments.cpu else models.rows(machine, matches)
        for case in (case for cases in parts[part] for case in cases(machine)):
            name = f"{case.suite} | {case.name} | "
            forms = [form for form in case.forms if matches(name + form)]
            yield from measure(case, machine, forms, arguments.once)


def _about(arguments: argparse.Namespace, machine: Machine) -> dict[str, Any]:
    about = provenance({key: str(value) for key, value in vars(arguments).items()})
    if arguments.cpu:  # whether there is a GPU or not
        about["device"] = f"{platform.processor() or platform.machine()} CPU"
    about["versions"] |= {x.name: x.version for x in distributions() if x.name in PACKAGES}
    about["versions"]["CUDA"] = torch.version.cuda or "none"
    return about | {
        "command": "python -m ratplus_bench " + " ".join(sys.argv[1:]),
        "dtype": str(machine.dtype).removeprefix("torch."),
        "dry": machine.dry,
        "copy_bytes_per_second": machine.bandwidth,
        "matmul_flop_per_second": machine.matmul,
    }


def _line(row: Row, machine: Machine) -> str:
    floor = f" = {row.seconds / row.floor:.2f} × floor" if row.seconds and row.floor else ""
    note = report.note(row, machine.matmul)
    text = f"{row.suite} | {row.case} | {row.form}: {report.seconds(row.seconds)}{floor}"
    return f"{text} ({note})" if note else text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ratplus_bench", description=__doc__)
    add = parser.add_argument
    add("--cpu", action="store_true", help="the CPU's part: scan and models")
    add("--dry", action="store_true", help="tiny shapes once, interpreted without a GPU: a test")
    add(
        "--only", nargs="+", choices=[*PARTS], help="parts of the run (all); plans: cuts of kernels"
    )
    add(
        "--once", action="store_true", help="not timed: each form compiled, then run for a profiler"
    )
    add("--match", default="", help="a regular expression for `SUITE | CASE | FORM`: 'backward'")
    add("--out", type=Path, help="where to write (outputs/bench/<device>)")
    return parser


if __name__ == "__main__":
    main()
