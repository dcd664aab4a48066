"""Every accuracy of P1's tables beside the measured one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from ratplus_exp.results.compare import PAPER_SETTING, paper_setting
from ratplus_exp.results.labels import first_token_note, measured_at, scale_note
from ratplus_exp.results.layout import MISSING, Table, number
from ratplus_exp.results.paper import paper_tables
from ratplus_exp.results.stats import mean_std


def against_paper(
    paper_table: str, cells: pd.DataFrame, accuracy: str = "accuracy"
) -> pd.DataFrame:
    """One row for each accuracy of a table of P1, beside what was measured.

    Args:
        cells: rows of `tidy`, one model a backbone, one context length.
        accuracy: column of `cells` to compare.

    Returns:
        method, block_size and k (P1's), budget, selector, backbone, task, P1, P1 std, measured,
        measured std (over seeds and selector seeds), difference (measured minus P1, points), n (a
        seed), seeds, budget_measured. What is missing is NaN.
    """
    printed = paper_setting(paper_tables().query("table == @paper_table")).reset_index(drop=True)
    ours = paper_setting(cells[cells["selector"].isin(printed["selector"])])
    place = [*PAPER_SETTING, "backbone", "task"]
    rows = []
    groups = dict(iter(ours.groupby(place)))
    for paper in printed.itertuples():
        found = groups.get((paper.method, paper.budget, paper.top_k, paper.backbone, paper.task))
        row: dict[str, Any] = {"measured": np.nan, "measured std": np.nan, "seeds": 0}
        if found is not None:
            mean, std = mean_std(found[accuracy])
            row = {"measured": mean, "measured std": std, "seeds": len(found)}
            row |= {"n": found["n"].min(), "budget_measured": found["budget_measured"].mean()}
        rows.append(row)
    measured = pd.DataFrame(rows, columns=_MEASURED)
    original = paper_tables().query("table == @paper_table").reset_index(drop=True)
    return original[
        ["method", "block_size", "top_k", "budget", "selector", "backbone", "task"]
    ].assign(
        **{
            "P1": original["accuracy"],
            "P1 std": original["std"],
            "measured": measured["measured"],
            "measured std": measured["measured std"],
            "difference": measured["measured"] - original["accuracy"],
            "n": measured["n"].astype("Int64"),
            "seeds": measured["seeds"].astype("Int64"),
            "budget_measured": measured["budget_measured"],
        }
    )


def against_paper_table(
    frame: pd.DataFrame, paper_table: str, tier: str, first_token: str = "prefill"
) -> Table:
    """`against_paper` as a table to read."""
    numbers = {"P1": 1, "P1 std": 2, "measured": 1, "measured std": 2, "difference": 1}
    rows = []
    for row in frame.to_dict("records"):
        cells = [str(row[c]) for c in ("method", "block_size", "top_k", "budget", "selector")]
        cells += [row["backbone"], row["task"]]
        cells += [number(row[name], digits) for name, digits in numbers.items()]
        cells += [MISSING if pd.isna(row["n"]) else str(row["n"]), str(row["seeds"])]
        rows.append((*cells, number(row["budget_measured"], 3)))
    columns = (
        "Method",
        "P1 block",
        "P1 k",
        "Budget",
        "Selector",
        "Backbone",
        "Task",
        "P1",
        "P1 std",
    )
    return Table(
        title=f"P1's Table {paper_table[-1]}, cell by cell, at {measured_at(tier, first_token)}",
        caption=(
            f"P1: accuracy in % as printed (4096 tokens, n = 500). Measured: at tier {tier}, block "
            "sizes scaled so that a context has as many blocks; std over seeds of samples or of "
            f"random selection. Difference: measured minus P1, in points{scale_note(tier)}. Kept: "
            "fraction of the KV entries that was attended or stored. "
            f"{first_token_note(first_token)} {MISSING}: not measured, or not in P1."
        ),
        columns=(*columns, "measured", "std", "difference", "n", "seeds", "Kept"),
        rows=tuple(rows),
    )


_MEASURED = ["measured", "measured std", "n", "seeds", "budget_measured"]
