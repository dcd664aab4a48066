"""A table of the paper compared with measured cells: cell by cell, by pattern, and by rank."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd

from ratplus_exp.analysis.bootstrap import Bootstrap, Estimate, rank_correlation, spread
from ratplus_exp.analysis.frame import BACKBONES, DENSE, GROUP, SETTING

DECISIVE = 5.0
"""Least difference in points of the paper's backbones in a decisive cell."""
FEWEST = 5
"""Least number of settings for a rank correlation; with fewer it has few possible values."""
SOLVED = 50.0
"""Dense accuracy in percent, below which a task has little accuracy to lose."""


def scaled(paper: pd.DataFrame, context: int) -> pd.DataFrame:
    """Rows of the paper with `block_size` scaled so that a context has as many blocks, 64 of 4096
    tokens as 8 of 512; negative, so that it matches no cell, if that is not a whole number.
    `paper_block` is as printed."""
    sizes = []
    for row in paper.itertuples():
        size = Fraction(row.budget) * context / row.top_k if row.block_size > 1 else Fraction(1)
        sizes.append(int(size) if size.denominator == 1 else -row.block_size)
    return paper.assign(block_size=sizes, paper_block=paper["block_size"])


def compare(paper: pd.DataFrame, cells: pd.DataFrame, accuracy: str) -> pd.DataFrame:
    """Each accuracy of a table of the paper with the measured one.

    paper: of `scaled`; cells: rows of `tidy`, one model per backbone, of one context length;
    accuracy: their column to compare.

    Returns:
        The rows of `paper`, with measured and measured_std (see `spread`), difference (measured
        minus paper, points), n (a seed), trainings, seeds (a training) and budget_measured; NaN
        without measured cells.
    """
    groups = dict(iter(cells.groupby([*GROUP, "task"])))
    rows = []
    for place in paper[[*GROUP, "task"]].itertuples(index=False, name=None):
        if (group := groups.get(place)) is None:
            rows.append((np.nan, np.nan, 0, 0, None, np.nan))
        else:
            budget = group["budget_measured"].mean()
            rows.append((*spread(group, accuracy), group["n"].min(), budget))
    names = ["measured", "measured_std", "trainings", "seeds", "n", "budget_measured"]
    measured = pd.DataFrame(rows, columns=names).astype({"n": "Int64"})
    frame = pd.concat([paper.reset_index(drop=True), measured], axis=1)
    return frame.assign(difference=frame["measured"] - frame["accuracy"])


def patterns(paper: pd.DataFrame, draws: Bootstrap) -> pd.DataFrame:
    """Agreement of measured cells with a table of `scaled`: all of it, then each of its methods.

    Returns:
        table; scope: "all" or a method.
        decisive: number of the paper's cells (setting × task) whose backbones differ by DECISIVE
            points or more; measured: those measured with both backbones; agree, against, tied:
            those with the paper's sign, the other one, or no difference.
        agreement: 100 · agree / measured, an Estimate.
        settings: number of fully measured settings.
        gain, attention, ratplus: Estimates of Spearman's correlation of paper and measured over
            these settings, of RAT+ minus Attention, and of each backbone's mean over tasks.
    """
    tasks = paper["task"].unique()
    wide = paper.pivot_table("accuracy", [*SETTING, "selector"], ["task", "backbone"], sort=False)
    wide = wide.reindex(columns=pd.MultiIndex.from_product([tasks, BACKBONES]))
    printed = wide.to_numpy().reshape(len(wide), len(tasks), len(BACKBONES))
    measured = np.empty((draws.n_boot + 1, *printed.shape))
    for i, setting in enumerate(wide.index):
        both = [(*setting, backbone) for backbone in BACKBONES]
        for j, task in enumerate(tasks):
            for k, group in enumerate(both):
                measured[:, i, j, k] = 100 * draws.mean(group, [task], both)
    methods = wide.index.get_level_values("method")
    scopes = {"all": np.full(len(wide), True)} | {m: methods == m for m in methods.unique()}
    rows = [
        {"table": paper["table"].iloc[0], "scope": scope}
        | _pattern(printed[kept], measured[:, kept])
        for scope, kept in scopes.items()
    ]
    return pd.DataFrame(rows)


