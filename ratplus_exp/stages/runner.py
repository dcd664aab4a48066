"""Fills the cells of measuring stages, batch by batch.

Cells with the same prefill of the same prompts are filled together: each batch of prompts is
prefilled once, and then answered under the method of one cell after the other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ratplus_exp import provenance
from ratplus_exp.config import plain
from ratplus_exp.cost import Shape
from ratplus_exp.distributed import barrier, from_rank_0, rank, world_size
from ratplus_exp.models.loading import load_tokenizer
from ratplus_exp.models.prefill import PromptBatch
from ratplus_exp.stages.cells import Job
from ratplus_exp.stages.common import model_of
from ratplus_exp.stages.samples import Samples
from ratplus_exp.store import StoreBusy, warn

FIRST = 16  # prompts of a cell that its metrics can use


class Session:
    """The state of a process between groups: the model, and the sources of samples.

    workers: how many processes share this machine's memory.
    """

    def __init__(self, workers: int = 1) -> None:
        self.workers = workers
        self.path: Path | None = None
        self.sources: dict[str, Samples] = {}

    def source(self, job: Job) -> Samples:
        """One for each kind and data configuration, since it reads RULER's files."""
        data = plain(job.cfg.data) | {"protocol": None}  # both protocols have the same prompts
        name = str((job.stage.samples, job.path, data, job.cfg.seed))
        if name not in self.sources:
            self.sources[name] = job.stage.samples(job.cfg, load_tokenizer(job.path))
        return self.sources[name]

    def model(self, job: Job) -> Any:
        if job.path != self.path:
            self.loaded = model_of(job.cfg)
            self.path = job.path
        return self.loaded

    def close(self) -> None:
        for source in self.sources.values():
            source.close()


def fill(jobs: list[Job], task: str, session: Session, done: Callable[[int], None]) -> int:
    """Append the missing samples of the jobs' cells of a task, batch by batch; finish the cells.
    Returns the number of cells that are skipped, since another process is writing them.

    jobs: with the same prefill of the task's prompts. Rank 0 reads what is missing and the ranks
    distribute it round-robin, so any number of processes can complete what others left.

    done: called with the number of appended samples, of all ranks together.
    """
    largest = max(jobs, key=lambda job: job.examples)
    source = session.source(largest)
    model = session.model(largest)  # before anything is written, since loading it may fail
    with _opened(jobs, task) as opened:
        for lacking, indices in from_rank_0(lambda: _lacking(opened, task, source)):
            filled = [opened[i] for i in lacking]
            shares, left = indices[rank() :: world_size()], len(indices)
            source.prefetch(task, shares)
            shared, size = _sharing(filled, source, task, model, session.workers)
            for start in range(0, len(shares), size):
                samples = [source(task, index) for index in shares[start : start + size]]
                new = min(len(samples) * world_size(), left)
                left -= new
                batches = [
                    (part, PromptBatch(model, *source.padded(part), fed, shared))
                    for fed, part in source.by_suffix_length(samples, jobs[0].first_token)
                ]
                for job in filled:
                    start_time = time.perf_counter()
                    records = [
                        record
                        for part, prompts in batches
                        for record in job.stage.measure(job, part, prompts, source.tokenizer)
                    ]
                    seconds = round((time.perf_counter() - start_time) / len(samples), 5)
                    job.cells[task].append([record | {"seconds": seconds} for record in records])
                    done(new)
        barrier()
        if rank() == 0 and opened:
            _finish(opened, task, source, model)
    return len(jobs) - len(opened)


def _finish(jobs: list[Job], task: str, source: Samples, model: Any) -> None:
    @cache
    def first(count: int) -> PromptBatch:
        samples = [source(task, index) for index in range(count)]
        return PromptBatch(model, *source.padded(samples))

    for job in jobs:
        cell = job.cells[task]
        records = cell.records()
        seconds = round(sum(record.get("seconds", 0.0) for record in records.values()), 3)
        metrics = job.stage.metrics(records, first(min(FIRST, job.examples)))
        cell.finish(metrics | {"seconds": seconds})


def _lacking(jobs: list[Job], task: str, source: Samples) -> list[tuple[list[int], list[int]]]:
    """Which jobs lack which samples: numbers of jobs with the indices of samples, in order."""
    have = [job.cells[task].records() for job in jobs]
    lacking: dict[tuple[int, ...], list[int]] = {}
    for index in range(max((job.examples for job in jobs), default=0)):
        name = source.id(task, index)
        key = tuple(i for i, x in enumerate(jobs) if index < x.examples and name not in have[i])
        lacking.setdefault(key, []).append(index)
    return [(list(key), indices) for key, indices in lacking.items() if key]


def _sharing(
    jobs: list[Job], source: Samples, task: str, model: Any, workers: int
) -> tuple[tuple[int, int] | None, int]:
    """What a prefill must keep for the jobs, as in `PromptBatch`, and the prompts of a batch.

    Keys and values, and a method's copy of them, may take half of the workers' memory.
    """
    cfg = jobs[0].cfg
    size = int(cfg.data.batch_size)
    if len(jobs) == 1:
        return None, size
    memory = total_memory(model.device) / 2 / workers
    row = 2 * Shape.of(model).kv_bytes(cfg.data.length, model.dtype.itemsize)
    fits = int(max(1, min(size, memory // row)))
    if fits < size:
        warn(f"{size} prefilled prompts need more than {memory / 1e9:.2g} GB: {fits} at a time.")
    window = max(job.method.observed for job in jobs)
    return (window, source.reserve[task]), fits


def total_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def _opened(jobs: list[Job], task: str) -> Iterator[list[Job]]:
    """The jobs with their cells open for writing, without those that another process is writing.
    Rank 0 locks a cell; each other rank opens its own file in the same folder."""
    with ExitStack() as stack:

        def lock() -> list[int]:
            free = []
            for i, job in enumerate(jobs):
                try:
                    stack.enter_context(job.cells[task].open(provenance.provenance(plain(job.cfg))))
                    free.append(i)
                except StoreBusy as error:
                    warn(str(error))
            return free

        opened = [jobs[i] for i in from_rank_0(lock)]
        if rank() > 0:
            for job in opened:
                stack.enter_context(job.cells[task].open_share(rank()))
        yield opened
