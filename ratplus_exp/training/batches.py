"""The batches of a training, one a step, prefetched by worker processes."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from itertools import islice

from ratplus_exp.distributed import cores
from ratplus_exp.training.settings import Batch
from ratplus_exp.workers import Workers

BatchOf = Callable[[int, int, int], Batch]  # a pure function of (step, rows, length)
NICE = 10  # added to a worker's niceness: a waiting GPU has precedence


def batches(
    batch: BatchOf, steps: Iterable[tuple[int, int, int]], workers: int
) -> Generator[tuple[int, Batch], None, None]:
    """Each step of `steps`, which are (step, rows, length), with its batch; closing the generator
    ends the workers.

    workers: processes, one a core at most, which need `batch` picklable; 0: this process makes each
        batch when it is due.

    Raises:
        ValueError: a worker was killed.
    """
    if not workers:
        for step, *size in steps:
            yield step, batch(step, *size)
        return
    workers = min(workers, cores())
    with Workers(workers, batch, initialize=_yield_to_the_training) as pool:
        submitted = ((step, pool.call(_make, step, *size)) for step, *size in steps)
        pending = deque(islice(submitted, 2 * workers))
        while pending:
            step, future = pending.popleft()
            made = future.result()
            pending.extend(islice(submitted, 1))
            yield step, made


def _yield_to_the_training() -> None:
    """A worker has low priority, and ignores signals to the process group: they are for the
    training."""
    os.nice(NICE)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _make(batch: BatchOf, step: int, rows: int, length: int) -> Batch:
    return batch(step, rows, length)
