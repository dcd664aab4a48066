"""Batches made by worker processes are those that the training would have made itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from ratplus_exp.training.batches import NICE, batches

STEPS = [(0, 4, 8), (1, 4, 8), (2, 4, 8), (3, 2, 16)]  # step, rows, length
pytestmark = pytest.mark.timeout(180)


def batch(step, rows, length):
    generator = np.random.default_rng(step)
    labels = generator.integers(0, 100_000, (rows, length))
    return generator.integers(0, 100_000, (rows, length)), np.where(labels < 500, -100, labels)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("first", [0, 2, 4])
def test_batches_come_in_the_order_of_steps(workers, first):
    wanted = [batch(0, 4, 8), batch(1, 4, 8), batch(2, 4, 8), batch(3, 2, 16)][first:]
    made = list(batches(batch, STEPS[first:], workers))
    assert [step for step, _ in made] == [step for step, _, _ in STEPS[first:]]
    for (_, pair), wanted_pair in zip(made, wanted, strict=True):
        for x, y in zip(pair, wanted_pair, strict=True):
            np.testing.assert_array_equal(x, y)
            assert x.dtype == y.dtype


def wrong(step, rows, length):
    raise ValueError("no such batch")


def test_an_error_of_a_worker_ends_the_training():
    with pytest.raises(ValueError, match="no such batch"):
        next(batches(wrong, STEPS, 1))


def process(step, rows, length):
    """Says which process this is, and how nice; batches after the first take their time."""
    if step:
        time.sleep(1)
    return np.full((rows, length), os.getpid()), np.full((rows, length), os.nice(0))


def test_workers_leave_signals_and_the_first_turn_to_the_training():
    with closing(batches(process, STEPS, 1)) as made:
        _, (ids, niceness) = next(made)
        worker = int(ids[0, 0])
        assert niceness[0, 0] == min(19, os.nice(0) + NICE)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(worker, number)
        _, (ids, _) = next(made)
        assert int(ids[0, 0]) == worker
    ends(worker)


def ends(worker):
    end = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < end
        time.sleep(0.1)


PARENT = """
import multiprocessing, os, signal, sys, time
from contextlib import closing
sys.path.insert(0, {here!r})
from test_batches import STEPS, process
from ratplus_exp.training.batches import batches
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: None)
    with closing(batches(process, STEPS, {workers})) as made:
        print(int(next(made)[1][0][0, 0]), flush=True)
        {then}
"""


def parent(folder, workers, then):
    """A training that gets its first batch, prints the process that made it, and then `then`."""
    script = folder / "parent.py"
    here = os.path.dirname(__file__)
    script.write_text(PARENT.format(here=here, workers=workers, then=then))
    command = [sys.executable, script]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_a_signal_to_the_process_group_is_for_the_training(tmp_path):
    # A pool starts a second process only where the first is busy.
    then = "before = multiprocessing.active_children(); os.killpg(0, signal.SIGTERM); "
    then += (
        "time.sleep(0.5); print(before and set(before) == set(multiprocessing.active_children()))"
    )
    training = parent(tmp_path, 2, then)
    assert training.communicate()[0].splitlines()[1:] == ["True"]
