"""The runner of measuring stages: it fills cells, batch by batch.

Cells that begin with the same prefill of the same prompts are a group: a batch of prompts is
prefilled once, and answered under the method of one cell after the other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ratplus_exp import provenance
from ratplus_exp.config import plain, reserve_of
from ratplus_exp.cost import Shape
from ratplus_exp.models.loading import load_model, load_tokenizer
from ratplus_exp.models.prefill import PromptBatch
from ratplus_exp.stages.cells import Job
from ratplus_exp.stages.common import device_of, job_folder
from ratplus_exp.stages.samples import Samples
from ratplus_exp.store import warn
from ratplus_exp.tracking import tracked
from ratplus_exp.training.parallel import (
    barrier,
    from_first,
    processes,
    rank,
    world_size,
)

FIRST = 16  # prompts of a cell for metrics that take prompts

Group = tuple[list[Job], str]  # jobs whose cells of one task begin with the same prefill


class Session:
    """What a process keeps from one group to the next: the model, and where samples come from.

    workers: how many processes share this machine's memory.
    """

    def __init__(self, workers: int = 1) -> None:
        self.workers = workers
        self.path: Path | None = None
        self.sources: dict[str, Samples] = {}

    def source(self, job: Job) -> Samples:
        """RULER's files are read once; generated prompts are shared by all sources anyway."""
        name = str((job.path, plain(job.cfg.data), job.cfg.seed))
        if name not in self.sources:
            self.sources[name] = Samples(job.cfg, load_tokenizer(job.path))
        return self.sources[name]

    def model(self, job: Job) -> Any:
        if job.path != self.path:
            cfg = job.cfg
            self.loaded = load_model(job.path, device_of(cfg), cfg.dtype)
            self.path = job.path
        return self.loaded

    def close(self) -> None:
        for source in self.sources.values():
            source.close()


def fill_missing(job: Job, log: Callable[[Any], None]) -> None:
    """Run a job's missing cells with a progress bar, in a W&B run that `log` fills in the end; of
    several processes, each has its share of the samples."""
    with processes(device_of(job.cfg), timedelta(hours=2)):
        if missing := from_first(lambda: list(job.missing())):
            _fill_all(job, missing, log)
        elif rank() == 0:
            print(f"All {len(job.cells)} cells are there already; nothing to run.")


def _fill_all(job: Job, missing: list[str], log: Callable[[Any], None]) -> None:
    cfg = job.cfg
    with closing(Session()) as session, tracked(cfg, job_folder()) as tracker:
        source = session.source(job)
        for task in missing:
            source(task, 0)  # prompts that cannot be made are refused before anything is written
        for _, indices in _lacking([job], missing[0], source)[:1]:  # while the model is loaded
            source.ahead(missing[0], indices[rank() :: world_size()])
        session.model(job)
        have = sum(min(len(job.cells[t].records()), cfg.data.examples) for t in missing)
        total = cfg.data.examples * len(missing)
        with tqdm(total=total, initial=have, unit="example", disable=rank() > 0) as bar:
            for task in missing:
                bar.set_description(f"{cfg.model.name} {cfg.method.name} {task}")
                fill(([job], task), session, bar.update)
        if rank() == 0:
            log(tracker)


def fill(group: Group, session: Session, done: Callable[[int], None]) -> None:
    """Append the samples that a group's cells lack, batch by batch, and finish the cells.

    What is missing is dealt out by rank 0's reading of the store, card by card: a share that a dead
    process left is shared by all of the next run, whatever their number.

    done: called with the number of samples that were appended, by all processes together.
    """
    jobs, task = group
    largest = max(jobs, key=lambda job: job.cfg.data.examples)
    source, model = session.source(largest), session.model(largest)
    with _opened(group):
        for lacking, indices in from_first(lambda: _lacking(jobs, task, source)):
            those = [jobs[i] for i in lacking]
            mine, left = indices[rank() :: world_size()], len(indices)
            source.ahead(task, mine)
            shared, size = _sharing(those, task, model, session.workers)
            for start in range(0, len(mine), size):
                samples = [source(task, index) for index in mine[start : start + size]]
                new = min(len(samples) * world_size(), left)
                left -= new
                parts = source.by_fed(samples, jobs[0].first_token)
                batches = [
                    (part, PromptBatch(model, *source.padded(part), fed, shared))
                    for fed, part in parts
                ]
                for job in those:
                    began = time.perf_counter()
                    records = [
                        record
                        for part, prompts in batches
                        for record in job.stage.measure(job, part, prompts, source.tokenizer)
                    ]
                    seconds = round((time.perf_counter() - began) / len(samples), 5)
                    job.cells[task].append([record | {"seconds": seconds} for record in records])
                    done(new)
        barrier()
        if rank() == 0:
            _finish(group, source, model)


def _finish(group: Group, source: Samples, model: Any) -> None:
    jobs, task = group

    @cache
    def first(count: int) -> PromptBatch:
        return PromptBatch(model, *source.padded([source(task, index) for index in range(count)]))

    for job in jobs:
        every = job.cells[task].records()
        seconds = round(sum(record.get("seconds", 0.0) for record in every.values()), 3)
        metrics = job.stage.metrics(every, first(min(FIRST, job.cfg.data.examples)))
        job.cells[task].finish(metrics | {"seconds": seconds})


def _lacking(jobs: list[Job], task: str, source: Samples) -> list[tuple[list[int], list[int]]]:
    """Which jobs lack which samples: their numbers and the samples' indices, in order."""
    have = [job.cells[task].records() for job in jobs]
    found: dict[tuple[int, ...], list[int]] = {}
    for index in range(max(job.cfg.data.examples for job in jobs)):
        name = source.id(task, index)
        those = tuple(
            i for i, job in enumerate(jobs) if index < job.cfg.data.examples and name not in have[i]
        )
        if those:
            found.setdefault(those, []).append(index)
    return [(list(those), indices) for those, indices in found.items()]


def _sharing(
    jobs: list[Job], task: str, model: Any, workers: int
) -> tuple[tuple[int, int] | None, int]:
    """What a prefill must keep for the jobs, as in `PromptBatch`, and how many prompts a batch has.

    Keys and values, prefilled and copied by a method, may take half of the workers' memory.
    """
    cfg = jobs[0].cfg
    size = int(cfg.stage.batch_size)
    if len(jobs) == 1:
        return None, size
    memory = total_memory(model.device) / 2 / workers
    row = 2 * Shape.of(model).kv_bytes(cfg.data.length, model.dtype.itemsize)
    fits = int(max(1, min(size, memory // row)))
    if fits < size:
        warn(f"{size} prefilled prompts need more than {memory / 1e9:.2g} GB: {fits} at a time.")
    window = max(job.method.observed for job in jobs)
    return (window, reserve_of(cfg, task)), fits


def total_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def _opened(group: Group) -> Iterator[None]:
    """Rank 0 takes the cells; only then do the others write beside it."""
    jobs, task = group
    with ExitStack() as stack:
        if rank() == 0:
            for job in jobs:
                written_by = provenance.provenance(plain(job.cfg))
                stack.enter_context(job.cells[task].open(written_by))
        barrier()
        if rank() > 0:
            for job in jobs:
                stack.enter_context(job.cells[task].open_share(rank()))
        yield
