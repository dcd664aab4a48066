"""Checkpoints: one file of one process, or one folder that many processes write together.

    <folder>/checkpoint-<step>.pt   one process (torch.save)
    <folder>/checkpoint-<step>/     many processes (torch.distributed.checkpoint)

Any number of processes can read either kind. The last two are kept: the earlier one is used if the
newest is damaged, or was written after the loss began to diverge.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from ratplus_exp.distributed import barrier, rank, sum_over_ranks, world_size
from ratplus_exp.store.files import sync
from ratplus_exp.training.parallel import sharded_like

State = dict[str, Any]
KEPT = 2


class Checkpoints:
    """The checkpoints of one training, in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def kept(self) -> list[Path]:
        """All complete checkpoints, by step."""
        steps = [
            (int(step), path)
            for path in self.folder.glob("checkpoint-*")
            if (step := path.name[11:].removesuffix(".pt")).isdigit()
        ]
        return [path for _, path in sorted(steps)]

    def save(self, state: State) -> None:
        """Write a state with a "step"; every rank must call it.

        Raises:
            OSError: it cannot be written; earlier checkpoints stay.
        """
        suffix = ".pt" if world_size() == 1 else ""
        target = self.folder / f"checkpoint-{state['step']}{suffix}"
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
                # Older checkpoints, and the partial ones of killed processes.
                for path in (*self.kept()[:-KEPT], *self.folder.glob("checkpoint-*.partial")):
                    _remove(path)
        except (Exception, dcp.CheckpointException) as error:  # torch's have many lines
            text = " ".join(str(error.__context__ or error).split())[:160]
            raise OSError(
                f"cannot write {target} ({text}): make room or repair the disk, then run the same "
                "command to resume from the previous checkpoint"
            ) from None
        finally:
            if rank() == 0:
                _remove(partial)
        barrier()

    def load(self, current: Callable[[], State]) -> State | None:
        """The latest state, sharded as `current()` is, or None; every rank must call it.

        A damaged checkpoint is renamed, with a warning, and the one before is loaded.

        current: makes a state of the right shapes, whose tensors may be overwritten.

        Raises:
            ValueError: all are damaged.
        """
        kept = self.kept()
        for path in reversed(kept):
            state, problem = None, "on another process"
            try:
                state = _read(path, current)
            except OSError:  # of disk or permissions: the previous checkpoint has it, too
                raise
            except (Exception, dcp.CheckpointException) as error:  # torch raises a dozen kinds
                problem = type(error).__name__
            if sum_over_ranks([state is None], torch.device("cpu"))[0] == 0:
                return state
            if rank() == 0:
                print(f"{path} is damaged ({problem}): set aside as {path.name}.damaged")
                os.replace(path, path.with_name(path.name + ".damaged"))
            barrier()
        if kept:
            raise ValueError(
                f"all checkpoints in {self.folder} are damaged: delete the folder to start over"
            )
        return None


def _write(state: State, path: Path) -> None:
    """Write a state to disk, past all caches."""
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
        return sharded_like(saved, current()) if several else saved
    state = current()
    dcp.load(state, checkpoint_id=path, no_dist=not several)
    return state


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
