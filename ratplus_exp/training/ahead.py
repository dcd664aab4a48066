"""Batches made ahead of the training by worker processes, and read back through memory maps.

A batch is a pure function of the step, so it may be made by anybody at any time: a training gives
the same weights with and without workers, and what a killed run had made is still good.

    <folder>/000123.npy     the batch of step 123: (2, rows, length) uint16, ids and labels
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from ratplus_exp.training.loop import Batch

BatchOf = Callable[[int, int, int], Batch]  # of (step, rows, length)
NO_LABEL = np.iinfo(np.uint16).max  # stands for every label below 0


@contextmanager
def made_ahead(
    batch: BatchOf, sizes: list[tuple[int, int]], folder: Path, workers: int
) -> Iterator[BatchOf]:
    """`batch`, but made by so many processes from the first step on; waits where they are slower.

    batch must be picklable, and its ids below 65 535. sizes: (rows, length) of every step. workers:
    one a core at most; 0 gives `batch` as it is.
    """
    if not workers:
        yield batch
        return
    folder.mkdir(parents=True, exist_ok=True)
    pool = ProcessPoolExecutor(
        min(workers, os.cpu_count() or 1),
        mp_context=get_context("spawn"),
        initializer=_begin,
        initargs=(os.getpid(), batch),
    )
    missing = (step for step in range(len(sizes)) if not _file(folder, step).exists())
    jobs = {step: pool.submit(_make, folder, step, *sizes[step]) for step in missing}
    try:
        yield lambda step, rows, length: _read(folder, step, jobs)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _read(folder: Path, step: int, jobs: dict[int, Future[None]]) -> Batch:
    if step in jobs:
        jobs[step].result()
    ids, labels = np.load(_file(folder, step), mmap_mode="r").astype(np.int64)
    return ids, np.where(labels == NO_LABEL, -100, labels)


_batch: BatchOf  # of a worker process


def _begin(parent: int, batch: BatchOf) -> None:
    """A worker leaves signals to the training, and goes when that is gone."""
    global _batch
    _batch = batch
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _make(folder: Path, step: int, rows: int, length: int) -> None:
    ids, labels = _batch(step, rows, length)
    assert ids.max() < NO_LABEL
    partial = _file(folder, step).with_suffix(f".{os.getpid()}")
    with partial.open("wb") as file:
        np.save(file, np.stack((ids, np.where(labels < 0, NO_LABEL, labels))).astype(np.uint16))
    os.replace(partial, _file(folder, step))


def _file(folder: Path, step: int) -> Path:
    return folder / f"{step:06d}.npy"
