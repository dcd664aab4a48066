"""Timing: medians under CUDA-graph replay on a GPU, plain medians on a CPU, and floors.

A floor is the larger of two times: the bytes that must move over the bandwidth of a device copy,
and the floating-point operations that must be done over the rate of a large matrix product. Both
rates are measured on the device in the same run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

_BUDGET = 0.3  # seconds of repeats for one number
_ROTATED = 400e6  # bytes to touch before a set of inputs comes round again: over any L2 cache
_MEMORY = 20e9  # bytes that all sets of inputs may take
_MOST_COPIES = 4096


class Form(NamedTuple):
    """One way to compute something.

    run: takes what `setup` made of a case's inputs (or the inputs themselves), and is timed.
    gpu: needs a GPU (a compiler for it, a library); left out of dry runs.
    check: its outputs are laid out as the reference's.
    executed: given a case's inputs, the FLOPs that it does there, where it must do more than
        `Case.flops`.
    """

    name: str
    run: Callable[..., Any]
    setup: Callable[..., tuple] | None = None
    gpu: bool = False
    check: bool = True
    executed: Callable[..., float] | None = None


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
    executed: float = 0  # FLOPs really done, where a form must do more
    error: float | None = None  # ‖out − reference‖ / ‖reference‖, the reference in float64
    gpu_seconds: float | None = None  # of all kernels together, where seconds is wall time
    peak_memory: int | None = None  # allocated while running, beside the inputs
    note: str = ""


@dataclass(frozen=True)
class Case:
    """What to compute: inputs, the same for the same seed; the least work; and forms to compare.

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
    wanted = cache(lambda: _exact(case))
    for form in case.forms:
        row = Row(case.suite, case.name, form.name, None, machine.floor(case))
        row.bytes, row.flops = case.bytes, case.flops
        if form.gpu and machine.device.type != "cuda":
            row.note = "needs a GPU"
        else:
            _fill(row, form, case, machine, wanted if form.check else lambda: None)
            if machine.device.type == "cuda":
                torch.cuda.empty_cache()  # now that nothing holds its inputs and its graph any more
        yield row


def _fill(
    row: Row, form: Form, case: Case, machine: Machine, wanted: Callable[[], list[Tensor] | None]
) -> None:
    cuda = machine.device.type == "cuda"
    try:
        first = case.inputs(0)
        prepared = [form.setup(*first) if form.setup else first]
        if form.executed:
            row.executed = form.executed(*first)
        if cuda:
            # The next outputs are likely to get this memory: what isn't written then is NaN.
            _poison(form.run(*prepared[0]))
        out = form.run(*prepared[0])
        row.error = error(out, wanted())
        if cuda:
            held = nbytes(first) + nbytes(out) + (nbytes(prepared[0]) if form.setup else 0)
            memory = min(_MEMORY, torch.cuda.mem_get_info()[0] / 2)
            for seed in range(1, copies(nbytes(first), case.bytes, held, memory)):
                inputs = case.inputs(seed)
                prepared.append(form.setup(*inputs) if form.setup else inputs)
        del out
        row.peak_memory = _peak_memory(lambda: form.run(*prepared[0]), machine.device)

        def run() -> list[Any]:
            return [form.run(*x) for x in prepared]

        if cuda:
            row.seconds, replayed = _replayed(run, wanted, row)
            row.error = replayed if row.error is None else max(row.error, replayed or 0.0)
        else:
            row.seconds = _seconds(run, machine.device, machine.dry)
        row.seconds /= len(prepared)
    except ImportError as missing:
        row.note = f"not installed: {missing.name}"
    except torch.OutOfMemoryError:
        row.note = "out of memory"
    except Exception as problem:
        row.note = failure(problem)


def copies(inputs: float, touched: float, held: float, memory: float = _MEMORY) -> int:
    """How many sets of inputs to go round, so that none is in the L2 cache when its turn comes.

    inputs: bytes of one set; touched: those that must move, as a sparse form reads few of its
    inputs; held: bytes that a set takes, with all that is made of it.
    """
    enough = 1 + int(_ROTATED / max(1, min(inputs, touched or inputs)))
    return max(1, min(enough, int(memory / max(1, held)), _MOST_COPIES))


def failure(problem: Exception) -> str:
    return f"failed: {type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:120]}"


def _seconds(run: Callable[[], Any], device: torch.device, once: bool = False) -> float:
    """Median seconds of a call."""
    if device.type == "cuda":
        return _replayed(run)[0]
    took = [_host_seconds(run)]
    if not once:
        more = 0 if took[0] > 0.5 else max(4, min(50, int(_BUDGET / took[0])))
        took += [_host_seconds(run) for _ in range(more)]
    return median(took)


def _replayed(
    run: Callable[[], Any],
    wanted: Callable[[], list[Tensor] | None] = lambda: None,
    row: Row | None = None,
) -> tuple[float, float | None]:
    """Median seconds of a call under CUDA-graph replay, and the error of what a replay leaves in
    its first outputs. Without a graph row gets a note that says so, and there is no error."""
    run()
    try:
        replay, outputs = _captured(run)
    except Exception as problem:
        if row is not None:
            row.note = f"no CUDA graph ({type(problem).__name__}): timed with its launches"
        return _device_median(run), None
    seconds = _device_median(replay)
    return seconds, checked(replay, outputs, wanted())


def checked(replay: Callable[[], Any], outputs: Any, wanted: list[Tensor] | None) -> float | None:
    """The error of what one replay writes: outputs, one a set of inputs, are NaN before it."""
    _poison(outputs)
    replay()
    for out in outputs if isinstance(outputs, list) else []:
        if any(x.isnan().any() for x in tensors(out) if x.is_floating_point()):
            raise ValueError("outputs are NaN after a replay")
    return error(outputs[0], wanted) if wanted else None


def _device_median(call: Callable[[], Any]) -> float:
    repeats = max(5, min(200, int(_BUDGET / _device_seconds(call))))
    return median(_device_seconds(call) for _ in range(repeats))


def _captured(run: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
    """A CUDA graph of the call, and the call's outputs, which every replay writes anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph.replay, outputs


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


def _exact(case: Case) -> list[Tensor] | None:
    """The reference's outputs on the first inputs, in float64."""
    if case.reference is None:
        return None
    return tensors(case.reference(*(_double(x) for x in case.inputs(0))))


def error(out: Any, wanted: list[Tensor] | None) -> float | None:
    """‖out − wanted‖ / ‖wanted‖, the largest of all tensors'; NaN where out has one."""
    if wanted is None:
        return None
    pairs = zip(wanted, tensors(out), strict=False)
    return max(
        (float((b.double().reshape(a.shape) - a).norm() / a.norm()) for a, b in pairs),
        key=lambda x: (math.isnan(x), x),
    )


def _poison(out: Any) -> None:
    for x in tensors(out):
        if x.is_floating_point():
            x.detach().fill_(math.nan)


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def tensors(x: Any) -> list[Tensor]:
    """All tensors of what a form takes or gives."""
    if isinstance(x, Tensor):
        return [x]
    return [y for part in x for y in tensors(part)] if isinstance(x, list | tuple) else []


def nbytes(x: Any) -> int:
    return sum(y.nbytes for y in tensors(x))
