"""Batches made by worker processes are the ones that the training would have made itself."""

import numpy as np
import pytest

from ratplus_exp.training.ahead import made_ahead

SIZES = [(4, 8), (4, 8), (2, 16)]


def batch(step, rows, length):
    if step < 0 or length == 13:
        raise ValueError("no such batch")
    generator = np.random.default_rng(step)
    labels = generator.integers(0, 1000, (rows, length))
    return generator.integers(0, 1000, (rows, length)), np.where(labels < 500, -100, labels)


def test_batches_are_the_same_and_are_kept_for_the_next_run(tmp_path):
    for workers in (2, 1):
        with made_ahead(batch, SIZES, tmp_path, workers) as ahead:
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
        made_ahead(batch, [(1, 13)], tmp_path, 1) as ahead,
        pytest.raises(ValueError, match="no such batch"),
    ):
        ahead(0, 1, 13)
