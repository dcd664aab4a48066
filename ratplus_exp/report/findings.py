"""What the cells say about the paper's two questions and its main table, a line a method each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ratplus_exp.analysis.bootstrap import Estimate, difference
from ratplus_exp.analysis.frame import BACKBONES, select, setting_of_paper
from ratplus_exp.analysis.hits import MEAN, TOP
from ratplus_exp.analysis.pattern import Pattern
from ratplus_exp.report.paper import paper_tables
from ratplus_exp.report.prose import METHODS, say

PAPER_IN_H1 = 1.0
"""The paper prints no hit rates that could be compared; it finds RAT+'s best heads ahead."""


def findings(
    samples: pd.DataFrame, score: str, curves: pd.DataFrame, patterns: Sequence[Pattern]
) -> list[str]:
    """Sentences on Table 3, the sign agreements, H1 and H2; none on what was not measured.

    Args:
        samples: rows of `sample_scores`, one model a backbone; score: its column.
        curves: from `rank_curves`.
        patterns: from `analysis.pattern`, of every table that has measured cells.
    """
    found = [say("gain", x=x) for x in _gains(samples, score, patterns)]
    found += [say("best_heads", x=x) for x in _heads(curves)]
    found += [say("random", x=x) for x in _random(samples, score)]
    signs = [p for p in patterns if p.scope == "all" and p.measured]
    return found + ([say("signs", patterns=signs)] if signs else [])


def verdict(estimate: Estimate, paper: float) -> str:
    """Whether a difference has the sign of the paper's, once its interval leaves out zero."""
    if np.isnan(estimate.value):
        return "not measured"
    if paper == 0 or estimate.low <= 0 <= estimate.high:
        return "undecided"
    same = np.sign(estimate.value) == np.sign(paper)
    return "as in the paper" if same else "against the paper"


def _gains(
    samples: pd.DataFrame, score: str, patterns: Sequence[Pattern]
) -> Iterator[dict[str, Any]]:
    """Table 3 by method: the paper's main block size, or single tokens, at every budget."""
    paper = _paper("table3")
    paper = paper[paper["block_size"].isin([1, 64])]
    ours = setting_of_paper(samples[samples["selector"] == "topk"])
    for method in METHODS:
        parts, verdicts = [], {}
        printed = paper[paper["method"] == method]
        for (k, budget), cells in printed.groupby(["top_k", "budget"], sort=False):
            here = select(ours, {"method": method, "budget": budget, "top_k": k})
            gain = _gain(here, score, cells["task"])
            if np.isnan(gain.value):
                continue
            verdicts[budget] = verdict(gain, cells["gain"].mean())
            parts.append({"gain": gain, "budget": budget, "paper": cells["gain"].mean()})
        if parts:
            signs = (p for p in patterns if (p.table, p.scope) == ("table3", method))
            yield {
                "method": method,
                "parts": parts,
                "verdicts": verdicts,
                "signs": next(signs, None),
            }


def _heads(curves: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """H1 by method: the best heads of either backbone, at every budget."""
    top = curves[(curves["task"] == MEAN) & (curves["rank"] <= TOP)]
    for method, here in top.groupby("method", sort=False):
        best = [
            {
                "gain": Estimate(*(row[f"difference{end}"] for end in ("", " low", " high"))),
                "budget": row["budget"],
                "attention": row["Attention"],
                "ratplus": row["RAT+"],
            }
            for row in here[here["rank"] == 1].to_dict("records")
        ]
        yield {
            "method": method,
            "parts": best,
            "verdicts": {part["budget"]: verdict(part["gain"], PAPER_IN_H1) for part in best},
            "ranks": here["rank"].nunique(),
            "ahead": int((here["difference low"] > 0).sum()),
            "behind": int((here["difference high"] < 0).sum()),
            "compared": len(here),
        }


def _random(samples: pd.DataFrame, score: str) -> Iterator[dict[str, Any]]:
    """H2 by method: on the tasks of the paper's Table 2 and on all, with the tasks that say the
    opposite."""
    paper = _paper("table5")
    hard = list(_paper("table2")["task"].unique())
    ours = setting_of_paper(samples[samples["selector"] == "random"])
    for method in METHODS:
        for (k, budget), printed in paper[paper["method"] == method].groupby(["top_k", "budget"]):
            here = select(ours, {"method": method, "budget": budget, "top_k": k})
            theirs = printed.set_index("task")["gain"]
            parts = []
            for tasks in (hard, list(theirs.index)):
                gain, mean = _gain(here, score, tasks), theirs[tasks].mean()
                if not np.isnan(gain.value):
                    part = {"gain": gain, "tasks": tasks, "all": tasks != hard, "paper": mean}
                    parts.append(part | {"verdict": verdict(gain, mean)})
            if parts:
                single = {task: _gain(here, score, [task]) for task in theirs.index}
                opposite = {
                    task: gain
                    for task, gain in single.items()
                    if verdict(gain, theirs.mean()) == "against the paper"
                }
                yield {"method": method, "budget": budget, "parts": parts, "opposite": opposite}


def _gain(samples: pd.DataFrame, score: str, tasks: Sequence[str]) -> Estimate:
    return difference(samples, score, "backbone", ("RAT+", "Attention"), tasks)


def _paper(table: str) -> pd.DataFrame:
    """The paper's gain cell by cell: method, block_size, top_k, budget, task and gain."""
    printed = setting_of_paper(paper_tables(table))
    place = ["method", "block_size", "top_k", "budget", "task"]
    wide = printed.set_index([*place, "backbone"])["accuracy"].unstack("backbone", sort=False)
    attention, ratplus = (wide[backbone] for backbone in BACKBONES)
    return (ratplus - attention).rename("gain").reset_index()
