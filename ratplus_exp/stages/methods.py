"""stage=methods: every method on both backbones at the same budgets; a sweep with its own table and
figure.

The table is sorted by accuracy within each budget, with the measured fractions that attention and
selection read, and random selection of equal size (H2). The cells are those of stage=eval.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from omegaconf import DictConfig

from ratplus_exp.analysis import BACKBONES, SCORERS, Bootstrap, sample_scores, tidy
from ratplus_exp.config import method_of
from ratplus_exp.report import Table
from ratplus_exp.report.figures import accuracy_by_read, by_size
from ratplus_exp.report.prose import interval, number
from ratplus_exp.stages.common import job_folder
from ratplus_exp.stages.sweep import configuration, fill_cells, show_tracked
from ratplus_exp.store import Cell

SETTING = ["method", "budget"]


def run(cfg: DictConfig) -> None:
    """Fill the missing cells, and print and write table and figure."""
    frame = means(fill_cells(cfg))
    phases: dict[str, str | None] = {
        name: method_of(configuration(cfg, {"method": name})).phase for name in set(frame["method"])
    }
    show_tracked(cfg, table(frame), accuracy_by_read(frame, phases, job_folder()))


def means(cells: list[Cell]) -> pd.DataFrame:
    """A row for each method and budget: accuracies of each backbone in percent, their difference
    with its interval, accuracies under random selection, and the measured fractions."""
    samples, by_cell = sample_scores(cells), tidy(cells)
    choosing = {cell.id: cell.metrics().get("choosing_measured", 0.0) for cell in cells}
    by_cell = by_cell.assign(choosing=by_cell["cell"].map(choosing))
    groups = [*SETTING, "selector", "backbone"]
    bootstrap = Bootstrap(samples, SCORERS[0], groups)
    rows: list[dict[str, Any]] = []
    by_cell = by_cell[by_cell["selector"] == "topk"]
    for (method, budget), setting in by_cell.groupby(SETTING, sort=False):
        sides = [(method, budget, "topk", b) for b in BACKBONES]
        random = [(method, budget, "random", b) for b in BACKBONES]
        rows.append(
            {
                "method": method,
                "budget": budget,
                "read": setting["budget_measured"].mean(),
                "choosing": setting["choosing"].mean(),
                **{side[-1]: 100 * bootstrap.mean(side)[0] for side in sides},
                "gain": bootstrap.gain(sides[1], sides[0]),
                **{f"{side[-1]} random": 100 * bootstrap.mean(side)[0] for side in random},
                "n": setting["n"].min(),
            }
        )
    frame = pd.DataFrame(rows)
    place = {budget: i for i, budget in enumerate(by_size(frame["budget"]))}
    frame = frame.assign(place=frame["budget"].map(place))
    return frame.sort_values(["place", BACKBONES[1]], ascending=[True, False], ignore_index=True)


def table(frame: pd.DataFrame) -> Table:
    """The frame of `means` as a table, its rows grouped by budget."""
    rows = [
        (
            row["budget"],
            row["method"],
            number(row["read"], 3),
            number(row["choosing"], 3),
            *(number(row[b]) for b in BACKBONES),
            interval(row["gain"]),
            *(number(row[f"{b} random"]) for b in BACKBONES),
            str(row["n"]),
        )
        for _, row in frame.iterrows()
    ]
    columns = ("Budget", "Method", "Read", "Choosing", *BACKBONES, "Δ 95 %")
    return Table.described("methods", (*columns, *(f"{b}, random" for b in BACKBONES), "n"), rows)
