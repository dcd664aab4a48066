"""What the cells say about P1's two questions and its main table, about a line a method each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from ratplus_exp.results import hits
from ratplus_exp.results.compare import Pattern, gain, paper_setting
from ratplus_exp.results.frame import select
from ratplus_exp.results.labels import METHODS
from ratplus_exp.results.layout import number
from ratplus_exp.results.paper import BACKBONES, paper_tables
from ratplus_exp.results.stats import Estimate

P1_IN_H1 = 1.0
"""P1 prints no hit rates that could be compared; it finds RAT+'s best heads ahead throughout."""


def findings(
    samples: pd.DataFrame, score: str, curves: pd.DataFrame, patterns: Sequence[Pattern]
) -> list[str]:
    """Sentences on Table 3, the sign agreements, H1 and H2; none on what was not measured.

    Args:
        samples: rows of `sample_scores`, one model a backbone; score: its column.
        curves: from `rank_curves`.
        patterns: from `compare.patterns`, of every table that has measured cells.
    """
    found = [*_gains(samples, score, patterns), *_heads(curves), *_random(samples, score)]
    signs = [
        f"Table {p.table[-1]} {p.agree} of {p.measured}"
        for p in patterns
        if p.scope == "all" and p.measured
    ]
    if signs:
        found.append(
            "Of P1's decisive cells, all of which favour RAT+, those where RAT+ is ahead here: "
            f"{', '.join(signs)}. Tables 3 and 4 compare the same measured cells."
        )
    return found


def verdict(estimate: Estimate, paper: float) -> str:
    """Whether a difference has the sign of P1's, once its interval leaves out zero."""
    if np.isnan(estimate.value):
        return "not measured"
    if paper == 0 or estimate.low <= 0 <= estimate.high:
        return "undecided"
    return "as in P1" if np.sign(estimate.value) == np.sign(paper) else "against P1"


def _gains(samples: pd.DataFrame, score: str, patterns: Sequence[Pattern]) -> Iterator[str]:
    """Table 3 by method: P1's main block size, or single tokens, at every budget."""
    paper = _paper("table3")
    for method in METHODS:
        printed = paper[paper["method"] == method]
        printed = printed[printed["block_size"].isin([1, 64])]
        ours = paper_setting(samples[samples["selector"] == "topk"])
        parts, verdicts = [], {}
        for (k, budget), cells in printed.groupby(["top_k", "budget"], sort=False):
            here = select(ours, {"method": method, "budget": budget, "top_k": k})
            difference = gain(here, score, cells["task"])
            if np.isnan(difference.value):
                continue
            theirs = cells["gain"].mean()
            verdicts[budget] = verdict(difference, theirs)
            parts.append(f"{_points(difference)} at {budget} (P1 {number(theirs, sign='+')})")
        if parts:
            found = (p for p in patterns if (p.table, p.scope) == ("table3", method))
            signs = next(found, None)
            text = f"Table 3, {METHODS[method]}: RAT+ minus Attention is {', '.join(parts)} points"
            text += f": {_together(verdicts)}."
            if signs is not None and signs.measured:
                text += f" Of P1's decisive cells {signs.agree} of {signs.measured} have its sign"
                text += f" ({number(signs.agreement.value, 0)} % [{number(signs.agreement.low, 0)}"
                text += f", {number(signs.agreement.high, 0)}])."
            yield text


def _heads(curves: pd.DataFrame) -> Iterator[str]:
    """H1 by method: the best heads of either backbone, at every budget."""
    top = curves[(curves["task"] == hits.MEAN) & (curves["rank"] <= hits.TOP)]
    for method, here in top.groupby("method", sort=False):
        parts, verdicts, ahead, behind = [], {}, 0, 0
        for row in here.to_dict("records"):
            bounds = (row[f"difference{end}"] for end in ("", " low", " high"))
            difference = Estimate(*bounds)
            ahead += difference.low > 0
            behind += difference.high < 0
            if row["rank"] == 1:
                verdicts[row["budget"]] = verdict(difference, P1_IN_H1)
                sides = f"{number(row['RAT+'])} against {number(row['Attention'])} %"
                parts.append(f"{_points(difference)} at {row['budget']} ({sides})")
        ranks = here["rank"].nunique()
        yield (
            f"H1, {METHODS.get(method, method)}, best heads: the hit rate of the very best is with "
            f"the memory, minus without, {', '.join(parts)} points: {_together(verdicts)}. "
            f"Rank by rank over the {ranks} best, RAT+ is ahead beyond the interval in {ahead} of "
            f"{len(here)} comparisons and behind in {behind}."
        )


def _random(samples: pd.DataFrame, score: str) -> Iterator[str]:
    """H2 by method: on P1's Table 2 tasks and on all, with the tasks that say the opposite."""
    paper = _paper("table5")
    hard = list(_paper("table2")["task"].unique())
    ours = paper_setting(samples[samples["selector"] == "random"])
    for method in METHODS:
        for (k, budget), printed in paper[paper["method"] == method].groupby(["top_k", "budget"]):
            here = select(ours, {"method": method, "budget": budget, "top_k": k})
            theirs = printed.set_index("task")["gain"]
            parts = []
            for tasks, name in (
                (hard, f"{hard[0]} to {hard[-1]}, the tasks of P1's Table 2"),
                (list(theirs.index), f"all {len(theirs)} tasks"),
            ):
                x, printed_gain = gain(here, score, tasks), theirs[tasks].mean()
                if not np.isnan(x.value):
                    parts.append(
                        f"{_points(x)} on {name} (P1 {number(printed_gain, sign='+')}: "
                        f"{verdict(x, printed_gain)})"
                    )
            if not parts:
                continue
            single = {task: gain(here, score, [task]) for task in theirs.index}
            opposite = [
                f"{task} {_points(x)}"
                for task, x in single.items()
                if verdict(x, theirs.mean()) == "against P1"
            ]
            text = f"H2, {METHODS[method]} at {budget} choosing at random: RAT+ minus Attention is "
            text += f"{' and '.join(parts)} points."
            text += f" The opposite on its own: {', '.join(opposite)}." if opposite else ""
            yield text


def _paper(table: str) -> pd.DataFrame:
    """P1's gain cell by cell: method, block_size, top_k (as in P1's 4096 tokens' blocks), budget,
    task and gain."""
    printed = paper_setting(paper_tables().query("table == @table"))
    place = ["method", "block_size", "top_k", "budget", "task"]
    wide = printed.set_index([*place, "backbone"])["accuracy"].unstack("backbone", sort=False)
    attention, ratplus = (wide[backbone] for backbone in BACKBONES)
    return (ratplus - attention).rename("gain").reset_index()


def _points(x: Estimate) -> str:
    return f"{number(x.value, sign='+')} [{number(x.low)}, {number(x.high)}]"


def _together(verdicts: dict[str, str]) -> str:
    """The one verdict of all budgets, or each with its budgets."""
    by_verdict: dict[str, list[str]] = {}
    for budget, found in verdicts.items():
        by_verdict.setdefault(found, []).append(budget)
    if len(by_verdict) == 1:
        return next(iter(by_verdict))
    return ", ".join(f"{found} at {' and '.join(at)}" for found, at in by_verdict.items())
