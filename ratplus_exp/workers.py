"""Worker processes for sweeps, prompts, batches and shards. They end with the process that started
them."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from functools import cache
from multiprocessing import forkserver, get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

T = TypeVar("T")
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}  # which this process handles


@cache
def context() -> Any:
    """The multiprocessing context of all workers.

    A fork of this process would copy locked threads and the GPU's state. On Linux workers are
    forked from a server that has only imported what `multiprocessing.set_forkserver_preload` names
    (PYTHONPATH or an installation must have the package); they have the environment of its start.
    Elsewhere every worker imports it.
    """
    if sys.platform != "linux":
        return get_context("spawn")
    resource_tracker.ensure_running()
    # The server and its workers inherit the mask: signals to the process group are for this one.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return get_context("forkserver")


class Workers(ProcessPoolExecutor):
    """A pool of processes whose `with` block waits for its tasks, but ends at once on an error: a
    ValueError if a process was killed.

    state: sent to each process once, for `call`; initialize: called first in each process.
    """

    def __init__(
        self, count: int, *state: Any, initialize: Callable[[], object] | None = None
    ) -> None:
        self._count = count
        # The pipe closes with `stop`, or when this process ends for any reason.
        parent_pipe, self._parent_pipe = context().Pipe(duplex=False)
        super().__init__(count, context(), _start, (parent_pipe, initialize, state))

    def call(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Submit function(*state, *args), with the process's own state."""
        return self.submit(_call, function, *args)

    def stop(self) -> None:
        """End the processes immediately."""
        self.shutdown(wait=False, cancel_futures=True)
        self._parent_pipe.close()

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not None:
            self.stop()
        super().__exit__(kind, *rest)
        if kind is not None and issubclass(kind, BrokenExecutor):
            raise ValueError(
                "a worker process was killed, probably because memory ran out: run again with "
                f"stage.workers={self._count // 2}"
            ) from None


_state: tuple[Any, ...] = ()  # of a worker process


def _call(function: Callable[..., T], *args: Any) -> T:
    return function(*_state, *args)


def _start(
    parent_pipe: Connection, initialize: Callable[[], object] | None, state: tuple[Any, ...]
) -> None:
    global _state
    _state = state
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the process that stops them

    def exit_with_parent() -> None:
        wait([parent_pipe])  # nothing is ever sent
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
    if initialize is not None:
        initialize()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # by which a broken pool ends them
