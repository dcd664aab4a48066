"""Rank correlation of one backbone's settings and tasks with a table of the paper."""

import numpy as np
import pandas as pd

from ratplus_exp.analysis.bootstrap import Bootstrap
from ratplus_exp.analysis.frame import BACKBONES, SETTING
from ratplus_exp.analysis.pattern import correlation

SOLVED = 50.0
"""Dense accuracy in percent, below which a task has little accuracy to lose."""
COLUMNS = ("over", "tasks", "count", "value", "low", "high")


def rank_agreement(paper: pd.DataFrame, draws: Bootstrap) -> pd.DataFrame:
    """Spearman's correlation of the paper's accuracies of attention with measured ones: over
    settings, of the means over tasks; over tasks, of the means over settings, minus dense (the
    paper's models solve every task with dense attention).

    paper: a table of the paper, scaled to the measured context; draws: the measured accuracies,
    grouped by `frame.GROUP`.

    Returns:
        `COLUMNS`: over, tasks (in the paper's order), count (of settings or tasks), value, low,
        high (over samples), for all tasks and for those SOLVED when dense; no rows without dense.
    """
    backbone = BACKBONES[0]
    paper = paper[paper["backbone"] == backbone]
    selector = paper["selector"].iloc[0]
    printed = paper.set_index([*SETTING, "task"])["accuracy"]

    def measured(task: str, *group: object) -> np.ndarray:
        return 100 * draws.mean((*group, backbone), [task])

    dense = {t: measured(t, "dense", 1, "1", "dense") for t in paper["task"].unique()}
    dense = {t: x for t, x in dense.items() if np.isfinite(x[0])}
    settings = dict.fromkeys(x[:-1] for x in printed.index)
    by_setting = {s: np.array([measured(t, *s, selector) for t in dense]) for s in settings}
    by_setting = {s: x for s, x in by_setting.items() if len(x) and np.isfinite(x[:, 0]).all()}
    if not by_setting:
        return pd.DataFrame(columns=COLUMNS)
    values = np.stack(list(by_setting.values()), axis=-1)  # (tasks, draws, settings)
    paper_values = np.array([[printed[(*s, t)] for s in by_setting] for t in dense])
    lost = values - np.stack(list(dense.values()))[..., None]
    rows = []
    for kept in (np.full(len(dense), True), np.array([x[0] >= SOLVED for x in dense.values()])):
        if not kept.any():
            break
        tasks = tuple(t for t, on in zip(dense, kept, strict=True) if on)
        for over, a, b in (
            ("settings", values[kept].mean(0), paper_values[kept].mean(0)),
            ("tasks", lost[kept].mean(2).T, paper_values[kept].mean(1)),
        ):
            rows.append({"over": over, "tasks": tasks, "count": len(b), **vars(correlation(a, b))})
    return pd.DataFrame(rows, columns=COLUMNS)
