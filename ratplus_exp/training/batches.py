"""The batches of a training, one a step, prefetched by worker processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterable
from multiprocessing import parent_process
from typing import Any

from torch.utils.data import DataLoader, Dataset

from ratplus_exp.distributed import cores
from ratplus_exp.training.settings import Batch, Schedule
from ratplus_exp.workers import context, end_with

BatchOf = Callable[[int, int, int], Batch]  # a pure function of (step, rows, length)
NICE = 10  # added to a worker's niceness: a waiting GPU has precedence


class Batches(Dataset[Batch]):
    """The batch of each step of a schedule; workers need it picklable."""

    def __init__(self, batch: BatchOf, schedule: Schedule) -> None:
        self.batch, self.schedule = batch, schedule

    def __getitem__(self, step: int) -> Batch:
        return self.batch(step, self.schedule.rows_at(step), self.schedule.length_at(step))

    def of(self, steps: Iterable[int], workers: int) -> Generator[Batch, None, None]:
        """The batches of these steps; closing the generator ends the workers.

        workers: processes, one a core at most; 0: this process makes each batch when it is due.

        Raises:
            ValueError: a worker was killed.
        """
        loader: Any = DataLoader(
            self,
            batch_size=None,
            sampler=steps,
            num_workers=min(workers, cores()),
            multiprocessing_context=context() if workers else None,
            collate_fn=_identity,  # tensors would need shared memory; a container has 64 MB of it
            worker_init_fn=_begin,
        )
        batches = iter(loader)
        try:
            yield from batches
        except RuntimeError as error:
            if "DataLoader worker" in str(error) and "Caught" not in str(error):
                raise ValueError(
                    "a process that makes batches was killed, probably for memory: run again with "
                    "a lower stage.workers"
                ) from None
            raise
        finally:
            if workers:  # now, not when the last traceback that refers to them is dropped
                batches._shutdown_workers()


def _identity(batch: Any) -> Any:
    return batch


def _begin(_: int) -> None:
    """A worker has low priority, ends with the training, and ignores signals, which are for it."""
    training = parent_process()
    assert training is not None
    end_with(training.sentinel)
    os.nice(NICE)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
