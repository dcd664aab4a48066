"""Measure the kernels and the models on this machine: `make bench` (GPU), `make bench-cpu`.

One run writes bench.json, a table (bench.md) and a plot (bench.png) into outputs/bench/<device>/,
anew after every case, so that a run that is cut short leaves what it has.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kernels.bench import cpu_cases, report, scan_cases, sparse_cases, timing
from kernels.bench.timing import Case, Machine, Row
from kernels.dispatch import interpreted
from ratplus_exp import latency
from ratplus_exp.provenance import REPOSITORY, provenance

PACKAGES = ("triton", "fla-core", "accelerated-scan", "flash-attn")


def main(argv: list[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    dry = arguments.dry
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
    rows: list[Row] = []
    with interpreted() if dry and device.type == "cpu" else nullcontext():
        for row in _rows(machine, arguments):
            rows.append(row)
            print(_line(row), flush=True)
            report.write(folder, rows, machine, about, plot=False)
    report.write(folder, rows, machine, about)
    print(f"Written: {folder}/bench.json, bench.md, bench.png")


def _rows(machine: Machine, arguments: argparse.Namespace) -> Iterator[Row]:
    parts: dict[str, Callable[[Machine], Iterator[Row]]]
    if arguments.cpu:
        parts = {"cpu": cpu_cases.rows}
    else:
        parts = {
            "scan": lambda machine: _measured(scan_cases.cases(machine), machine),
            "sparse": lambda machine: _measured(sparse_cases.cases(machine), machine),
            "models": latency.rows,
            "plans": lambda machine: _measured(scan_cases.plans(machine), machine),
        }
    for name in arguments.only or [name for name in parts if name != "plans"]:
        yield from parts[name](machine)


def _measured(cases: Iterator[Case], machine: Machine) -> Iterator[Row]:
    for case in cases:
        yield from timing.measure(case, machine)


def _about(arguments: argparse.Namespace) -> dict[str, Any]:
    about = provenance({key: str(value) for key, value in vars(arguments).items()})
    about["command"] = "python -m ratplus_exp.bench " + " ".join(sys.argv[1:])
    for name in PACKAGES:
        try:
            about["versions"][name] = version(name)
        except PackageNotFoundError:
            continue
    about["versions"]["CUDA"] = torch.version.cuda or "none"
    return about


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _line(row: Row) -> str:
    floor = f" = {row.seconds / row.floor:.2f} × floor" if row.seconds and row.floor else ""
    note = f" ({row.note})" if row.note else ""
    return f"{row.suite} | {row.case} | {row.form}: {report.seconds(row.seconds)}{floor}{note}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ratplus_exp.bench", description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="the CPU's part: forms of the scan")
    parser.add_argument(
        "--dry", action="store_true", help="tiny shapes once, interpreted without a GPU: a test"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=["scan", "sparse", "models", "plans"],
        help="parts of the GPU's run; plans, ways to cut up the scan, is not in it by default",
    )
    parser.add_argument("--out", type=Path, help="where to write (outputs/bench/<device>)")
    return parser


if __name__ == "__main__":
    main()
