"""P1's tables against measured cells: cell by cell, and by pattern where levels can't agree.

A setting of P1 is recognised among the measured ones by its method, budget and, for blocks, their
number k, which together say how many blocks a context has: P1's block size 64 in 4096 tokens is 8
in 512.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ratplus_exp.results.labels import first_token_note, measured_at, scale_note
from ratplus_exp.results.layout import MISSING, Table, number
from ratplus_exp.results.paper import BACKBONES, paper_tables
from ratplus_exp.results.stats import (
    RESAMPLES,
    Estimate,
    paired_bootstrap,
    rank_correlation,
    resamplings,
)

DECISIVE = 5.0
"""Points between P1's backbones from which a cell counts as decisive."""
FEWEST = 5
"""Settings from which a rank correlation is given: over three or four it takes few values, so that
an interval of no width would look like certainty."""

PAPER_SETTING = ["method", "budget", "top_k"]
"""Columns by which P1's settings are recognised."""


@dataclass(frozen=True)
class Pattern:
    """How far measured cells have the pattern of one of P1's tables.

    decisive: P1's cells (setting × task) whose backbones are DECISIVE points apart or more.
    measured: how many of them were measured with both backbones, and agree, against, tied: how many
        of those have P1's sign, the other one, or no difference.
    agreement: 100 · agree / measured.
    gain, attention, ratplus: Spearman's correlation over settings, P1 with measured, of RAT+ minus
        Attention, and of either backbone's accuracy (means over tasks).
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
    paper_table: str, samples: pd.DataFrame, score: str, n_boot: int = RESAMPLES, seed: int = 0
) -> list[Pattern]:
    """The pattern over the whole table, then over each of its methods.

    Samples are resampled by id within their task, alike for every setting and backbone.

    Args:
        samples: rows of `sample_scores`, one model a backbone, one context length; scores of
            several seeds of a selector are averaged.
        score: column of `samples` to compare.
    """
    paper, measured = _accuracies(paper_table, samples, score, n_boot, seed)
    methods = paper["method"].to_numpy()
    scopes = {"all": np.full(len(paper), True)} | {m: methods == m for m in dict.fromkeys(methods)}
    return [
        _pattern(paper_table, scope, paper[chosen], measured[:, chosen])
        for scope, chosen in scopes.items()
    ]


def _pattern(table: str, scope: str, paper: pd.DataFrame, measured: np.ndarray) -> Pattern:
    """paper: one row a setting; measured: (n_boot + 1, settings, tasks, backbones)."""
    printed = np.stack([np.stack(list(paper[b])) for b in BACKBONES], axis=-1)  # (S, tasks, 2)
    difference = printed[..., 1] - printed[..., 0]
    decisive = np.abs(difference) >= DECISIVE - 1e-9
    here = measured[..., 1] - measured[..., 0]
    known = decisive & np.isfinite(here[0])
    signs = np.sign(np.round(here[:, known], 9)) * np.sign(difference[known])
    agreement = 100 * (signs == 1).mean(axis=1) if known.any() else np.full(len(measured), np.nan)
    whole = np.isfinite(measured[0]).all(axis=(1, 2))
    ours, theirs = measured[:, whole].mean(axis=2), printed[whole].mean(axis=1)
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
        gain=_correlation(ours[..., 1] - ours[..., 0], theirs[:, 1] - theirs[:, 0]),
        attention=_correlation(ours[..., 0], theirs[:, 0]),
        ratplus=_correlation(ours[..., 1], theirs[:, 1]),
    )


def _correlation(ours: np.ndarray, theirs: np.ndarray) -> Estimate:
    if len(theirs) < FEWEST:
        return Estimate(np.nan, np.nan, np.nan)
    return Estimate.of(rank_correlation(ours, theirs))


def gain(samples: pd.DataFrame, score: str, tasks: Iterable[str]) -> Estimate:
    """RAT+ minus Attention in points: mean over `tasks`, with an interval over paired samples.

    Args:
        samples: rows of `sample_scores` of one setting; several of a sample are averaged.

    Returns:
        NaN where a backbone lacks one of the tasks, or the two share no sample of it.
    """
    wide = samples[samples["task"].isin(wanted := set(tasks))].pivot_table(
        index=["task", "id"], columns="backbone", values=score, aggfunc="mean"
    )
    wide = wide.reindex(columns=list(BACKBONES)).dropna()
    if set(wide.index.get_level_values("task")) != wanted:
        return Estimate(np.nan, np.nan, np.nan)
    found = paired_bootstrap(wide["RAT+"].astype(float), wide["Attention"].astype(float))
    return Estimate(*(100 * x for x in found))


def _accuracies(
    paper_table: str, samples: pd.DataFrame, score: str, n_boot: int, seed: int
) -> tuple[pd.DataFrame, np.ndarray]:
    """P1's settings, with columns method, Attention and RAT+ (each an array over tasks), and the
    measured percent (n_boot + 1, settings, tasks, backbones), NaN where nothing was measured."""
    printed = paper_setting(paper_tables().query("table == @paper_table"))
    tasks = list(printed["task"].unique())
    settings = printed[PAPER_SETTING].drop_duplicates()
    wide = printed.set_index([*PAPER_SETTING, "backbone", "task"])["accuracy"]
    paper = settings.copy()
    for backbone in BACKBONES:
        paper[backbone] = [
            np.array([wide[(*setting, backbone, task)] for task in tasks])
            for setting in settings.itertuples(index=False)
        ]
    ours = paper_setting(samples[samples["selector"].isin(printed["selector"])])
    generator = np.random.default_rng(seed)
    measured = np.full((n_boot + 1, len(settings), len(tasks), len(BACKBONES)), np.nan)
    for t, task in enumerate(tasks):
        scores = ours[ours["task"] == task].pivot_table(
            index="id", columns=[*PAPER_SETTING, "backbone"], values=score, aggfunc="mean"
        )
        if scores.empty:
            continue
        weights = resamplings(len(scores), n_boot, generator)
        present = scores.notna().to_numpy()
        with np.errstate(invalid="ignore"):
            means = 100 * (weights @ scores.fillna(0).to_numpy()) / (weights @ present)
        for s, setting in enumerate(settings.itertuples(index=False)):
            for b, backbone in enumerate(BACKBONES):
                if (column := (*setting, backbone)) in scores:
                    measured[:, s, t, b] = means[:, scores.columns.get_loc(column)]
    return paper, measured


def paper_setting(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with `top_k` 0 where tokens are selected: what P1's and our settings share."""
    blocks = frame["block_size"].fillna(1).gt(1).astype(bool)
    return frame.assign(top_k=frame["top_k"].where(blocks, 0).astype(int))


