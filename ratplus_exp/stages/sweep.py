"""stage=sweep: all cells that some tables and figures need, then the tables and figures.

What a sweep runs is data: `stage.cells` in conf/experiment/table2.yaml and its neighbours, one
entry a grid, its lists multiplied out and run for each of `stage.trainings` of `stage.models`.
Finished cells are skipped; the rest is dealt out to worker processes under one progress bar. A
sweep that was killed goes on where it stood.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from contextlib import closing
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from tqdm import tqdm

from ratplus_exp.config import plain, validate
from ratplus_exp.models.loading import load_tokenizer
from ratplus_exp.stages import report
from ratplus_exp.stages.cells import Job, Loaded, fill
from ratplus_exp.stages.common import device_of, option
from ratplus_exp.stages.samples import Samples
from ratplus_exp.store import StoreBusy
from ratplus_exp.training.parallel import cores
from ratplus_exp.workers import SPAWN, Workers

MOST_WORKERS = 8  # on a CPU; more would read the same memory
MOST_FAILURES = 16  # cells that may fail before one succeeds
FIELDS = ("stage", "method", "budget", "blocks", "selector", "selector_seed", "tasks", "examples")

Item = tuple[Job, str]


def run(cfg: DictConfig) -> None:
    """Run what is missing, then write `stage.outputs`."""
    failed = fill_jobs(cfg, [Job(job) for job in expand(cfg)])
    report.run(cfg)
    refuse(failed)


def complete(cfg: DictConfig, jobs: list[Job]) -> None:
    """`fill_jobs` for a table that needs all cells; ValueError if some are still missing."""
    refuse(fill_jobs(cfg, jobs))
    if any(job.missing() for job in jobs):
        raise ValueError("another process still writes some of the cells: run this again after it")


def refuse(failed: list[str]) -> None:
    """ValueError if cells failed."""
    if failed:
        raise ValueError(
            f"{len(failed)} cells failed; run this again for them once the cause is gone. The "
            f"first: {failed[0]}"
        )


def expand(cfg: DictConfig) -> list[DictConfig]:
    """The configurations of `stage.cells`, checked, model by model so that each is loaded once."""
    grids = plain(cfg.stage.cells).values()
    return [
        configuration(cfg, {"model": model, "training": training} | entry)
        for model in cfg.stage.models
        for training in cfg.stage.trainings
        for grid in grids
        for entry in _multiply(grid)
    ]


def _multiply(grid: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One entry for every combination of the grid's lists."""
    if unknown := set(grid) - set(FIELDS):
        raise ValueError(
            f"stage.cells has the unknown field {min(unknown)!r}: use {', '.join(FIELDS)}"
        )
    axes = {k: v if isinstance(v, list) and k != "tasks" else [v] for k, v in grid.items()}
    for values in product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def configuration(cfg: DictConfig, entry: dict[str, Any]) -> DictConfig:
    """A sweep's own configuration with the fields of one entry; stage=eval if it names none.

    blocks: how many blocks a context has, which is how P1's block sizes carry over to any tier.
    examples: at most so many a task.
    """
    job = cfg.copy()
    with open_dict(job):
        for group in ("model", "method"):
            if group in entry:
                job[group] = option(group, entry[group])
        if "training" in entry:
            job.model.training = entry["training"]
        job.stage = option("stage", entry.get("stage", "eval"))
        for field in ("first_token", "batch_size"):
            job.stage[field] = cfg.stage[field]
        for field in ("selector", "selector_seed"):
            if field in entry:
                job[field] = entry[field]
        job.data.examples = min(cfg.data.examples, entry.get("examples", cfg.data.examples))
        if "budget" in entry:
            job.budget = entry["budget"]
        if blocks := entry.get("blocks"):
            if cfg.data.length % blocks:
                raise ValueError(
                    f"a context of {cfg.data.length} tokens doesn't divide into {blocks} blocks: "
                    "change data.length or the blocks of stage.cells"
                )
            job.method.block_size = cfg.data.length // blocks
        if "tasks" in entry:
            job.data.tasks = [task for task in entry["tasks"] if task in cfg.data.tasks]
    validate(job)
    return job


