"""A paper's table against measured cells: cell by cell, and by pattern where levels can't agree.

A setting of the paper is recognised among the measured ones by its method, budget and, for blocks,
their number k, which together say how many blocks a context has: the paper's block size 64 in 4096
tokens is 8 in 512.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ratplus_exp.analysis.bootstrap import RESAMPLES, Estimate, rank_correlation, resample
from ratplus_exp.analysis.frame import BACKBONES, setting_of_paper
from ratplus_exp.analysis.spread import spread

DECISIVE = 5.0
"""Points between the paper's backbones from which a cell counts as decisive."""
FEWEST = 5
"""Settings from which a rank correlation is given: over three or four it takes few values, so that
an interval of no width would look like certainty."""

PAPER_SETTING = ["method", "budget", "top_k"]
"""Columns by which the paper's settings are recognised."""


@dataclass(frozen=True)
class Pattern:
    """How far measured cells have the pattern of one of the paper's tables.

    decisive: the paper's cells (setting × task) whose backbones are DECISIVE points apart or more.
    measured: how many of them were measured with both backbones, and agree, against, tied: how many
        of those have the paper's sign, the other one, or no difference.
    agreement: 100 · agree / measured.
    gain, attention, ratplus: Spearman's correlation over settings, paper with measured, of RAT+
        minus Attention, and of either backbone's accuracy (means over tasks).
    settings: how many settings are measured in full, which the correlations are over.
    """

    table: str
    scope: str
    decisive: int
    measured: int
    agree: int
    against: int
    tied: int
    settings: int
    agreement: Estimate
    gain: Estimate
    attention: Estimate
    ratplus: Estimate


def patterns(
    paper: pd.DataFrame, samples: pd.DataFrame, score: str, n_boot: int = RESAMPLES
) -> list[Pattern]:
    """The pattern over the whole table, then over each of its methods.

    Args:
        paper: one table of the paper, rows of `paper_tables`.
        samples: rows of `sample_scores`, one model a backbone, one context length.
        score: column of `samples` to compare.
    """
    ours = setting_of_paper(samples[samples["selector"].isin(paper["selector"])])
    found = resample(ours, score, [*PAPER_SETTING, "backbone"], n_boot=n_boot)
    printed = setting_of_paper(paper)
    tasks = list(printed["task"].unique())
    settings = list(printed[PAPER_SETTING].drop_duplicates().itertuples(index=False, name=None))
    wide = printed.set_index([*PAPER_SETTING, "backbone", "task"])["accuracy"]
    theirs = np.array(
        [[[wide[(*s, b, task)] for b in BACKBONES] for task in tasks] for s in settings]
    )
    measured = np.array(
        [[[found.mean((*s, b), [task]) for b in BACKBONES] for task in tasks] for s in settings]
    )
    measured = 100 * np.moveaxis(measured, -1, 0)  # (n_boot + 1, settings, tasks, backbones)
    methods = [method for method, *_ in settings]
    scopes = {"all": np.full(len(settings), True)}
    scopes |= {m: np.array([m == method for method in methods]) for m in dict.fromkeys(methods)}
    name = paper["table"].iloc[0]
    return [_pattern(name, s, theirs[here], measured[:, here]) for s, here in scopes.items()]


def _pattern(table: str, scope: str, paper: np.ndarray, measured: np.ndarray) -> Pattern:
    """paper: (settings, tasks, backbones); measured: the same behind n_boot + 1."""
    theirs, ours = (x[..., 1] - x[..., 0] for x in (paper, measured))
    decisive = np.abs(theirs) >= DECISIVE - 1e-9
    known = decisive & np.isfinite(ours[0])
    signs = np.sign(np.round(ours[:, known], 9)) * np.sign(theirs[known])
    agreement = 100 * (signs == 1).mean(axis=1) if known.any() else np.full(len(ours), np.nan)
    whole = np.isfinite(measured[0]).all(axis=(1, 2))
    means, printed = measured[:, whole].mean(axis=2), paper[whole].mean(axis=1)
    return Pattern(
        table=table,
        scope=scope,
        decisive=int(decisive.sum()),
        measured=int(known.sum()),
        agree=int((signs[0] == 1).sum()),
        against=int((signs[0] == -1).sum()),
        tied=int((signs[0] == 0).sum()),
        settings=int(whole.sum()),
        agreement=Estimate.of(agreement),
        gain=correlation(means[..., 1] - means[..., 0], printed[:, 1] - printed[:, 0]),
        attention=correlation(means[..., 0], printed[:, 0]),
        ratplus=correlation(means[..., 1], printed[:, 1]),
    )


def correlation(ours: np.ndarray, theirs: np.ndarray) -> Estimate:
    """Spearman's, of ours (n_boot + 1, S) with theirs (S,); NaN below FEWEST."""
    if len(theirs) < FEWEST:
        return Estimate(np.nan, np.nan, np.nan)
    return Estimate.of(rank_correlation(ours, theirs))


def cell_by_cell(paper: pd.DataFrame, cells: pd.DataFrame, accuracy: str) -> pd.DataFrame:
    """One row for each accuracy of a table of the paper, beside what was measured.

    Args:
        paper: one table, rows of `paper_tables`; cells: rows of `tidy`, one model a backbone, one
            context length; accuracy: their column to compare.

    Returns:
        method, block_size and top_k (the paper's), budget, selector, backbone, task, paper, paper
        std, measured, measured std (see `spread`), difference (measured minus paper, points), n (a
        seed), trainings, seeds (a training), budget_measured. What is missing is NaN.
    """
    ours = setting_of_paper(cells[cells["selector"].isin(paper["selector"])])
    groups = dict(iter(ours.groupby([*PAPER_SETTING, "backbone", "task"])))
    rows: list[dict[str, Any]] = []
    for cell in setting_of_paper(paper).itertuples():
        here = groups.get((cell.method, cell.budget, cell.top_k, cell.backbone, cell.task))
        if here is None:
            rows.append({"trainings": 0, "seeds": 0})
            continue
        mean, std, trainings, seeds = spread(here, accuracy)
        row = {"measured": mean, "measured std": std, "trainings": trainings, "seeds": seeds}
        rows.append(row | {"n": here["n"].min(), "budget_measured": here["budget_measured"].mean()})
    measured = pd.DataFrame(rows, columns=_MEASURED)
    printed = paper.reset_index(drop=True)
    columns = ["method", "block_size", "top_k", "budget", "selector", "backbone", "task"]
    frame = printed[columns].assign(paper=printed["accuracy"])
    frame["paper std"] = printed["std"]
    frame = pd.concat([frame, measured], axis=1)
    frame["difference"] = frame["measured"] - frame["paper"]
    return frame.astype({"n": "Int64", "trainings": "Int64", "seeds": "Int64"})


_MEASURED = ["measured", "measured std", "n", "trainings", "seeds", "budget_measured"]
