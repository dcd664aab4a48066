"""Checkpoints: one file of one process, or one folder that many processes write together.

    <folder>/checkpoint-<step>.pt   one process (torch.save)
    <folder>/checkpoint-<step>/     many processes (torch.distributed.checkpoint)

Either kind can be read by any number of processes. The last two are kept, so that where a loss
went wrong before it was noticed there is one from earlier; older ones go when a newer is whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from ratplus_exp.training.parallel import barrier, like, rank, world_size

State = dict[str, Any]
KEPT = 2


class Checkpoints:
    """The checkpoints of one training, in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def kept(self) -> list[Path]:
        """All that are whole, by their steps."""
        found = self.folder.glob("checkpoint-*")
        return sorted((p for p in found if p.name[11:].removesuffix(".pt").isdigit()), key=_step)

    def latest(self) -> Path | None:
        """The checkpoint with the most steps, or None."""
        return self.kept()[-1] if self.kept() else None

    def save(self, state: State) -> None:
        """Write a state, which has its "step"; every process must call it."""
        target = self.folder / f"checkpoint-{state['step']}"
        if world_size() == 1:
            target = target.with_name(target.name + ".pt")
            partial = target.with_name(target.name + ".partial")
            torch.save(state, partial)
            os.replace(partial, target)
            self._forget()
            return
        partial = target.with_name(target.name + ".partial")
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        barrier()
        dcp.save(state, checkpoint_id=partial)
        if rank() == 0:
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
            self._forget()
        barrier()

    def load(self, current: Callable[[], State]) -> State | None:
        """The latest state, cut up as `current()` is, or None; every process must call it.

        current: makes a state of the right shapes, with tensors that may be overwritten.
        """
        path = self.latest()
        if path is None:
            return None
        if path.is_file():
            several = world_size() > 1
            saved = torch.load(path, map_location="cpu", mmap=several, weights_only=True)
            return like(saved, current()) if several else saved
        state = current()
        dcp.load(state, checkpoint_id=path, no_dist=world_size() == 1)
        return state

    def _forget(self) -> None:
        """Remove what is older than the last ones, and what a killed process left half-written."""
        for path in (*self.kept()[:-KEPT], *self.folder.glob("checkpoint-*.partial")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _step(path: Path) -> int:
    return int(path.name[11:].removesuffix(".pt"))
