"""The batches of a training, one a step, made by worker processes ahead of their use."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from ratplus_exp.training.parallel import cores, local_world_size
from ratplus_exp.training.settings import Batch, Schedule

BatchOf = Callable[[int, int, int], Batch]  # a pure function of (step, rows, length)
NICE = 10  # how far a worker steps back behind the training


class Batches(Dataset[Batch]):
    """The batch of each step of a schedule; workers need it picklable."""

    def __init__(self, batch: BatchOf, schedule: Schedule) -> None:
        self.batch, self.schedule = batch, schedule

    def __getitem__(self, step: int) -> Batch:
        return self.batch(step, self.schedule.rows_at(step), self.schedule.length_at(step))

    def since(self, step: int, workers: int) -> Generator[Batch, None, None]:
        """The batches from this step on; to be closed, which ends the workers.

        workers: processes, one a core at most, shared with the others of this machine; 0: each
        batch is made when it is asked for.
        """
        loader: Any = DataLoader(
            self,
            batch_size=None,
            sampler=range(step, self.schedule.steps),
            num_workers=min(workers, max(1, cores() // local_world_size())),
            multiprocessing_context="spawn" if workers else None,
            collate_fn=_as_it_is,  # tensors take shared memory, of which a container has 64 MB
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
            if workers:  # now, not when a traceback lets go of them
                batches._shutdown_workers()


def _as_it_is(batch: Any) -> Any:
    return batch


def _begin(_: int) -> None:
    """A worker leaves signals to the training, and the first turn on a core, since a GPU waits for
    what that launches."""
    os.nice(NICE)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
