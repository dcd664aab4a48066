"""Many jobs: their missing cells are dealt out, by groups, to this process or several."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from contextlib import closing
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from ratplus_exp.config import plain
from ratplus_exp.models.loading import load_tokenizer
from ratplus_exp.stages.cells import Job, MeasuringStage
from ratplus_exp.stages.common import device_of
from ratplus_exp.stages.runner import Group, Session, fill
from ratplus_exp.stages.samples import Samples
from ratplus_exp.store import StoreBusy
from ratplus_exp.training.parallel import cores
from ratplus_exp.workers import SPAWN, Workers

MOST_WORKERS = 8  # on a CPU; more would read the same memory
MOST_FAILURES = 16  # cells that may fail before one succeeds

Outcome = tuple[str, str]  # done, busy, failed or again; and what went wrong


def fill_jobs(cfg: DictConfig, jobs: list[Job]) -> list[str]:
    """Run the jobs' missing cells, in this process or several, under one progress bar.

    Of several processes a cell that fails does not stop the others; returns what went wrong.
    """
    cells: dict[str, tuple[Job, str]] = {}
    for job in jobs:
        for task, cell in job.cells.items():
            other = cells.setdefault(cell.id, (job, task))[0]
            if job.cfg.data.examples > other.cfg.data.examples:
                cells[cell.id] = (job, task)
    items = [(j, t) for j, t in cells.values() if not j.cells[t].is_done(j.cfg.data.examples)]
    if not items:
        print(f"All {len(cells)} cells are there already; nothing to run.")
        return []
    groups: dict[str, Group] = {}
    for job, task in items:
        groups.setdefault(job.prefill(task), ([], task))[0].append(job)
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

        workers = min(_workers(cfg), len(groups))
        fill_all = _fill_here if workers == 1 else partial(_fill_in, workers)
        busy, failed = fill_all(list(groups.values()), progress)
    if busy:
        print(f"{busy} cells are being written by another process: run this again after it.")
    return failed


def refuse(failed: list[str]) -> None:
    """ValueError if cells failed."""
    if failed:
        raise ValueError(
            f"{len(failed)} cells failed; run this again for them once the cause is gone. The "
            f"first: {failed[0]}"
        )


def _workers(cfg: DictConfig) -> int:
    """Processes: as asked, or one a core on a CPU, where two single threads beat one of two."""
    if cfg.stage.workers:
        return int(cfg.stage.workers)
    if device_of(cfg).type != "cpu":
        return 1
    return min(cores(), MOST_WORKERS)


def _halves(group: Group) -> list[Group]:
    """A group that cannot be filled as a whole, so that only one cell of it has to wait or fail."""
    jobs, task = group
    return [(jobs[: len(jobs) // 2], task), (jobs[len(jobs) // 2 :], task)]


def _fill_here(groups: list[Group], progress: Callable[[int, int], None]) -> tuple[int, list[str]]:
    """Fills the groups' cells; returns how many another process holds, and no failures: it raises
    them."""
    busy, left = 0, deque(groups)
    with closing(Session()) as session:
        while left:
            group = left.popleft()
            try:
                fill(group, session, lambda n: progress(n, 0))
                progress(0, len(group[0]))
            except StoreBusy:
                if len(group[0]) > 1:
                    left.extendleft(reversed(_halves(group)))
                else:
                    busy += 1
    return busy, []


def _fill_in(
    workers: int, groups: list[Group], progress: Callable[[int, int], None]
) -> tuple[int, list[str]]:
    """`_fill_here` in several processes of one thread each, which take group by group; returns what
    went wrong as well."""
    busy, finished = 0, 0
    failed: list[str] = []
    samples = SPAWN.Value("q")
    shown = 0
    while groups:
        with Workers(workers, _begin, samples, workers) as pool:
            running = {
                pool.submit(_fill, [(plain(job.cfg), job.stage) for job in jobs], task): (
                    jobs,
                    task,
                )
                for jobs, task in groups
            }
            again: list[Group] = []
            while running:
                over, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                outcomes = [(running.pop(future), *_outcome(future, workers)) for future in over]
                ends = sum(len(jobs) for (jobs, _), kind, _ in outcomes if kind == "done")
                now = samples.get_obj().value  # a killed worker may hold its lock
                progress(now - shown, ends)
                shown, finished = now, finished + ends
                for group, kind, text in outcomes:
                    if kind == "again":
                        again.append(group)
                    elif kind != "done" and len(group[0]) > 1:
                        again += _halves(group)
                    elif kind == "busy":
                        busy += 1
                    elif kind == "failed":
                        failed.append(text)
                        tqdm.write(f"failed: {text}")
                if len(failed) >= MOST_FAILURES and not finished:
                    refuse(failed)
        groups = again
    return busy, failed


def _outcome(future: Future[Outcome], workers: int) -> Outcome:
    try:
        return future.result()
    except BrokenExecutor:
        raise ValueError(
            "a worker process was killed, probably for memory: run again with "
            f"stage.workers={max(workers // 2, 1)}"
        ) from None


# Of a worker process:
_session: Session
_samples: Any
_lost = False


def _begin(samples: Any, workers: int) -> None:
    global _session, _samples
    torch.set_num_threads(1)
    _session, _samples = Session(workers), samples


def _fill(configs: list[tuple[dict[str, Any], MeasuringStage]], task: str) -> Outcome:
    """Fills a group; "again" by a process whose GPU is lost."""
    global _lost
    if _lost:
        return "again", ""
    jobs = [Job(OmegaConf.create(config), stage) for config, stage in configs]
    try:
        fill((jobs, task), _session, _count)
    except StoreBusy:
        return "busy", ""
    except Exception as error:  # the parent says it
        _lost = not _usable()
        return "failed", f"{jobs[0].cells[task].path.name}: {type(error).__name__}: {error}"
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
