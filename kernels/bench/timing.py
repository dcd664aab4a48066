"""Timing: medians under CUDA-graph replay on a GPU, plain medians on a CPU, and floors.

A floor is the larger of two times: the bytes that must move over the bandwidth of a device copy,
and the floating-point operations that must be done over the rate of a large matrix product. Both
rates are measured on the device in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

_BUDGET = 0.3  # seconds of repeats for one number
_ROTATED = 400e6  # bytes of inputs to go round, well over any GPU's L2 cache


class Form(NamedTuple):
    """One way to compute something.

    run: takes what `setup` made of a case's inputs (or the inputs themselves), and is timed.
    gpu: needs a GPU (a compiler for it, a library); left out of dry runs.
    check: its outputs are laid out as the reference's.
    """

    name: str
    run: Callable[..., Any]
    setup: Callable[..., tuple] | None = None
    gpu: bool = False
    check: bool = True


@dataclass
class Row:
    """One measured number: a form on a case, in seconds and bytes."""

    suite: str
    case: str
    form: str
    seconds: float | None = None
    floor: float | None = None
    bytes: float = 0
    flops: float = 0
    error: float | None = None  # ‖out − reference‖ / ‖reference‖, the reference in float64
    peak_memory: int | None = None  # allocated while running, beside the inputs
    note: str = ""


@dataclass(frozen=True)
class Case:
    """What to compute: inputs by seed, the work it takes at least, and the forms to compare.

    The first form is the one that the others are measured against. reference is given float64
    inputs, and its outputs are compared with every form's first outputs of the same number.
    """

    suite: str
    name: str
    inputs: Callable[[int], tuple]
    forms: Sequence[Form]
    bytes: float = 0
    flops: float = 0
    reference: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Machine:
    """The device, and the two rates that floors are made of."""

    device: torch.device
    dtype: torch.dtype
    dry: bool
    bandwidth: float  # bytes a second, read and written, of a device copy
    matmul: float  # FLOP a second of a large product in `dtype`

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype, dry: bool = False) -> Machine:
        large = device.type == "cuda"
        source = torch.randn(1 << (30 if large else 16 if dry else 24), device=device)
        target = torch.empty_like(source)
        copy = _seconds(lambda: target.copy_(source), device)
        size = 8192 if large else 64 if dry else 1024
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product = _seconds(lambda: a @ b, device)
        return cls(device, dtype, dry, 2 * source.nbytes / copy, 2 * size**3 / product)

    def floor(self, case: Case) -> float | None:
        return max(case.bytes / self.bandwidth, case.flops / self.matmul) or None


def measure(case: Case, machine: Machine) -> Iterator[Row]:
    """One row a form. A form that is not there or fails gives a row that says so, and no number."""
    for form in case.forms:
        row = Row(case.suite, case.name, form.name, None, machine.floor(case))
        row.bytes, row.flops = case.bytes, case.flops
        if form.gpu and machine.device.type != "cuda":
            row.note = "needs a GPU"
        else:
            _fill(row, form, case, machine)
        yield row


def _fill(row: Row, form: Form, case: Case, machine: Machine) -> None:
    try:
        first = case.inputs(0)
        copies = 1
        if machine.device.type == "cuda":
            copies = min(16, 1 + int(_ROTATED / max(1, _nbytes(first))))
        inputs = [first, *(case.inputs(seed) for seed in range(1, copies))]
        prepared = [form.setup(*x) if form.setup else x for x in inputs]
        out = form.run(*prepared[0])
        row.error = _error(out, case, first) if form.check else None
        del out
        row.peak_memory = _peak_memory(lambda: form.run(*prepared[0]), machine.device)
        row.seconds = _seconds(
            lambda: [form.run(*x) for x in prepared], machine.device, machine.dry, row
        ) / len(prepared)
    except ImportError as missing:
        row.note = f"not installed: {missing.name}"
    except torch.OutOfMemoryError:
        row.note = "out of memory"
    except Exception as problem:
        row.note = failure(problem)
    finally:
        if machine.device.type == "cuda":
            torch.cuda.empty_cache()


def failure(problem: Exception) -> str:
    return f"failed: {type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:120]}"


def _seconds(
    run: Callable[[], Any],
    device: torch.device,
    once: bool = False,
    row: Row | None = None,
) -> float:
    """Median seconds of a call; row gets a note where it could not be captured in a CUDA graph."""
    if device.type != "cuda":
        took = [_host_seconds(run)]
        if not once:
            more = 0 if took[0] > 0.5 else max(4, min(50, int(_BUDGET / took[0])))
            took += [_host_seconds(run) for _ in range(more)]
        return median(took)
    run()
    call = run
    try:
        call = _captured(run)
    except Exception as problem:
        if row is not None:
            row.note = f"no CUDA graph ({type(problem).__name__}): timed with its launches"
    repeats = max(5, min(200, int(_BUDGET / _device_seconds(call))))
    return median(_device_seconds(call) for _ in range(repeats))


def _captured(run: Callable[[], Any]) -> Callable[[], Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _host_seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _device_seconds(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _peak_memory(run: Callable[[], Any], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _error(out: Any, case: Case, inputs: tuple) -> float | None:
    if case.reference is None:
        return None
    wanted = case.reference(*(_double(x) for x in inputs))
    pairs = zip(_tensors(wanted), _tensors(out), strict=False)
    return max(float((b.double().reshape(a.shape) - a).norm() / a.norm()) for a, b in pairs)


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _tensors(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else [y for y in x if isinstance(y, Tensor)]


def _nbytes(x: tuple) -> int:
    return sum(y.nbytes for y in x if isinstance(y, Tensor))
