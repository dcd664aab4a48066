"""Files that a kill or a power cut leaves whole, and folders that one process writes at a time."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tqdm import tqdm


class StoreBusy(OSError):
    """Another process is writing this folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold folder/lock, which names this process; the folder is made where there is none.

    Raises:
        StoreBusy: another process holds it.
        OSError: the folder can't be written or locked.
    """

    def unwritable(error: OSError) -> OSError:
        return OSError(
            f"cannot write results under {folder} ({error.strerror}): make this folder writable, "
            "or choose another one on a disk that supports file locks"
        )

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise unwritable(error) from error
    with lock:
        try:
            # The kernel drops the lock with its process, so a kill leaves no stale one.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise StoreBusy(
                f"{folder} is being written by {lock.read() or 'another process'}: "
                "wait until it ends or stop it, then start again"
            ) from None
        except OSError as error:
            raise unwritable(error) from error
        with naming(folder / "lock"):
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
        remove_drafts(folder)
        try:
            yield
        finally:  # closing would not do while a forked child (a data worker) has it too
            fcntl.flock(lock, fcntl.LOCK_UN)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file (text in UTF-8) such that readers and crashes see the old one or the new one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), draft.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    sync(path.parent)


def remove_drafts(folder: Path) -> None:
    """Remove what killed processes left of `write_atomically`, where no other one writes."""
    for draft in folder.glob(".*.tmp"):
        draft.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError inside names the path; a full disk's does not by itself."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@cache
def warn(text: str) -> None:
    """One line on stderr, once a process."""
    tqdm.write(f"warning: {' '.join(text.split())}", file=sys.stderr)


def sync(folder: Path) -> None:
    """Make the folder's entries (a new, renamed or deleted file) survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
