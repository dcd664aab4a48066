"""A paper's table beside measured cells: cell by cell, and by pattern where levels can't agree."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pandas as pd

from ratplus_exp.analysis.bootstrap import Bootstrap, Estimate, rank_correlation, spread
from ratplus_exp.analysis.frame import BACKBONES, GROUP, SETTING

DECISIVE = 5.0
"""Points between the paper's backbones from which a cell counts as decisive."""
FEWEST = 5
"""Settings from which a rank correlation is given: over three or four it takes few values, so that
an interval of no width would look like certainty."""


@dataclass(frozen=True)
class Pattern:
    """How far measured cells have the pattern of one of the paper's tables, or of one method in it.

    decisive: the paper's cells (setting × task) whose backbones are DECISIVE points apart or more.
    measured: how many of them were measured with both backbones; agree, against, tied: how many of
        those have the paper's sign, the other one, or no difference.
    agreement: 100 · agree / measured.
    settings: how many settings are measured in full, which the correlations are over.
    gain, attention, ratplus: Spearman's correlation over settings, paper with measured, of RAT+
        minus Attention, and of each backbone's accuracy (means over tasks).
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
    """Rows of the paper with `block_size` scaled so that a context has as many blocks: the paper's
    64 of 4096 tokens is 8 of 512. It is negative where that is no whole number, so that nothing
    measured has it. `paper_block` is as printed."""
    sizes = []
    for row in paper.itertuples():
        size = Fraction(row.budget) * context / row.top_k if row.block_size > 1 else Fraction(1)
        sizes.append(int(size) if size.denominator == 1 else -row.block_size)
    return paper.assign(block_size=sizes, paper_block=paper["block_size"])


def compare(paper: pd.DataFrame, cells: pd.DataFrame, accuracy: str) -> pd.DataFrame:
    """Each accuracy of a table of the paper beside the measured one.

    Args:
        paper: of `scaled`; cells: rows of `tidy`, one model a backbone, of one context length;
            accuracy: their column to compare.

    Returns:
        The rows of `paper`, with measured and measured_std (see `spread`), difference (measured
        minus paper, points), n (a seed), trainings, seeds (a training) and budget_measured; NaN
        where nothing was measured.
    """
    groups = dict(iter(cells.groupby([*GROUP, "task"])))
    rows = []
    for place in paper[[*GROUP, "task"]].itertuples(index=False, name=None):
        if (here := groups.get(place)) is None:
            rows.append((np.nan, np.nan, 0, 0, None, np.nan))
        else:
            rows.append((*spread(here, accuracy), here["n"].min(), here["budget_measured"].mean()))
    names = ["measured", "measured_std", "trainings", "seeds", "n", "budget_measured"]
    measured = pd.DataFrame(rows, columns=names).astype({"n": "Int64"})
    frame = pd.concat([paper.reset_index(drop=True), measured], axis=1)
    return frame.assign(difference=frame["measured"] - frame["accuracy"])


def patterns(paper: pd.DataFrame, draws: Bootstrap) -> list[Pattern]:
    """The pattern over a whole table of `scaled`, then over each of its methods."""
    wide = paper.pivot_table("accuracy", [*SETTING, "selector"], ["task", "backbone"], sort=False)
    settings = list(wide.index)
    tasks = list(paper["task"].unique())
    theirs = np.array([[wide[task][b] for b in BACKBONES] for task in tasks]).transpose(2, 0, 1)
    measured = np.empty((draws.n_boot + 1, *theirs.shape))
    for place in np.ndindex(theirs.shape):
        setting, task, backbone = settings[place[0]], tasks[place[1]], BACKBONES[place[2]]
        both = [(*setting, b) for b in BACKBONES]
        measured[:, *place] = 100 * draws.mean((*setting, backbone), [task], both)
    methods = [method for method, *_ in settings]
    scopes = {"all": np.full(len(methods), True)}
    scopes |= {m: np.array(methods) == m for m in dict.fromkeys(methods)}
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
    agree, against, tied = (int((signs[0] == sign).sum()) for sign in (1, -1, 0))
    attention, ratplus = (correlation(means[..., side], printed[:, side]) for side in (0, 1))
    return Pattern(
        table,
        scope,
        int(decisive.sum()),
        int(known.sum()),
        agree,
        against,
        tied,
        Estimate.of(agreement),
        int(whole.sum()),
        correlation(means[..., 1] - means[..., 0], printed[:, 1] - printed[:, 0]),
        attention,
        ratplus,
    )


def correlation(ours: np.ndarray, theirs: np.ndarray) -> Estimate:
    """Spearman's, of ours (n_boot + 1, S) with theirs (S,); NaN below FEWEST."""
    if len(theirs) < FEWEST:
        return Estimate(np.nan, np.nan, np.nan)
    return Estimate.of(rank_correlation(ours, theirs))
