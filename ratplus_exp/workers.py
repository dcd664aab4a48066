"""Worker processes for sweeps, prompts and shards; none outlives the process that started it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

SPAWN = get_context("spawn")  # a fork would take threads and the GPU's state along


def _nothing() -> None:
    pass


class Workers(ProcessPoolExecutor):
    """A pool of processes whose `with` block waits for its tasks, but ends at once on an error.

    begin(*args): called first in each process.
    """

    def __init__(self, count: int, begin: Callable[..., None] = _nothing, *args: Any) -> None:
        # Its end closes with `stop` or with this process, whatever killed it.
        theirs, self._lifeline = SPAWN.Pipe(duplex=False)
        super().__init__(count, SPAWN, _begin, (theirs, begin, args))

    def submit(self, *args: Any, **settings: Any) -> Future[Any]:
        # A process inherits the mask: Ctrl-C is for this one, which then stops the others.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(*args, **settings)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def stop(self) -> None:
        """End the processes now, whatever they do."""
        self.shutdown(wait=False, cancel_futures=True)
        self._lifeline.close()

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not None:
            self.stop()
        super().__exit__(kind, *rest)


def _begin(lifeline: Connection, begin: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would fight over the cores

    def watch() -> None:
        lifeline.poll(None)  # nothing is ever sent
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    begin(*args)
