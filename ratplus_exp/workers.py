"""Worker processes for sweeps, prompts, batches and shards. They end with the process that started
them."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import forkserver, get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}  # which this process handles


@cache
def context() -> Any:
    """The multiprocessing context of all workers.

    A fork of this process would copy locked threads and the GPU's state. On Linux workers are
    forked from a server that has only imported what they need (PYTHONPATH or an installation must
    have the package); they have the environment of its start. Elsewhere every worker imports it.
    """
    if sys.platform != "linux":
        return get_context("spawn")
    resource_tracker.ensure_running()
    forkserver.set_forkserver_preload(["ratplus_exp.stages.train", "ratplus_exp.stages.pool"])
    # The server and its workers inherit the mask: signals to the process group are for this one.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return get_context("forkserver")


class Workers(ProcessPoolExecutor):
    """A pool of processes whose `with` block waits for its tasks, but ends at once on an error.

    initialize(*args): called first in each process.
    """

    def __init__(
        self, count: int, initialize: Callable[..., None] | None = None, *args: Any
    ) -> None:
        # The pipe closes with `stop`, or when this process ends for any reason.
        lifeline, self._lifeline = context().Pipe(duplex=False)
        super().__init__(count, context(), _start, (lifeline, initialize, args))

    def stop(self) -> None:
        """End the processes immediately."""
        self.shutdown(wait=False, cancel_futures=True)
        self._lifeline.close()

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not None:
            self.stop()
        super().__exit__(kind, *rest)


def _start(
    lifeline: Connection, initialize: Callable[..., None] | None, args: tuple[Any, ...]
) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the process that stops them

    def end_with_lifeline() -> None:
        wait([lifeline])  # nothing is ever sent
        os._exit(1)

    threading.Thread(target=end_with_lifeline, daemon=True).start()
    if initialize is not None:
        initialize(*args)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # by which a broken pool ends them
