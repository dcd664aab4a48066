"""Which form of Eq. 1 is fastest on a CPU, where it trains the pocket models: T from 256 to 8192.

The compiled forms run in a process of their own with a time limit, since compiling for a CPU can
take minutes: `python -m ratplus_bench.cpu_cases FORM B H D T...` prints one row a line.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import Tensor

from ratplus_bench import scan_forms, timing
from ratplus_bench.scan_cases import both
from ratplus_bench.timing import Case, Form, Machine, Row
from ratplus_kernels.memory_scan import memory_scan_torch

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
SHAPES = ((3, 4, 32), (4, 4, 64))  # (B, H, D): the pocket tier's step of 1536 tokens, and a larger
SUITES = ("memory scan on a CPU, forward", "memory scan on a CPU, forward and backward")
TIME_LIMIT = 40.0  # seconds for all lengths of one compiled form


def _own(z: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return memory_scan_torch(z, k, v)[:2]


FORMS = {
    "torch (used in training)": _own,
    "naive loop": scan_forms.naive_loop,
    "log-depth": scan_forms.scan(scan_forms.log_depth),
    "chunked": scan_forms.scan(scan_forms.chunked),
    "torch.associative_scan": scan_forms.scan(scan_forms.associative),
}
COMPILED = {
    "log-depth, compiled": scan_forms.log_depth,
    "torch.associative_scan, compiled": scan_forms.associative,
}


def rows(machine: Machine, lengths: tuple[int, ...] = LENGTHS) -> Iterator[Row]:
    for shape in SHAPES:
        for length in lengths:
            for case in _cases(shape, length, FORMS):
                yield from timing.measure(case, machine)
        if not machine.dry:
            for name in COMPILED:
                yield from _with_time_limit(name, shape, lengths, machine)


def _cases(shape: tuple[int, int, int], length: int, forms: dict) -> Iterator[Case]:
    batch, heads, dim = shape
    size = batch * length * heads * dim

    def inputs(seed: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(batch, length, heads, dim, generator=generator) for _ in range(3))

    name = f"B={batch} T={length} H={heads} D={dim}"
    for suite, change, tensors in zip(SUITES, (_same, both), (5, 15), strict=True):
        yield Case(
            suite, name, inputs, [Form(form, change(run)) for form, run in forms.items()],
            bytes=4 * tensors * size, reference=change(_own) if length <= 1024 else None,
        )  # fmt: skip


def _same(run):
    return run


def _with_time_limit(
    form: str, shape: tuple[int, int, int], lengths: tuple[int, ...], machine: Machine
) -> Iterator[Row]:
    """Rows of a compiled form; "timed out" for the lengths that it did not get to."""
    sizes = [str(x) for x in (*shape, *lengths)]
    process = subprocess.Popen(
        [sys.executable, "-m", "ratplus_bench.cpu_cases", form, *sizes],
        env=os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # the compiler's own processes must go with it
    )
    note = "timed out"
    try:
        text, errors = process.communicate(timeout=TIME_LIMIT)
        if process.returncode:
            note = f"failed: {(errors.strip().splitlines() or ['?'])[-1][:120]}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
    found = [Row(**json.loads(line)) for line in text.splitlines() if line.startswith("{")]
    for length in lengths:
        for case in _cases(shape, length, {form: None}):
            match = [row for row in found if (row.suite, row.case) == (case.suite, case.name)]
            row = match[0] if match else Row(case.suite, case.name, form, note=note)
            row.floor, row.bytes = machine.floor(case), case.bytes
            yield row


def _compiled_rows(form: str, shape: tuple[int, int, int], lengths: list[int]) -> Iterator[Row]:
    machine = Machine(torch.device("cpu"), torch.float32, False, 1.0, 1.0)
    for length in lengths:
        run = scan_forms.scan(torch.compile(COMPILED[form], dynamic=False))
        for case in _cases(shape, length, {form: run}):
            yield from timing.measure(case, machine)


if __name__ == "__main__":
    torch.set_num_threads(1)
    b, h, d, *rest = (int(x) for x in sys.argv[2:])
    for row in _compiled_rows(sys.argv[1], (b, h, d), rest):
        print(json.dumps(asdict(row)), flush=True)
