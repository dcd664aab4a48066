"""Checkpoints: one file of one process, or one folder that many processes write together.

    <folder>/checkpoint-<step>.pt   one process (torch.save)
    <folder>/checkpoint-<step>/     many processes (torch.distributed.checkpoint)

Either kind can be read by any number of processes. The last two are kept, so that where a loss
went wrong before it was noticed, or the disk lost the newest, there is one from earlier; older ones
go when a newer is whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from ratplus_exp.store.files import sync
from ratplus_exp.training.parallel import barrier, like, rank, total, world_size

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
        """Write a state, which has its "step"; every process must call it.

        Raises:
            OSError: it cannot be written; the checkpoints before are left.
        """
        kind = ".pt" if world_size() == 1 else ""
        target = self.folder / f"checkpoint-{state['step']}{kind}"
        partial = target.with_name(target.name + ".partial")
        if rank() == 0:
            _remove(partial)
        barrier()
        try:
            _write(state, partial)
            if rank() == 0:
                _remove(target)
                os.replace(partial, target)
                sync(self.folder)
                self._forget()
        except (Exception, dcp.CheckpointException) as error:  # torch's say it over many lines
            text = " ".join(str(error.__context__ or error).split())[:160]
            raise OSError(
                f"cannot write {target} ({text}): make room or mend the disk, then run the same "
                "command to go on from the checkpoint before"
            ) from None
        finally:
            if rank() == 0:
                _remove(partial)
        barrier()

    def load(self, current: Callable[[], State]) -> State | None:
        """The latest state, cut up as `current()` is, or None; every process must call it.

        A damaged checkpoint is set aside, with a warning, and the one before is taken.

        current: makes a state of the right shapes, with tensors that may be overwritten.

        Raises:
            ValueError: all are damaged.
        """
        kept = self.kept()
        for path in reversed(kept):
            state = None
            try:
                state = _read(path, current)
                problem = "on another process"
            except OSError:  # of the disk or the rights, which the one before would meet too
                raise
            except (Exception, dcp.CheckpointException) as error:  # torch raises a dozen kinds
                problem = type(error).__name__
            if total([state is None], torch.device("cpu"))[0] == 0:
                return state
            if rank() == 0:
                print(f"{path} is damaged ({problem}): set aside as {path.name}.damaged")
                os.replace(path, path.with_name(path.name + ".damaged"))
            barrier()
        if kept:
            raise ValueError(
                f"all checkpoints in {self.folder} are damaged: delete the folder to begin anew"
            )
        return None

    def _forget(self) -> None:
        """Remove what is older than the last ones, and what a killed process left half-written."""
        for path in (*self.kept()[:-KEPT], *self.folder.glob("checkpoint-*.partial")):
            _remove(path)


def _write(state: State, path: Path) -> None:
    """On the disk when it returns."""
    if world_size() > 1:
        dcp.save(state, checkpoint_id=path)
        return
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path, current: Callable[[], State]) -> State:
    several = world_size() > 1
    if path.is_file():
        saved = torch.load(path, map_location="cpu", mmap=several, weights_only=True)
        return like(saved, current()) if several else saved
    state = current()
    dcp.load(state, checkpoint_id=path, no_dist=not several)
    return state


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _step(path: Path) -> int:
    return int(path.name[11:].removesuffix(".pt"))
