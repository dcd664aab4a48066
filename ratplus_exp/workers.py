"""Worker processes for sweeps, prompts and shards, which end with the process that started them."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

# A fork would copy locked threads and the GPU's state. On Linux, processes are forked from one that
# has imported what they need and done nothing else; elsewhere each imports it anew, and one after
# the other, since the pipe to it is shorter than a pickled tokenizer.
CONTEXT = get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux":
    CONTEXT.set_forkserver_preload(["ratplus_exp.stages.train", "ratplus_exp.stages.pool"])


class Workers(ProcessPoolExecutor):
    """A pool of processes whose `with` block waits for its tasks, but ends at once on an error.

    initialize(*args): called first in each process.
    """

    def __init__(
        self, count: int, initialize: Callable[..., None] | None = None, *args: Any
    ) -> None:
        # The pipe closes with `stop`, or when this process ends for any reason.
        lifeline, self._lifeline = CONTEXT.Pipe(duplex=False)
        super().__init__(count, CONTEXT, _start, (lifeline, initialize, args))

    def submit(self, *args: Any, **settings: Any) -> Future[Any]:
        # New processes inherit the mask: this process handles Ctrl-C and stops them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(*args, **settings)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

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
    end_with(lifeline)
    if initialize is not None:
        initialize(*args)


def end_with(pipe: Connection | int) -> None:
    """End this process when the other end of the pipe closes; nothing is ever sent."""

    def watch() -> None:
        wait([pipe])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