def fill_jobs(cfg: DictConfig, jobs: list[Job]) -> list[str]:
    """Run the jobs' missing cells, in this process or several, under one progress bar.

    Of several processes a cell that fails does not stop the others; returns what went wrong.
    """
    cells: dict[str, Item] = {}
    for job in jobs:
        for task, cell in job.cells.items():
            other = cells.setdefault(cell.id, (job, task))[0]
            if job.cfg.data.examples > other.cfg.data.examples:
                cells[cell.id] = (job, task)
    items = [(j, t) for j, t in cells.values() if not j.cells[t].is_done(j.cfg.data.examples)]
    if not items:
        print(f"All {len(cells)} cells are there already; nothing to run.")
        return []
    for job in {job.path: job for job, _ in items}.values():
        source = Samples(job.cfg, load_tokenizer(job.path))
        for task in job.cells:
            source(task, 0)  # prompts that cannot be made are refused before anything is written
    examples = sum(job.cfg.data.examples for job, _ in items)
    have = sum(min(len(job.cells[t].records()), job.cfg.data.examples) for job, t in items)
    done = len(cells) - len(items)
    with tqdm(total=examples, initial=have, unit="example", smoothing=0.02) as bar:

        def progress(samples: int, finished: int) -> None:
            nonlocal done
            done += finished
            bar.set_description(f"{done}/{len(cells)} cells", refresh=False)
            bar.update(samples)

        workers = min(_workers(cfg), len(items))
        fill_all = _fill_here if workers == 1 else partial(_fill_in, workers)
        busy, failed = fill_all(items, progress)
    if busy:
        print(f"{busy} cells are being written by another process: run this again after it.")
    return failed


def _workers(cfg: DictConfig) -> int:
    """Processes: as asked, or one a core on a CPU, where two single threads beat one of two."""
    if cfg.stage.workers:
        return int(cfg.stage.workers)
    if device_of(cfg).type != "cpu":
        return 1
    return min(cores(), MOST_WORKERS)


def _fill_here(items: list[Item], progress: Callable[[int, int], None]) -> tuple[int, list[str]]:
    """Fills the items' cells; returns how many another process holds, and no failures: it raises
    them."""
    busy = 0
    with closing(Bench()) as bench:
        for job, task in items:
            try:
                fill(job, task, *bench.ready(job), lambda n: progress(n, 0))
                progress(0, 1)
            except StoreBusy:
                busy += 1
    return busy, []


class Bench:
    """What a process keeps from one cell to the next: the model and where samples come from."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.sources: dict[str, Samples] = {}

    def ready(self, job: Job) -> tuple[Loaded, Samples]:
        if job.path != self.path:
            self.loaded, self.path, self.sources = Loaded.of(job), job.path, {}
        # RULER's files are read once; generated prompts are shared by all sources anyway.
        samples = str((plain(job.cfg.data), job.cfg.seed))
        if samples not in self.sources:
            self.sources[samples] = Samples(job.cfg, self.loaded.tokenizer)
        return self.loaded, self.sources[samples]

    def close(self) -> None:
        for source in self.sources.values():
            source.close()


def _fill_in(
    workers: int, items: list[Item], progress: Callable[[int, int], None]
) -> tuple[int, list[str]]:
    """`_fill_here` in several processes of one thread each, which take cell by cell; returns what
    went wrong as well."""
    busy, finished = 0, 0
    failed: list[str] = []
    samples = SPAWN.Value("q")
    shown = 0
    while items:
        with Workers(workers, _begin, samples) as pool:
            jobs = {pool.submit(_fill, plain(job.cfg), task): (job, task) for job, task in items}
            again, running = [], set(jobs)
            while running:
                done, running = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                outcomes = [(jobs[future], *_outcome(future, workers)) for future in done]
                ends = [kind for _, kind, _ in outcomes].count("done")
                now = samples.get_obj().value  # a killed worker may hold its lock
                progress(now - shown, ends)
                shown, finished = now, finished + ends
                for item, kind, text in outcomes:
                    if kind == "busy":
                        busy += 1
                    elif kind == "again":
                        again.append(item)
                    elif kind == "failed":
                        failed.append(text)
                        tqdm.write(f"failed: {text}")
                if len(failed) >= MOST_FAILURES and not finished:
                    refuse(failed)
        items = again
    return busy, failed


def _outcome(future: Future[tuple[str, str]], workers: int) -> tuple[str, str]:
    try:
        return future.result()
    except BrokenExecutor:
        raise ValueError(
            "a worker process was killed, probably for memory: run again with "
            f"stage.workers={max(workers // 2, 1)}"
        ) from None


# Of a worker process:
_bench: Bench
_samples: Any
_lost = False


def _begin(samples: Any) -> None:
    global _bench, _samples
    torch.set_num_threads(1)
    _bench, _samples = Bench(), samples


def _fill(config: dict[str, Any], task: str) -> tuple[str, str]:
    """Fills a cell: done, busy or failed, and how; or "again" by a process whose GPU is lost."""
    global _lost
    if _lost:
        return "again", ""
    job = Job(OmegaConf.create(config))
    try:
        fill(job, task, *_bench.ready(job), _count)
    except StoreBusy:
        return "busy", ""
    except Exception as error:  # the parent says it
        _lost = not _usable()
        return "failed", f"{job.cells[task].path.name}: {type(error).__name__}: {error}"
    return "done", ""


def _count(samples: int) -> None:
    with _samples.get_lock():
        _samples.value += samples


def _usable() -> bool:
    """Whether this process can go on after an error: after some its GPU does nothing any more."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
