"""One way to time forms of a computation and to compare them.

A time is the median of CUDA-graph replays on a GPU (triton.testing) and of calls elsewhere
(torch.utils.benchmark). A floor is the larger of two times: the bytes that must move over the rate
of a device copy, and the FLOPs over the rate of a large matrix product, both measured first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from timeit import timeit
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.benchmark import Timer, timer

COLD = 400e6  # bytes between two uses of the same input: more than any L2 cache holds
MEMORY = 20e9  # bytes for all sets of inputs
PLANS = ": plans"  # ends the names of the suites whose forms are plans of a kernel


class Form(NamedTuple):
    """One way to compute a case.

    run: takes a case's inputs, or what `setup` makes of them before the clock starts.
    comparable: its first outputs are those of the case's first form.
    executed: its FLOPs on given inputs, if it has to compute more than the case requires.
    """

    run: Callable[..., Any]
    setup: Callable[..., tuple] = lambda *inputs: inputs
    comparable: bool = True
    executed: Callable[..., float] | None = None


class Case(NamedTuple):
    """inputs(seed), the forms by name, and the least bytes and FLOPs.

    Ratios are to the first form; exact: errors are measured against it on float64 inputs.
    """

    suite: str
    name: str
    inputs: Callable[[int], tuple]
    forms: dict[str, Form]
    bytes: float = 0
    flops: float = 0
    exact: bool = False

    def with_plans(self, run: Callable[..., Any], plans: Iterable[Any]) -> Case:
        """The case whose forms are plans of its kernel, the default first; run: takes a `plan`."""
        kernel = self.forms["kernel"]
        forms = {str(plan): kernel._replace(run=partial(run, plan=plan)) for plan in plans}
        return self._replace(suite=self.suite + PLANS, forms={"default": kernel} | forms)


@dataclass
class Row:
    """The measurement of one form, in seconds, bytes and FLOPs."""

    suite: str
    case: str
    form: str
    seconds: float | None = None
    floor: float | None = None
    bytes: float = 0
    flops: float = 0
    executed: float = 0
    error: float | None = None  # ‖out − reference‖ / ‖reference‖
    gpu_seconds: float | None = None  # of all kernels together, where seconds is wall time
    peak_memory: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Machine:
    """The device and its rates; dry: tiny shapes, timed once."""

    device: torch.device
    dtype: torch.dtype
    dry: bool = False
    bandwidth: float = 1.0  # bytes per second, read and written, of a device copy
    matmul: float = 1.0  # FLOP per second of a large product in `dtype`

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype, dry: bool = False) -> Machine:
        machine = cls(device, dtype, dry)
        timed = _replay_seconds if machine.cuda else machine.call_seconds
        source = torch.randn(1 << (30 if machine.cuda else 16 if dry else 24), device=device)
        target = torch.empty_like(source)
        size = 8192 if machine.cuda else 64 if dry else 1024
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        bandwidth = 2 * source.nbytes / timed(lambda: target.copy_(source))
        return cls(device, dtype, dry, bandwidth, 2 * size**3 / timed(lambda: a @ b))

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def set_floor(self, row: Row, bytes: float = 0, flops: float = 0) -> None:
        row.bytes, row.flops = bytes, flops
        row.floor = max(bytes / self.bandwidth, flops / self.matmul) or None

    def normal(self, seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
        """Random tensors from a new generator: a failed capture may break the device's default."""
        draw = torch.Generator(self.device).manual_seed(seed)
        empty = (torch.empty(x, dtype=self.dtype, device=self.device) for x in shapes)
        return [x.normal_(generator=draw) for x in empty]

    def allocated(self) -> int:
        """Bytes of GPU memory; peaks count from here on."""
        if not self.cuda:
            return 0
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self, before: int = 0) -> int | None:
        return torch.cuda.max_memory_allocated() - before if self.cuda else None

    def call_seconds(self, run: Callable[[], Any]) -> float:
        """Median time of a call: on a GPU wall time, launches included; on a CPU
        processor time of this thread, which other processes disturb less."""
        clock = timer if self.cuda else time.thread_time
        if self.dry:
            return timeit(run, timer=clock, number=1)
        threads = torch.get_num_threads()
        measured = Timer("run()", timer=clock, globals={"run": run}, num_threads=threads)
        return measured.blocked_autorange(min_run_time=0.3).median


@contextmanager
def noted(row: Row, machine: Machine) -> Iterator[None]:
    """An exception inside ends the measurement and becomes the row's note. The row gets the
    process's peak memory, unless it was set inside."""
    machine.allocated()
    try:
        yield
    except ImportError as missing:
        row.note = f"not installed: {missing.name}"
    except torch.OutOfMemoryError:
        row.note = row.note or "out of memory"
    except Exception as problem:
        text = (str(problem).splitlines() or [""])[0]
        row.note = f"failed: {type(problem).__name__}: {text[:120]}"
    if row.seconds and row.peak_memory is None:
        row.peak_memory = machine.peak()
    if machine.cuda:
        torch.cuda.empty_cache()  # inputs and graph have been released


