"""The batches of a training, one a step, prefetched by worker processes."""

from __future__ import annotations

import operator
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
    """Each step of `steps`, (step, rows, length), with its batch. Closing the generator ends the
    workers.

    workers: processes, at most one per core; `batch` must be picklable. 0: this process makes each
        batch when it is due.

    Raises:
        ValueError: a worker was killed.
    """
    if not workers:
        for step, *size in steps:
            yield step, batch(step, *size)
        return
    workers = min(workers, cores())
    with Workers(workers, batch, initialize=_lower_priority) as pool:
        submitted = ((step, pool.call(operator.call, step, *size)) for step, *size in steps)
        pending = deque(islice(submitted, 2 * workers))
        while pending:
            step, future = pending.popleft()
            result = future.result()
            pending.extend(islice(submitted, 1))
            yield step, result


def _lower_priority() -> None:
    """For a worker, which also ignores signals to the process group: the training handles them."""
    os.nice(NICE)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
