"""Fills the missing cells of many jobs, in groups, in this process or in several."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import closing
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from ratplus_exp.analysis.frame import all_finished
from ratplus_exp.distributed import cores, from_rank_0, process_group, rank
from ratplus_exp.stages.cells import Job
from ratplus_exp.stages.common import device_of, job_folder
from ratplus_exp.stages.runner import Session, fill
from ratplus_exp.store import Cell
from ratplus_exp.tracking import tracked
from ratplus_exp.workers import Workers, context

MAX_WORKERS = 8  # on a CPU; more would compete for memory bandwidth
MAX_FAILURES = 16  # errors before a cell is filled

Group = tuple[list[Job], str]  # jobs whose cells of a task begin with the same prefill
Progress = Callable[[int], object]  # called with the number of new samples


def fill_tracked(job: Job, report: Callable[[Job], dict[str, Any]]) -> None:
    """Fill one job's cells, whose samples several ranks share, and then on rank 0 make its report
    and, unless all cells were there before, track the values that this returns."""
    cfg = job.cfg
    with process_group(device_of(cfg), timedelta(hours=2)):
        missing = from_rank_0(job.missing)
        filled(cfg, [job])
    if rank() == 0:
        all_finished(job.cells.values(), cfg.stage.name)
        values = report(job)
        if missing:
            with tracked(cfg, job_folder()) as tracker:
                tracker.log(values)


def filled(cfg: DictConfig, jobs: list[Job]) -> list[Cell]:
    """The jobs' cells, all filled; ValueError if some can't be."""
    raise_if_failed(fill_jobs(cfg, jobs))
    raise_if_busy(jobs)
    return list({cell.id: cell for job in jobs for cell in job.cells.values()}.values())


def fill_jobs(cfg: DictConfig, jobs: list[Job]) -> list[str]:
    """Fill the jobs' missing cells, in this process or several, under one progress bar.

    Of several workers a failing cell does not stop the others; returns the errors.
    """
    cells: dict[str, tuple[Job, str]] = {}
    for job in jobs:
        for task, cell in job.cells.items():
            other, _ = cells.setdefault(cell.id, (job, task))
            if job.examples > other.examples:
                cells[cell.id] = (job, task)
    lacking = from_rank_0(
        lambda: [x for x, (j, t) in cells.items() if j.cells[t].done() < j.examples]
    )
    missing = [cells[name] for name in lacking]
    if not missing:
        if rank() == 0:
            print(f"All {len(cells)} cells are there already; nothing to run.")
        return []
    groups: dict[str, Group] = {}
    for job, task in missing:
        groups.setdefault(job.prefill(task), ([], task))[0].append(job)
    kinds = {(job.stage.samples, job.path, job.cfg.data.length): job for job, _ in missing}
    workers = min(_workers(cfg), len(groups))
    failed: list[str] = []
    with closing(Session()) as session:
        for job in kinds.values():
            for task in job.cells:
                session.source(job)(task, 0)  # refuses invalid prompts before anything is written
        with tqdm(
            desc=f"filling {len(missing)} of {len(cells)} cells",
            total=sum(job.examples for job, _ in missing),
            initial=sum(min(len(job.cells[t].records()), job.examples) for job, t in missing),
            unit="example",
            smoothing=0.02,
            disable=rank() > 0,
        ) as bar:
            if workers > 1:
                busy, failed = _fill_in_workers(workers, list(groups.values()), bar.update)
            else:
                busy = sum(fill(*group, session, bar.update) for group in groups.values())
    if busy and rank() == 0:
        print(f"{busy} cells are being written by another process: run this again after it.")
    return failed


def raise_if_failed(failed: list[str]) -> None:
    """ValueError if cells failed."""
    if failed:
        raise ValueError(
            f"{len(failed)} cells failed; run this again for them once the cause is gone. The "
            f"first: {failed[0]}"
        )


def raise_if_busy(jobs: list[Job]) -> None:
    """ValueError if another process still fills some of the jobs' cells."""
    if from_rank_0(lambda: any(job.missing() for job in jobs)):
        raise ValueError("another process still writes some of the cells: run this again after it")


def _workers(cfg: DictConfig) -> int:
    """Processes: as configured, or one on a GPU and one a core on a CPU; one if the stage has no
    choice."""
    if workers := cfg.stage.get("workers", 1):
        return int(workers)
    return min(cores(), MAX_WORKERS) if device_of(cfg).type == "cpu" else 1


def _fill_in_workers(workers: int, groups: list[Group], done: Progress) -> tuple[int, list[str]]:
    """Fill the groups' cells in several processes of one thread each; returns how many another
    process is writing, and the errors of those that can't be filled.

    What fails is tried again, cell by cell and in new processes, whose GPU has no error, until all
    that is left fails.
    """
    busy, filled, shown = 0, 0, 0
    samples = context().Value("q")
    while groups:
        before, failed, errors = filled, [], []
        one_thread = partial(torch.set_num_threads, 1)
        with Workers(workers, Session(workers), samples, initialize=one_thread) as pool:
            running = {pool.call(_fill, *group): group for group in groups}
            while running:
                over, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                for future in over:
                    jobs, task = running.pop(future)
                    left_out, error = future.result()
                    if error:
                        tqdm.write(f"failed: {error}")
                        errors.append(error)
                        failed += [([job], task) for job in jobs]
                    else:
                        filled += len(jobs) - left_out
                        busy += left_out
                now = samples.get_obj().value  # without its lock, which a killed worker may hold
                done(now - shown)
                shown = now
                if len(errors) >= MAX_FAILURES and not filled:
                    raise_if_failed(errors)
        if filled == before and len(failed) == len(groups):
            return busy, errors
        groups = failed
    return busy, []


def _fill(session: Session, samples: Any, jobs: list[Job], task: str) -> tuple[int, str]:
    """Fill the jobs' cells of a task in a worker, which adds to samples; returns how many another
    process is writing, and "" or an error."""

    def count(new: int) -> None:
        with samples.get_lock():
            samples.value += new

    try:
        return fill(jobs, task, session, count), ""
    except Exception as error:
        return 0, f"{jobs[0].cells[task].path.name}: {type(error).__name__}: {error}"
