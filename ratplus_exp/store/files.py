"""Files that survive a kill or power cut, and folders that one process writes at a time."""

import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

from tqdm import tqdm


class StoreBusy(OSError):
    """Another process is writing this folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock folder/lock, which names this process; the folder is created if missing. StoreBusy if
    another process has locked it, OSError if the folder can't be written or locked."""
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / "lock").open("a+", encoding="utf-8"))
            # The kernel releases the lock with its process, so a kill leaves no stale one.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise StoreBusy(
                f"{folder} is being written by {lock.read() or 'another process'}: "
                "wait until it ends or stop it, then start again"
            ) from None
        except OSError as error:
            raise OSError(
                f"cannot write results under {folder} ({error.strerror}): make this folder "
                "writable, or choose another one on a disk that supports file locks"
            ) from error
        with naming(folder / "lock"):
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
        remove_drafts(folder)
        try:
            yield
        finally:  # closing is not enough while a forked child (a data worker) has the file open
            fcntl.flock(lock, fcntl.LOCK_UN)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file (text in UTF-8) atomically, even if the process or the machine stops."""
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
    """Remove drafts that killed processes left in a folder where no other process writes."""
    for draft in folder.glob(".*.tmp"):
        draft.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to an OSError without one, as that of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@cache
def warn(text: str) -> None:
    """Print one line to stderr, once per process."""
    tqdm.write(f"warning: {' '.join(text.split())}", file=sys.stderr)


def sync(folder: Path) -> None:
    """Write a folder's entries (new, renamed or deleted files) to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
