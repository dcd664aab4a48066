"""H1: hit rates by head, and the top heads of both backbones compared.

A head's hit rate is the share of gold values whose gold position was among the head's selected
candidates at every step; tasks have equal weight in its mean. Heads are ranked within each
training, and each rank is averaged over trainings.
"""

from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd

from ratplus_exp.analysis.bootstrap import RESAMPLES, Estimate, over_trainings, sample_counts
from ratplus_exp.analysis.frame import (
    BACKBONES,
    SETTING,
    Cells,
    LeftOut,
    backbones_of,
    finished,
    select,
    tidy,
)

STAGE = "hit_rate"
MEAN = "mean"  # in the task column: the mean over tasks
UP_TO = " up to rank"  # in a column's name: the mean over a rank and all better ones
ENDS = ("", " low", " high")  # of the columns of an estimate


def hit_rates(cells: Cells, **where: Any) -> pd.DataFrame:
    """One row per layer, head and finished cell: layer, head (from 0), hit_rate (percent), values
    (gold values counted), and the columns of `tidy` except accuracies. where: for `select`."""
    by_id = {x.cell.id: x for x in finished(cells, STAGE)}
    rows = []
    for row in select(tidy(by_id.values(), STAGE), where).to_dict("records"):
        metrics = by_id[row["cell"]].metrics
        for (layer, head), rate in np.ndenumerate(metrics["hit_rate"]):
            of_head = {"layer": layer, "head": head, "hit_rate": rate, "values": metrics["values"]}
            rows.append(row | of_head)
    columns = [
        *("layer", "head", "task", "backbone", "training", "method", "block_size", "budget"),
        *("budget_measured", "hit_rate", "n", "values", "selector", "selector_seed", "first_token"),
        *("seed", "model", "checkpoint", "variant", "context_length", "tier", "cell"),
    ]
    return pd.DataFrame(rows, columns=columns)


def ranked_heads(rates: pd.DataFrame) -> pd.DataFrame:
    """Heads by their mean hit rate over tasks, best first, within each setting and training.

    From rows of `hit_rates`: SETTING, backbone, training, rank (from 1), layer, head, hit_rate.
    """
    place = [*SETTING, "backbone", "training"]
    means = rates.groupby([*place, "layer", "head"], as_index=False)["hit_rate"].mean()
    means = means.sort_values("hit_rate", ascending=False, kind="stable")
    means["rank"] = means.groupby(place).cumcount() + 1
    return means.sort_values([*place, "rank"], ignore_index=True)


def rank_curves(samples: pd.DataFrame, n_boot: int = RESAMPLES) -> pd.DataFrame:
    """Hit rate by rank, with 95 % bootstrap intervals; heads are ranked again in every resample.

    The maximum over heads is biased upwards, equally for backbones with as many heads.

    samples: rows of `sample_scores` of stage hit_rate, one model per backbone, or of one backbone.

    Returns:
        SETTING, task (or MEAN, over the tasks that all models have), rank, and for Attention,
        RAT+ and difference (RAT+ minus Attention) the value at this rank and UP_TO it, and "… low"
        and "… high", NaN where it was not measured; n is the number of the task's samples, of MEAN
        the smallest. Trainings and samples that only one backbone has do not count.
    """
    curves = [f"{x}{kind}" for x in (*BACKBONES, "difference") for kind in ("", UP_TO)]
    bounds = [f"{x}{end}" for x in curves for end in ENDS]
    frames = [pd.DataFrame(columns=[*SETTING, "task", "rank", *bounds, "n"])]
    settings = samples.groupby(SETTING)
    for setting, rows in sorted(settings, key=lambda x: (*x[0][:2], -Fraction(x[0][2]))):
        if rows.duplicated(["task", "backbone", "training", "id"]).any():
            raise LeftOut(
                f"several models or seeds share {' '.join(map(str, setting))}: choose one of each "
                "backbone with stage.where"
            )
        backbones, trainings = backbones_of(rows), common_trainings(rows)
        rates, n = {}, {}
        for task, of_task in select(rows, {"training": trainings}).groupby("task"):
            by_training, shared = _rates(str(task), of_task, n_boot)
            if len(by_training) == len(backbones) * len(trainings):
                rates[str(task)], n[str(task)] = by_training, shared
        if rates:
            groups = next(iter(rates.values()))
            rates[MEAN] = {g: np.mean([x[g] for x in rates.values()], axis=0) for g in groups}
            n[MEAN] = min(n.values())
        for task, of_task in rates.items():
            sides = {}
            for backbone in backbones:
                heads = np.stack([of_task[backbone, i] for i in trainings], 1)
                ranked = -np.sort(-heads, axis=-1)  # (n_boot + 1, trainings, heads)
                sides[backbone] = over_trainings(ranked, trainings)
            place = dict(zip(SETTING, setting, strict=True)) | {"task": task, "n": n[task]}
            frames.append(_curve(sides).assign(**place))
    return pd.concat(frames[1:] or frames, ignore_index=True)[list(frames[0].columns)]


def common_trainings(rows: pd.DataFrame) -> list[int]:
    """The trainings that all backbones of a frame have."""
    return sorted(set.intersection(*map(set, rows.groupby("backbone")["training"].unique())))


def estimate(row: Any, name: str) -> Estimate:
    """One of the curves in a row of `rank_curves`."""
    return Estimate(*(float(row[f"{name}{end}"]) for end in ENDS))


def _rates(
    task: str, samples: pd.DataFrame, n_boot: int
) -> tuple[dict[tuple[str, int], np.ndarray], int]:
    """Hit rates in percent (n_boot + 1, layers · heads) by backbone and training, over the samples
    that all of them have, and the number of those."""
    sides = {g: side.set_index("id") for g, side in samples.groupby(["backbone", "training"])}
    ids = sorted(set.intersection(*(set(side.index) for side in sides.values())))
    if not ids:
        return {}, 0
    counts = sample_counts(task, len(ids), n_boot)
    rates = {}
    for group, side in sides.items():
        hits = np.array([np.ravel(hit) for hit in side["hits"][ids]], float)
        values = counts @ side["values"][ids].to_numpy(float)
        rates[group] = 100 * (counts @ hits) / values[:, None]
    return rates, len(ids)


def _curve(sides: dict[str, np.ndarray]) -> pd.DataFrame:
    """Rows of `rank_curves` from percent (n_boot + 1, heads) of each backbone measured."""
    heads = min(side.shape[-1] for side in sides.values())
    unmeasured = np.full_like(next(iter(sides.values())), np.nan)
    attention, ratplus = (sides.get(b, unmeasured)[:, :heads] for b in BACKBONES)
    ranks = np.arange(1, heads + 1)
    columns: dict[str, Any] = {"rank": ranks}
    sides_and_difference = (attention, ratplus, ratplus - attention)
    for name, values in zip((*BACKBONES, "difference"), sides_and_difference, strict=True):
        for kind, curve in (("", values), (UP_TO, values.cumsum(axis=1) / ranks)):
            ends = (curve[0], *np.quantile(curve[1:], (0.025, 0.975), axis=0))
            columns |= {f"{name}{kind}{end}": x for end, x in zip(ENDS, ends, strict=True)}
    return pd.DataFrame(columns)
