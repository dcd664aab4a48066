"""A table of the paper beside measured cells: cell by cell, by pattern, and by rank."""

from dataclasses import dataclass
from fractions import Fraction

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
RANKS = ("over", "tasks", "count", "value", "low", "high")


@dataclass(frozen=True)
class Pattern:
    """Agreement of measured cells with one of the paper's tables, or with one method in it.

    decisive: number of the paper's cells (setting × task) whose backbones differ by DECISIVE points
        or more; measured: those measured with both backbones; agree, against, tied: those with the
        paper's sign, the other one, or no difference; agreement: 100 · agree / measured.
    settings: number of fully measured settings.
    gain, attention, ratplus: Spearman's correlation of paper and measured over these settings, of
        RAT+ minus Attention, and of each backbone's accuracy (means over tasks).
    """

    table: str
    scope: str
    decisive: int
    measured: int
    agree: int
    against: int
    tied: int
    agreement: Estimate
    settings: int
    gain: Estimate
    attention: Estimate
    ratplus: Estimate


def scaled(paper: pd.DataFrame, context: int) -> pd.DataFrame:
    """Rows of the paper with `block_size` scaled so that a context has as many blocks, 64 of 4096
    tokens as 8 of 512; negative, so that it matches no cell, if that is no whole number.
    `paper_block` is as printed."""
    sizes = []
    for row in paper.itertuples():
        size = Fraction(row.budget) * context / row.top_k if row.block_size > 1 else Fraction(1)
        sizes.append(int(size) if size.denominator == 1 else -row.block_size)
    return paper.assign(block_size=sizes, paper_block=paper["block_size"])


def compare(paper: pd.DataFrame, cells: pd.DataFrame, accuracy: str) -> pd.DataFrame:
    """Each accuracy of a table of the paper beside the measured one.

    paper: of `scaled`; cells: rows of `tidy`, one model a backbone, of one context length;
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


def patterns(paper: pd.DataFrame, draws: Bootstrap) -> list[Pattern]:
    """The pattern of a table of `scaled`, then of each of its methods."""
    wide = paper.pivot_table("accuracy", [*SETTING, "selector"], ["task", "backbone"], sort=False)
    settings = list(wide.index)
    tasks = list(paper["task"].unique())
    printed = np.array([[wide[task][b] for b in BACKBONES] for task in tasks]).transpose(2, 0, 1)
    measured = np.empty((draws.n_boot + 1, *printed.shape))
    for place in np.ndindex(printed.shape):
        setting, task, backbone = settings[place[0]], tasks[place[1]], BACKBONES[place[2]]
        both = [(*setting, b) for b in BACKBONES]
        measured[:, *place] = 100 * draws.mean((*setting, backbone), [task], both)
    methods = [method for method, *_ in settings]
    scopes = {"all": np.full(len(methods), True)}
    scopes |= {m: np.array(methods) == m for m in dict.fromkeys(methods)}
    name = paper["table"].iloc[0]
    return [_pattern(name, s, printed[rows], measured[:, rows]) for s, rows in scopes.items()]


def _pattern(table: str, scope: str, paper: np.ndarray, measured: np.ndarray) -> Pattern:
    """paper: (settings, tasks, backbones); measured: (n_boot + 1, settings, tasks, backbones)."""
    paper_gain, gain = (x[..., 1] - x[..., 0] for x in (paper, measured))
    decisive = np.abs(paper_gain) >= DECISIVE - 1e-9
    both = decisive & np.isfinite(gain[0])
    signs = np.sign(np.round(gain[:, both], 9)) * np.sign(paper_gain[both])
    agreement = 100 * (signs == 1).mean(axis=1) if both.any() else np.full(len(gain), np.nan)
    agree, against, tied = (int((signs[0] == sign).sum()) for sign in (1, -1, 0))
    counts = (int(decisive.sum()), int(both.sum()), agree, against, tied)
    complete = np.isfinite(measured[0]).all(axis=(1, 2))
    means, printed = measured[:, complete].mean(axis=2), paper[complete].mean(axis=1)
    gains = _correlation(means[..., 1] - means[..., 0], printed[:, 1] - printed[:, 0])
    sides = (_correlation(means[..., side], printed[:, side]) for side in (0, 1))
    settings = int(complete.sum())
    return Pattern(table, scope, *counts, Estimate.of(agreement), settings, gains, *sides)


def rank_agreement(paper: pd.DataFrame, draws: Bootstrap) -> pd.DataFrame:
    """Spearman's correlation of the paper's accuracies of attention with measured ones: over
    settings, of the means over tasks; over tasks, of the means over settings, minus dense (the
    paper's models solve every task with dense attention).

    paper: a table of the paper, scaled to the measured context; draws: the measured accuracies,
    grouped by `frame.GROUP`.

    Returns:
        `RANKS`: over, tasks (in the paper's order), count (of settings or tasks), value, low,
        high (over samples), for all tasks and for those SOLVED when dense; no rows without dense.
    """
    backbone = BACKBONES[0]
    paper = paper[paper["backbone"] == backbone]
    selector = paper["selector"].iloc[0]
    printed = paper.set_index([*SETTING, "task"])["accuracy"]

    def measured(task: str, *group: object) -> np.ndarray:
        return 100 * draws.mean((*group, backbone), [task])

    dense = {t: measured(t, *DENSE) for t in paper["task"].unique()}
    dense = {t: x for t, x in dense.items() if np.isfinite(x[0])}
    settings = dict.fromkeys(x[:-1] for x in printed.index)
    by_setting = {s: np.array([measured(t, *s, selector) for t in dense]) for s in settings}
    by_setting = {s: x for s, x in by_setting.items() if len(x) and np.isfinite(x[:, 0]).all()}
    if not by_setting:
        return pd.DataFrame(columns=RANKS)
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
            rows.append({"over": over, "tasks": tasks, "count": len(b), **vars(_correlation(a, b))})
    return pd.DataFrame(rows, columns=RANKS)


def _correlation(measured: np.ndarray, printed: np.ndarray) -> Estimate:
    """Spearman's, of measured (n_boot + 1, S) with printed (S,); NaN below FEWEST."""
    if len(printed) < FEWEST:
        return Estimate(np.nan, np.nan, np.nan)
    return Estimate.of(rank_correlation(measured, printed))
