"""Batches made by worker processes are the ones that the training would have made itself."""

import os

import numpy as np
import pytest

from ratplus_exp.training.ahead import NICE, made_ahead

SIZES = [(4, 8), (4, 8), (2, 16)]


VOCABULARY = 1000


def batch(step, rows, length):
    if step < 0 or length == 13:
        raise ValueError("no such batch")
    generator = np.random.default_rng(step)
    labels = generator.integers(0, 1000, (rows, length))
    return generator.integers(0, 1000, (rows, length)), np.where(labels < 500, -100, labels)


def test_batches_are_the_same_and_are_kept_for_the_next_run(tmp_path):
    for workers in (2, 1):
        with made_ahead(batch, SIZES, tmp_path, workers, VOCABULARY) as ahead:
            for step, size in enumerate(SIZES):
                for made, expected in zip(ahead(step, *size), batch(step, *size), strict=True):
                    assert made.dtype == np.int64
                    np.testing.assert_array_equal(made, expected)
        files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        assert len(files) == len(SIZES)
        if workers == 2:
            first = files
    assert files == first  # none was made again


def test_an_error_in_a_worker_reaches_the_training(tmp_path):
    with (
        made_ahead(batch, [(1, 13)], tmp_path, 1, VOCABULARY) as ahead,
        pytest.raises(ValueError, match="no such batch"),
    ):
        ahead(0, 1, 13)


def large(step, rows, length):
    """Ids at both ends of 65 535, where two bytes end, and one label that does not count."""
    ids = np.arange(65_530, 65_530 + rows * length).reshape(rows, length)
    labels = ids.copy()
    labels[0, 0] = -100
    return ids, labels


@pytest.mark.parametrize(("vocabulary", "kind"), [(65_535, "uint16"), (65_536, "uint32")])
def test_ids_of_any_vocabulary_come_back(tmp_path, vocabulary, kind):
    size = (1, vocabulary - 65_530)
    with made_ahead(large, [size], tmp_path, 1, vocabulary) as ahead:
        for made, expected in zip(ahead(0, *size), large(0, *size), strict=True):
            np.testing.assert_array_equal(made, expected)
    assert np.load(tmp_path / "000000.npy").dtype == kind


def test_each_of_several_processes_makes_its_own_steps(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        with made_ahead(batch, SIZES, tmp_path, 1, VOCABULARY) as ahead:
            ahead(rank, *SIZES[rank])
            if rank == 0:  # what the other made is read
                np.testing.assert_array_equal(ahead(1, *SIZES[1])[0], batch(1, *SIZES[1])[0])
        made = {path.name for path in tmp_path.iterdir()}
        assert rank == 0 or made == {"000001.npy"}
    assert made == {f"00000{step}.npy" for step in range(len(SIZES))}


def niceness(step, rows, length):
    return (np.full((rows, length), os.nice(0)),) * 2


def test_workers_let_the_training_go_first(tmp_path):
    with made_ahead(niceness, [(1, 1)], tmp_path, 1, VOCABULARY) as ahead:
        assert ahead(0, 1, 1)[0].item() == min(19, os.nice(0) + NICE)