def pattern_table(found: list[Pattern], tier: str, first_token: str = "prefill") -> Table:
    """All patterns as one table."""

    def estimate(x: Estimate, digits: int) -> str:
        if np.isnan(x.value):
            return MISSING
        return f"{number(x.value, digits)} [{number(x.low, digits)}, {number(x.high, digits)}]"

    rows = [
        (
            f"Table {p.table[-1]}",
            p.scope,
            *map(str, (p.decisive, p.measured, p.agree, p.against, p.tied)),
            estimate(p.agreement, 0),
            str(p.settings),
            *(estimate(x, 2) for x in (p.gain, p.attention, p.ratplus)),
        )
        for p in found
    ]
    return Table(
        title=f"Paper against measured, by pattern, at {measured_at(tier, first_token)}",
        caption=(
            f"Decisive: cells of P1 (setting × task) whose backbones are {DECISIVE:g} points or "
            "more apart. Measured: those with both backbones measured; agree, against, tied: their "
            "sign here. Agreement: agree over measured in %; since all of P1's decisive cells "
            "favour RAT+, this is the share of them in which RAT+ is ahead at all. "
            "ρ: Spearman's rank correlation over fully measured settings, P1 with measured, of "
            "the gain (RAT+ minus Attention) and of either backbone's mean accuracy, from "
            f"{FEWEST} settings on. In brackets: 95 % bootstrap intervals over samples, drawn "
            f"alike for all settings and backbones{scale_note(tier)}. "
            f"{first_token_note(first_token)}"
        ),
        columns=(
            *("Of P1", "Methods", "Decisive", "Measured", "agree", "against", "tied"),
            *("Agreement, %", "Settings", "ρ of gain", "ρ of Attention", "ρ of RAT+"),
        ),
        rows=tuple(rows),
        breaks=frozenset(i for i, p in enumerate(found) if i and p.scope == "all"),
    )
