"""Checkpoints: one file of one process, or one folder that many processes write together.

    <folder>/checkpoint.pt        one process (torch.save)
    <folder>/checkpoint-<step>/   many processes (torch.distributed.checkpoint)

Either kind can be read by any number of processes. There is one checkpoint at a time: the older one
goes when the newer is whole.
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


class Checkpoints:
    """The checkpoints of one training, in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "checkpoint.pt"

    def latest(self) -> Path | None:
        """The checkpoint with the most steps, or None."""
        found = {_step(path): path for path in self._folders()}
        if self.file.exists():
            # Both kinds are there only if a kill came between writing one and removing the other.
            found[_read(self.file, mmap=True)["step"] if found else 0] = self.file
        return found[max(found)] if found else None

    def save(self, state: State) -> None:
        """Write a state, which has its "step"; every process must call it."""
        if world_size() == 1:
            partial = self.file.with_suffix(".partial")
            torch.save(state, partial)
            os.replace(partial, self.file)
            self._keep(self.file)
            return
        target = self.folder / f"checkpoint-{state['step']}"
        partial = target.with_suffix(".partial")
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        barrier()
        dcp.save(state, checkpoint_id=partial)
        if rank() == 0:
            os.replace(partial, target)
            self._keep(target)
        barrier()

    def load(self, current: Callable[[], State]) -> State | None:
        """The latest state, cut up as `current()` is, or None; every process must call it.

        current: makes a state of the right shapes, with tensors that may be overwritten.
        """
        path = self.latest()
        if path is None:
            return None
        if path == self.file:
            saved = _read(path, mmap=world_size() > 1)
            return like(saved, current()) if world_size() > 1 else saved
        state = current()
        dcp.load(state, checkpoint_id=path, no_dist=world_size() == 1)
        return state

    def _folders(self) -> list[Path]:
        return [p for p in self.folder.glob("checkpoint-*") if p.name[11:].isdigit()]

    def _keep(self, newest: Path) -> None:
        for path in (*self._folders(), self.file):
            if path == newest or not path.exists():
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _read(path: Path, mmap: bool) -> State:
    return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
