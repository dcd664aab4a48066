"""The one bootstrap against brute force: every way to draw trainings and samples, in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from ratplus_exp.analysis.bootstrap import (
    Bootstrap,
    Estimate,
    over_trainings,
    sample_counts,
    spread,
)

QUANTILES = (0.025, 0.975)
SIDES = ("RAT+", "Attention")


def rows(scores: np.ndarray, side: str, task: str, trainings=None) -> pd.DataFrame:
    """scores: (trainings, samples)."""
    numbers = range(len(scores)) if trainings is None else trainings
    return pd.DataFrame(
        {"backbone": side, "task": task, "id": f"{task}/{i}", "training": number, "exact": score}
        for number, line in zip(numbers, scores, strict=True)
        for i, score in enumerate(line)
    )


def gain(samples, tasks=("S-1", "MQ"), n_boot=10_000) -> Estimate:
    draws = Bootstrap(samples, "exact", ["backbone"], n_boot)
    return draws.gain(*((side,) for side in SIDES), tasks)


def every_way(scores: dict[str, np.ndarray]) -> np.ndarray:
    """Of {task: scores of the samples} the mean over tasks for every draw of samples, by plain
    loops."""
    by_task = []
    for values in scores.values():
        means = []
        for drawn in itertools.product(values, repeat=len(values)):
            total = 0.0
            for score in drawn:
                total += float(score)
            means.append(total / len(values))
        by_task.append(means)
    return np.array([np.mean(combination) for combination in itertools.product(*by_task)])


def test_the_interval_over_samples_is_that_of_every_way_to_draw():
    generator = np.random.default_rng(1)
    sizes = {"S-1": 3, "MQ": 4}
    scores = {side: {t: generator.normal(size=(1, n)) for t, n in sizes.items()} for side in SIDES}
    frames = [rows(s, side, task) for side in SIDES for task, s in scores[side].items()]
    found = gain(pd.concat(frames), n_boot=200_000)
    every = 100 * every_way({t: scores["RAT+"][t][0] - scores["Attention"][t][0] for t in sizes})
    assert found.value == pytest.approx(every.mean())
    spread_of_all = every.max() - every.min()
    expected = tuple(np.quantile(every, QUANTILES))
    assert (found.low, found.high) == pytest.approx(expected, abs=0.02 * spread_of_all)


@pytest.mark.parametrize(("trainings", "t"), [(2, 12.706), (3, 4.303), (6, 2.571)])
def test_the_interval_over_trainings_is_students(trainings, t):
    """Of samples that are all alike, so that only trainings differ."""
    means = np.random.default_rng(1).normal(size=trainings)
    scores = means[:, None] + np.zeros((1, 20))
    found = Bootstrap(rows(scores, "RAT+", "MQ"), "exact", ["backbone"], n_boot=400_000)
    x = Estimate.of(found.mean(("RAT+",)))
    half = t * means.std(ddof=1) / trainings**0.5
    expected = (means.mean(), means.mean() - half, means.mean() + half)
    assert (x.value, x.low, x.high) == pytest.approx(expected, abs=0.04 * half)


def test_alike_trainings_add_nothing_and_unlike_ones_widen_the_interval():
    generator = np.random.default_rng(2)
    one, base = generator.integers(0, 2, (2, 60)).astype(float)
    single = pd.concat([rows(one[None], "RAT+", "MQ"), rows(base[None], "Attention", "MQ")])
    alike = pd.concat([rows(np.tile(x, (3, 1)), s, "MQ") for s, x in zip(SIDES, (one, base))])  # noqa: B905
    assert vars(gain(alike, ["MQ"])) == pytest.approx(vars(gain(single, ["MQ"])))

    shifted = np.stack([one - 0.3, one, one + 0.3])  # the same mean
    unlike = pd.concat(
        [rows(shifted, "RAT+", "MQ"), rows(np.tile(base, (3, 1)), "Attention", "MQ")]
    )
    narrow, wide = gain(alike, ["MQ"]), gain(unlike, ["MQ"])
    assert wide.value == pytest.approx(narrow.value)
    assert wide.low < narrow.low - 5 and wide.high > narrow.high + 5


def test_trainings_of_one_number_are_paired():
    """What a training does to both backbones alike is no part of their difference."""
    scores = np.array([[0.2], [0.5], [0.9]]) + np.zeros((3, 40))
    both = [rows(scores + 0.05, "RAT+", "MQ"), rows(scores, "Attention", "MQ")]
    paired = gain(pd.concat(both), ["MQ"])
    assert (paired.low, paired.high) == pytest.approx((5, 5))
    both[1]["training"] += 3  # others: nothing to pair
    assert np.isnan(gain(pd.concat(both), ["MQ"]).value)


def test_a_training_that_one_backbone_lacks_does_not_count_in_the_difference():
    scores = np.array([[0.2], [0.5], [0.8]]) + np.zeros((3, 30))
    frame = pd.concat(
        [rows(scores, "RAT+", "MQ"), rows(scores[1:] - 0.1, "Attention", "MQ", [1, 2])]
    )
    found = Bootstrap(frame, "exact", ["backbone"])
    assert found.mean(("RAT+",))[0] == pytest.approx(0.5)
    assert found.mean(("RAT+",), among=[("Attention",)])[0] == pytest.approx(0.65)
    x = gain(frame, ["MQ"])
    assert (x.value, x.low, x.high) == pytest.approx((10, 10, 10))


@pytest.mark.parametrize("trainings", [3, 12])
def test_coverage_of_a_mean_over_trainings_and_samples(trainings):
    """Of 300 studies with 30 samples, about 95 % of the intervals contain the true mean."""
    generator = np.random.default_rng(3)
    held = 0
    for _ in range(300):
        scores = generator.normal(size=(trainings, 1)) + generator.normal(size=(1, 30))
        found = Bootstrap(rows(scores, "RAT+", "MQ"), "exact", ["backbone"], n_boot=400)
        x = Estimate.of(found.mean(("RAT+",)))
        held += x.low <= 0 <= x.high
    assert 0.91 <= held / 300 <= 0.99


def test_tasks_weigh_alike_whatever_their_size():
    frame = pd.concat([rows(np.ones((1, 10)), "RAT+", "S-1"), rows(np.zeros((1, 1)), "RAT+", "MQ")])
    assert Bootstrap(frame, "exact", ["backbone"]).mean(("RAT+",))[0] == 0.5


def test_samples_pair_by_id_and_those_without_a_partner_do_not_count():
    a, b = (
        rows(np.array([[1.0, 0, 1]]), "RAT+", "MQ"),
        rows(np.array([[1.0, 0]]), "Attention", "MQ"),
    )
    assert vars(gain(pd.concat([a, b]), ["MQ"])) == {"value": 0, "low": 0, "high": 0}
    b["id"] += "x"
    assert np.isnan(gain(pd.concat([a, b]), ["MQ"]).value)
    assert np.isnan(gain(pd.concat([a, b]), ["MQ", "S-1"]).value)


def test_seeds_of_a_selector_are_averaged_within_a_training():
    draws = [rows(np.array([x]), "RAT+", "MQ") for x in ([1.0, 0.0], [0.0, 0.0])]
    found = Bootstrap(pd.concat(draws), "exact", ["backbone"]).mean(("RAT+",))
    assert found[0] == 0.25 and set(np.round(found, 6)) == {0, 0.25, 0.5}


def test_a_training_that_lacks_a_task_does_not_count():
    frame = pd.concat(
        [rows(np.array([[1.0], [0.0]]), "RAT+", "S-1"), rows(np.array([[1.0]]), "RAT+", "MQ")]
    )
    found = Bootstrap(frame, "exact", ["backbone"])
    assert found.mean(("RAT+",))[0] == 1 and found.mean(("RAT+",), ["S-1"])[0] == 0.5


def test_draws_begin_with_what_was_measured_and_come_again():
    counts = sample_counts("MQ", 5, 100)
    assert counts.shape == (101, 5) and (counts[0] == 1).all() and (counts.sum(1) == 5).all()
    assert len(np.unique(counts, axis=0)) > 50
    assert (counts == sample_counts("MQ", 5, 100)).all()
    assert (counts != sample_counts("S-1", 5, 100)).any()
    ones = np.eye(3)[None].repeat(101, axis=0)
    weights = over_trainings(ones, [0, 1, 2])
    assert weights[0] == pytest.approx(1 / 3) and weights.sum(1) == pytest.approx(1)
    means = np.random.default_rng(0).normal(size=(101, 3, 4))
    by_hand = [
        [sum(weights[r, t] * means[r, t, c] for t in range(3)) for c in range(4)]
        for r in range(101)
    ]
    assert over_trainings(means, [0, 1, 2]) == pytest.approx(np.array(by_hand))


def test_the_spread_is_over_trainings_or_else_over_seeds():
    cells = pd.DataFrame(
        {"training": t, "seed": 0, "selector_seed": s, "task": task, "exact": 10.0 * t + s + shift}
        for t in (0, 1, 2)
        for s in (0, 1)
        for task, shift in (("S-1", 0), ("MQ", 4))
    )
    assert spread(cells, "exact") == (pytest.approx(12.5), pytest.approx(10), 3, 2)
    one = cells[cells["training"] == 1]
    assert spread(one, "exact") == (pytest.approx(12.5), pytest.approx(0.5**0.5), 1, 2)
    gone = cells.drop(cells.index[-1])  # a draw that lacks a task
    assert spread(gone, "exact").mean == pytest.approx((2.5 + 12.5 + 22) / 3)
