"""Batches made ahead of the training by worker processes, and read back through memory maps.

A batch is a pure function of the step, so it may be made by anybody at any time: a training gives
the same weights with and without workers, and what a killed run had made is still good.

    <folder>/000123.npy     the batch of step 123: (2, rows, length), ids and labels; uint16, or
                            uint32 for a large vocabulary, with the type's last value for labels < 0

Of several training processes, which share the folder, each has every so many-th step made.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from ratplus_exp.training.parallel import cores, local_world_size, rank, world_size
from ratplus_exp.training.settings import Batch

BatchOf = Callable[[int, int, int], Batch]  # of (step, rows, length)
WAIT = 0.2  # seconds between looks for a file that another process makes
NICE = 10  # how far a worker steps back behind the training


@contextmanager
def made_ahead(
    batch: BatchOf, sizes: list[tuple[int, int]], folder: Path, workers: int, vocabulary: int
) -> Iterator[BatchOf]:
    """`batch`, but made by so many processes from the first step on; waits where they are slower.

    batch must be picklable, and its ids below vocabulary. sizes: (rows, length) of every step.
    workers: of this process; one a core at most, shared with the others of its machine. 0 gives
    `batch` as it is.
    """
    if not workers:
        yield batch
        return
    folder.mkdir(parents=True, exist_ok=True)
    pool = ProcessPoolExecutor(
        min(workers, max(1, cores() // local_world_size())),
        mp_context=get_context("spawn"),
        initializer=_begin,
        initargs=(os.getpid(), batch),
    )
    dtype = np.dtype("uint16" if vocabulary < 1 << 16 else "uint32")
    mine = range(rank(), len(sizes), world_size())
    missing = [step for step in mine if not _file(folder, step).exists()]
    jobs = {step: pool.submit(_make, folder, step, *sizes[step], dtype) for step in missing}
    try:
        yield lambda step, rows, length: _read(folder, step, jobs)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _read(folder: Path, step: int, jobs: dict[int, Future[None]]) -> Batch:
    if step in jobs:
        jobs[step].result()
    while not _file(folder, step).exists():  # of another process, whose death ends this one too
        time.sleep(WAIT)
    made = np.load(_file(folder, step), mmap_mode="r")
    ids, labels = made.astype(np.int64)
    return ids, np.where(labels == np.iinfo(made.dtype).max, -100, labels)


_batch: BatchOf  # of a worker process


def _begin(parent: int, batch: BatchOf) -> None:
    """A worker leaves signals to the training and the first turn on a core, since a GPU waits for
    what that launches, and goes when it is gone."""
    global _batch
    _batch = batch
    os.nice(NICE)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _make(folder: Path, step: int, rows: int, length: int, dtype: np.dtype[Any]) -> None:
    ids, labels = _batch(step, rows, length)
    no_label = np.iinfo(dtype).max
    maker = f"{socket.gethostname()}-{rank()}-{os.getpid()}"  # an earlier run's may still be there
    partial = folder / f"{_file(folder, step).name}.{maker}"
    with partial.open("wb") as file:
        np.save(file, np.stack((ids, np.where(labels < 0, no_label, labels))).astype(dtype))
    os.replace(partial, _file(folder, step))


def _file(folder: Path, step: int) -> Path:
    return folder / f"{step:06d}.npy"
