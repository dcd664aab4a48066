"""Measure the kernels and the models on this machine: `make bench` (GPU), `make bench-cpu`.

bench.json, a table (bench.md) and a plot (bench.png) go into outputs/bench/<device>/, anew after
every row, so that a run that is cut short leaves what it has. Runs of parts (--only, --match) add
to what the folder has, and take the place of what they measure again.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ratplus_bench import cpu_cases, cpu_models, latency, report, scan_cases, sparse_cases, timing
from ratplus_bench.timing import Case, Machine, Row
from ratplus_exp.provenance import REPOSITORY, provenance
from ratplus_kernels.dispatch import interpreted

PACKAGES = ("triton", "fla-core", "accelerated-scan", "flash-attn")
PARTS = ("scan", "sparse", "models", "plans")


def main(argv: list[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    dry = arguments.dry
    if arguments.cpu and (arguments.match or {*(arguments.only or ())} - {"scan", "models"}):
        sys.exit("--match and other parts than scan and models: leave them out with --cpu")
    if device.type == "cpu" and not (arguments.cpu or dry):
        sys.exit("no CUDA GPU is there: run `make bench-cpu`, or with --dry to test the bench")
    if dry and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("a dry run without a GPU needs TRITON_INTERPRET=1 in its environment")
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # a baseline is compiled anew for every shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    about = _about(arguments)
    folder = arguments.out or REPOSITORY / "outputs" / "bench" / _slug(about["device"])
    machine = Machine.measure(device, dtype, dry)
    about = report.about_run(about, machine)
    try:
        earlier = report.read(folder, about)
    except ValueError as error:
        sys.exit(str(error))
    run = report.Run(about, [])
    with interpreted() if dry and device.type == "cpu" else nullcontext():
        for row in _rows(machine, arguments):
            run.rows.append(row)
            print(_line(row, machine), flush=True)
            report.write(folder, [*earlier, run], plot=False)
    if not run.rows:
        sys.exit(f"--match {arguments.match}: no case has that in its name")
    report.write(folder, [*earlier, run])
    for suite, cases in report.fastest_plans([run]).items():
        for case, plan in cases.items():
            print(f"Fastest: {suite}, {case}: {plan}")
    print(f"Written: {folder}/bench.json, bench.md, bench.png")


def _rows(machine: Machine, arguments: argparse.Namespace) -> Iterator[Row]:
    def matches(name: str) -> bool:
        return arguments.match in name

    def measured(cases: Iterator[Case]) -> Iterator[Row]:
        for case in cases:
            if matches(f"{case.suite} | {case.name}"):
                yield from timing.measure(case, machine)

    if arguments.cpu:
        parts = {"scan": cpu_cases.rows, "models": cpu_models.rows}
        for name in arguments.only or parts:
            yield from parts[name](machine)
        return
    on_gpu: dict[str, Callable[[], Iterator[Row]]] = {
        "scan": lambda: measured(scan_cases.cases(machine)),
        "sparse": lambda: measured(sparse_cases.cases(machine)),
        "models": lambda: latency.rows(machine, matches),
        "plans": lambda: measured(scan_cases.plans(machine)),
    }
    for name in arguments.only or PARTS:
        yield from on_gpu[name]()


def _about(arguments: argparse.Namespace) -> dict[str, Any]:
    about = provenance({key: str(value) for key, value in vars(arguments).items()})
    if arguments.cpu:  # whether there is a GPU or not
        about["device"] = f"{platform.processor() or platform.machine()} CPU"
    about["command"] = "python -m ratplus_bench " + " ".join(sys.argv[1:])
    for name in PACKAGES:
        try:
            about["versions"][name] = version(name)
        except PackageNotFoundError:
            continue
    about["versions"]["CUDA"] = torch.version.cuda or "none"
    return about


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _line(row: Row, machine: Machine) -> str:
    floor = f" = {row.seconds / row.floor:.2f} × floor" if row.seconds and row.floor else ""
    note = report.note(row, machine.matmul)
    took = f"{report.seconds(row.seconds)}{floor}"
    return f"{row.suite} | {row.case} | {row.form}: {took}{f' ({note})' if note else ''}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ratplus_bench", description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="the CPU's part: scan and models")
    parser.add_argument(
        "--dry", action="store_true", help="tiny shapes once, interpreted without a GPU: a test"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        help="parts of the GPU's run (all); plans: the ways to cut up the scan",
    )
    parser.add_argument(
        "--match",
        default="",
        metavar="TEXT",
        help="of these, the cases with TEXT in `SUITE | CASE`, for instance 'backward', '7B'",
    )
    parser.add_argument("--out", type=Path, help="where to write (outputs/bench/<device>)")
    return parser


if __name__ == "__main__":
    main()