def measure(
    case: Case, machine: Machine, forms: Collection[str] | None = None, once: bool = False
) -> Iterator[Row]:
    """One row per form (None: all); without a number for one that is not installed or fails.

    once: run twice, without timing, the second time with CUDA's profiler on.
    """

    @cache
    def reference() -> list[Tensor] | None:
        first = next(iter(case.forms.values()))
        inputs = tree_map_only(
            Tensor, lambda x: x.double() if x.is_floating_point() else x, case.inputs(0)
        )
        return tensors(first.run(*inputs)) if case.exact else None

    for name in case.forms if forms is None else forms:
        form, row = case.forms[name], Row(case.suite, case.name, name)
        machine.set_floor(row, case.bytes, case.flops)
        with noted(row, machine):
            if once:
                _run_twice(form, case, machine)
            else:
                _fill(row, form, case, machine, reference if form.comparable else lambda: None)
        yield row


def _run_twice(form: Form, case: Case, machine: Machine) -> None:
    inputs = form.setup(*case.inputs(0))
    form.run(*inputs)
    with torch.cuda.profiler.profile() if machine.cuda else nullcontext():
        form.run(*inputs)


def _fill(
    row: Row, form: Form, case: Case, machine: Machine, reference: Callable[[], list[Tensor] | None]
) -> None:
    """Measure a form on inputs of case.inputs; reference: its right outputs, in float64."""
    start = machine.allocated()
    first = case.inputs(0)
    input_bytes = machine.allocated() - start
    row.executed = form.executed(*first) if form.executed else 0
    sets = [form.setup(*first)]
    out = form.run(*sets[0])  # compiles
    if not machine.cuda:
        row.error = error(out, reference())
        row.seconds = machine.call_seconds(lambda: form.run(*sets[0]))
        return
    _poison(out)  # the next outputs probably reuse this memory, so unwritten parts are NaN
    del out
    before = machine.allocated()
    out = form.run(*sets[0])
    row.peak_memory = machine.peak(before)
    held = machine.allocated() - start
    row.error = error(out, reference())
    del out
    count = copies(input_bytes, case.bytes, held, torch.cuda.mem_get_info()[0] / 2)
    sets += [form.setup(*case.inputs(seed)) for seed in range(1, count)]
    replay, outputs = _captured(lambda: [form.run(*x) for x in sets], row)
    row.seconds = _replay_seconds(replay) / count
    if outputs is not None:
        replayed = checked(replay, outputs, reference())
        row.error = replayed if row.error is None else max(row.error, replayed or 0.0)


def copies(inputs: float, touched: float, held: float, memory: float = math.inf) -> int:
    """How many sets of inputs to rotate through, so that none is still in the L2 cache.

    inputs: bytes of a set. touched: bytes of it that a form reads (few in sparse forms; 0: all).
    held: bytes of a set and of everything computed from it. memory: free bytes.
    """
    enough = 1 + int(COLD / max(1, min(inputs, touched or inputs)))
    return max(1, min(enough, int(min(memory, MEMORY) / max(1, held)), 4096))


def _replay_seconds(run: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return do_bench(run, return_mode="median") / 1e3


def _captured(run: Callable[[], list], row: Row) -> tuple[Callable[[], Any], list | None]:
    """The call as a CUDA graph, and the outputs that each replay writes. If it cannot be captured:
    the call itself, and None."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            outputs = run()
    except Exception as problem:
        row.note = f"no CUDA graph ({type(problem).__name__}): timed with its launches"
        return run, None
    return graph.replay, outputs


def checked(
    replay: Callable[[], Any], outputs: list, reference: list[Tensor] | None
) -> float | None:
    """Fill `outputs` (one per set of inputs) with NaN, replay once, and return the first one's
    error. ValueError if a NaN is left."""
    _poison(outputs)
    replay()
    if any(x.isnan().any() for x in tensors(outputs) if x.is_floating_point()):
        raise ValueError("outputs are NaN after a replay")
    return error(outputs[0], reference)


def error(out: Any, reference: list[Tensor] | None) -> float | None:
    """‖out − reference‖ / ‖reference‖, the largest over all tensors; NaN if one has a NaN."""
    if reference is None:
        return None
    pairs = zip(reference, tensors(out), strict=False)
    return max(
        (float((b.double().reshape(a.shape) - a).norm() / a.norm()) for a, b in pairs),
        key=lambda x: (math.isnan(x), x),
    )


def _poison(out: Any) -> None:
    for x in tensors(out):
        if x.is_floating_point():
            x.detach().fill_(math.nan)


def tensors(x: Any) -> list[Tensor]:
    """All tensors in a form's inputs or outputs."""
    return [y for y in tree_leaves(x) if isinstance(y, Tensor)]
