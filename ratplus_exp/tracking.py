"""W&B: one run a job, offline unless asked otherwise."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from ratplus_exp.config import plain
from ratplus_exp.report import Table
from ratplus_exp.training.parallel import rank


@contextmanager
def tracked(cfg: DictConfig, folder: Path) -> Iterator[wandb.Run]:
    """A W&B run that holds the whole configuration; its files go to folder/wandb. Of several
    processes only the first has one.

    Runs of one multirun or experiment are one group, if tracking.group doesn't name another.
    """
    job = HydraConfig.get()
    multirun = Path(job.sweep.dir).name if job.mode == RunMode.MULTIRUN else None
    experiment = job.runtime.choices.get("experiment")  # one, or a list of them
    group = cfg.tracking.group or multirun or (experiment and str(experiment))
    settings = wandb.Settings(silent=True, console="off")
    name = f"{cfg.stage.name}-{cfg.model.name}-{cfg.method.name}-seed{cfg.seed}"
    run = wandb.init(
        mode=cfg.tracking.mode if rank() == 0 else "disabled",
        project=cfg.tracking.project,
        entity=cfg.tracking.entity,
        group=group,
        job_type=cfg.stage.name,
        name=name,
        dir=folder,
        config=plain(cfg),
        settings=settings,
    )
    failed = True
    try:
        yield run
        failed = False
    finally:
        run.finish(exit_code=int(failed))


def log_frame(run: wandb.Run, name: str, frame: Any) -> None:
    run.log({name: wandb.Table(dataframe=frame.astype(object).where(frame.notna(), None))})


def log_table(run: wandb.Run, name: str, table: Table) -> None:
    name = re.sub(r"\W+", "_", name)
    run.log({name: wandb.Table(columns=list(table.columns), data=[list(r) for r in table.rows])})


def log_image(run: wandb.Run, name: str, path: Path) -> None:
    run.log({name: wandb.Image(str(path))})
