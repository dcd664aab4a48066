"""W&B: one run per job, offline by default. Its failures do not affect the job."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from ratplus_exp.config import plain
from ratplus_exp.distributed import rank
from ratplus_exp.report import Table
from ratplus_exp.store import warn

T = TypeVar("T")
SERVER_TIMEOUT = 20  # seconds to wait for the server; the folder has the complete run in any case


class Tracker:
    """A W&B run, or none; its errors become warnings. start: begins a run in a mode; if "online"
    fails, in "offline"."""

    def __init__(self, start: Callable[..., Any], mode: str) -> None:
        self._run: Any = None
        if mode == "online":
            self._run = _guarded(partial(start, mode=mode), "tracking continues offline")
        if mode != "disabled" and self._run is None:
            self._run = _guarded(partial(start, mode="offline"))

    def log(self, values: dict[str, Any]) -> None:
        """Numbers, tables, data frames, and the paths of pictures, each with its name."""
        if self._run is not None:
            _guarded(lambda: self._run.log(dict(_loggable(*item) for item in values.items())))

    def finish(self, exit_code: int) -> None:
        if self._run is not None:
            _guarded(lambda: self._run.finish(exit_code=exit_code))


@contextmanager
def tracked(cfg: DictConfig, folder: Path) -> Iterator[Tracker]:
    """A tracker with the whole configuration and its files in folder/wandb, on rank 0 alone. Runs
    of one multirun or experiment are one group, unless tracking.group names another."""
    job = HydraConfig.get()
    multirun = Path(job.sweep.dir).name if job.mode == RunMode.MULTIRUN else None
    experiment = job.runtime.choices.get("experiment")  # one, or a list of them
    group = cfg.tracking.group or multirun or (experiment and str(experiment))
    start = partial(
        wandb.init,
        project=cfg.tracking.project,
        entity=cfg.tracking.entity,
        group=group,
        job_type=cfg.stage.name,
        name=f"{cfg.stage.name}-{cfg.model.name}-{cfg.method.name}-seed{cfg.seed}",
        dir=folder,
        config=plain(cfg),
        settings=wandb.Settings(
            silent=True,
            console="off",
            init_timeout=SERVER_TIMEOUT,
            finish_timeout=6 * SERVER_TIMEOUT,
        ),
    )
    tracker = Tracker(start, cfg.tracking.mode if rank() == 0 else "disabled")
    failed = True
    try:
        yield tracker
        failed = False
    finally:
        tracker.finish(int(failed))


def _guarded(action: Callable[[], T], then: str = "the job continues") -> T | None:
    try:
        return action()
    except Exception as error:  # W&B's own, the network's and the disk's, of many kinds
        text = " ".join(str(error).split())[:160]
        warn(f"W&B: {type(error).__name__}: {text}; {then}, and its results are not affected")
        return None


def _loggable(name: str, value: Any) -> tuple[str, Any]:
    if isinstance(value, Table):
        rows = [list(row) for row in value.rows]
        return re.sub(r"\W+", "_", name), wandb.Table(columns=list(value.columns), data=rows)
    if isinstance(value, pd.DataFrame):
        return name, wandb.Table(dataframe=value.astype(object).where(value.notna(), None))
    return name, wandb.Image(str(value)) if isinstance(value, Path) else value