def _pattern(paper: np.ndarray, measured: np.ndarray) -> dict[str, Any]:
    """paper: (settings, tasks, backbones); measured: (n_boot + 1, settings, tasks, backbones)."""
    paper_gain, gain = (x[..., 1] - x[..., 0] for x in (paper, measured))
    decisive = np.abs(paper_gain) >= DECISIVE - 1e-9
    both = decisive & np.isfinite(gain[0])
    signs = np.sign(np.round(gain[:, both], 9)) * np.sign(paper_gain[both])
    agreement = 100 * (signs == 1).mean(axis=1) if both.any() else np.full(len(gain), np.nan)
    complete = np.isfinite(measured[0]).all(axis=(1, 2))
    means, printed = measured[:, complete].mean(axis=2), paper[complete].mean(axis=1)
    return {
        "decisive": int(decisive.sum()),
        "measured": int(both.sum()),
        **{x: int((signs[0] == n).sum()) for x, n in (("agree", 1), ("against", -1), ("tied", 0))},
        "agreement": Estimate.of(agreement),
        "settings": int(complete.sum()),
        "gain": _correlation(means[..., 1] - means[..., 0], printed[:, 1] - printed[:, 0]),
        "attention": _correlation(means[..., 0], printed[:, 0]),
        "ratplus": _correlation(means[..., 1], printed[:, 1]),
    }


def rank_agreement(paper: pd.DataFrame, draws: Bootstrap) -> pd.DataFrame:
    """Spearman's correlation of the paper's accuracies of attention with measured ones: over
    settings, of the means over tasks; over tasks, of the means over settings, minus dense (the
    paper's models solve every task with dense attention).

    paper: a table of the paper, scaled to the measured context; draws: the measured accuracies,
    grouped by `frame.GROUP`.

    Returns:
        over, tasks (in the paper's order), count (of settings or tasks), rho (an Estimate, its
        interval over samples), for all tasks and for those SOLVED when dense; no rows without
        dense.
    """
    paper = paper[paper["backbone"] == BACKBONES[0]]
    printed = paper.pivot_table("accuracy", [*SETTING, "selector"], "task", sort=False)

    def measured(group: tuple[Any, ...], tasks: Sequence[str]) -> np.ndarray:
        """(tasks, n_boot + 1), percent."""
        return np.array([100 * draws.mean((*group, BACKBONES[0]), [task]) for task in tasks])

    every = paper["task"].unique()
    dense = measured(DENSE, every)
    tasks, dense = every[np.isfinite(dense[:, 0])], dense[np.isfinite(dense[:, 0])]
    of_setting = {setting: measured(setting, tasks) for setting in printed.index}
    of_setting = {s: x for s, x in of_setting.items() if len(x) and np.isfinite(x[:, 0]).all()}
    rows = []
    for kept in (np.full(len(tasks), True), dense[:, 0] >= SOLVED):
        if of_setting and kept.any():
            paper_values = printed.loc[[*of_setting], tasks[kept]].to_numpy()  # (settings, tasks)
            values = np.stack([x[kept] for x in of_setting.values()], axis=-1)
            lost = values - dense[kept][..., None]
            of_settings = _correlation(values.mean(0), paper_values.mean(1))
            of_tasks = _correlation(lost.mean(2).T, paper_values.mean(0))
            rows.append(("settings", tuple(tasks[kept]), len(of_setting), of_settings))
            rows.append(("tasks", tuple(tasks[kept]), kept.sum(), of_tasks))
    return pd.DataFrame(rows, columns=["over", "tasks", "count", "rho"])


def _correlation(measured: np.ndarray, printed: np.ndarray) -> Estimate:
    """Spearman's, of measured (n_boot + 1, S) with printed (S,); NaN below FEWEST."""
    if len(printed) < FEWEST:
        return Estimate(np.nan, np.nan, np.nan)
    return Estimate.of(rank_correlation(measured, printed))
