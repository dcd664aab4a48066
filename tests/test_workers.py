"""Workers end with their parent, at once after an error or Ctrl-C, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from ratplus_exp.workers import Workers

pytestmark = pytest.mark.timeout(120)

PARENT = """
import sys
sys.path.insert(0, {here!r})
from test_workers import note
from ratplus_exp.workers import Workers
if __name__ == "__main__":
    with Workers(2) as pool:
        jobs = [pool.submit(note, {folder!r}, i) for i in range(10)]
        jobs[0].result()
"""


def note(folder, i):
    """Says which process this is, then goes on for ever."""
    with open(f"{folder}/{os.getpid()}.tmp", "w"):
        os.rename(f"{folder}/{os.getpid()}.tmp", f"{folder}/{os.getpid()}")
    time.sleep(3600)


def runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(true, seconds=30.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def parent_of_two(folder):
    """A process with two busy workers, and their ids."""
    script = folder / "parent.py"
    workers = folder / "workers"
    workers.mkdir()
    script.write_text(PARENT.format(here=os.path.dirname(__file__), folder=str(workers)))
    parent = subprocess.Popen([sys.executable, script], start_new_session=True)
    until(lambda: len(list(workers.glob("*[0-9]"))) == 2)
    return parent, [int(path.name) for path in workers.iterdir()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_worker_outlives_its_parent(tmp_path, number):
    parent, workers = parent_of_two(tmp_path)
    parent.send_signal(number)
    parent.wait(timeout=10)
    until(lambda: not any(map(runs, workers)), 10)


def test_ctrl_c_ends_all_in_time(tmp_path):
    """As a terminal sends it: to all processes."""
    parent, workers = parent_of_two(tmp_path)
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.wait(timeout=10) != 0
    until(lambda: not any(map(runs, workers)), 10)


def test_an_error_does_not_wait_for_what_runs(tmp_path):
    started = time.monotonic()
    with pytest.raises(ValueError, match="enough"), Workers(1) as pool:
        pool.submit(note, tmp_path, 0)
        until(lambda: list(tmp_path.iterdir()))
        raise ValueError("enough")
    assert time.monotonic() - started < 40


def test_a_killed_worker_is_an_error_not_a_wait():
    with pytest.raises(ValueError, match=r"killed.* stage\.workers=1"), Workers(2) as pool:
        jobs = [pool.submit(os.kill, os.getpid(), 0), pool.submit(die)]
        for job in jobs:
            job.result()


def test_each_process_has_the_state():
    with Workers(1, "a", {"b": 1}) as pool:
        assert pool.call(joined, "c").result() == ("a", {"b": 1}, "c")


def joined(*args):
    return args


def die():
    os.kill(os.getpid(), signal.SIGKILL)
