"""stage=methods: every method on both backbones at the same budgets; a sweep with its own table and
figure.

The table is sorted by accuracy within each budget, with the measured fractions that attention and
selection read, and random selection of equal size (H2). The cells are those of stage=eval.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from omegaconf import DictConfig

from ratplus_exp.analysis import BACKBONES, SCORERS, Bootstrap, sample_scores, tidy
from ratplus_exp.config import method_of
from ratplus_exp.report import Table
from ratplus_exp.report.figures import by_size
from ratplus_exp.report.prose import METHODS, interval, number
from ratplus_exp.stages.common import job_folder
from ratplus_exp.stages.sweep import configuration, filled, show_tracked
from ratplus_exp.store import Cell

SETTING = ["method", "budget"]
LINES = {"decode": "-", "prefill": "--", "once": ":", "step": "-.", None: "--"}  # by phase


def run(cfg: DictConfig) -> None:
    """Fill the missing cells, and print and write table and figure."""
    frame = means(filled(cfg))
    path = job_folder() / "methods.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    phases: dict[str, str | None] = {
        name: method_of(configuration(cfg, {"method": name})).phase for name in set(frame["method"])
    }
    draw(frame, phases).savefig(path, dpi=160)
    plt.close()
    print(f"Figure: {path}.")
    show_tracked(cfg, table(frame))


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
    new = frame["budget"] != frame["budget"].shift()
    return Table(
        title="All methods at equal budgets, by the accuracy on RAT+",
        caption=(
            "Mean accuracy in % over the tasks by exact match; Δ: RAT+ minus Attention with a 95 % "
            "bootstrap interval, paired by sample. Read: the measured fraction of the context that "
            "was attended to or stored; choosing: what selection read in addition, relative to the "
            "bytes of all keys and values. Random: as many candidates, drawn uniformly. n: samples "
            "a task."
        ),
        columns=(
            *("Budget", "Method", "Read", "Choosing", *BACKBONES, "Δ 95 %"),
            *(f"{b}, random" for b in BACKBONES),
            "n",
        ),
        rows=tuple(rows),
        breaks=frozenset(int(i) for i in frame.index[new] if i),
    )


def draw(frame: pd.DataFrame, phases: dict[str, str | None]) -> Any:
    """Accuracy against the measured fraction: a panel for each backbone, a line for each method."""
    size: dict[str, Any] = {"figsize": (11, 5.5), "sharey": True, "layout": "constrained"}
    figure, panels = plt.subplots(1, len(BACKBONES), **size)
    methods = sorted(phases, key=lambda m: (str(phases[m]), m))
    colors = plt.get_cmap("tab20")
    for panel, backbone in zip(panels, BACKBONES, strict=True):
        for i, method in enumerate(methods):
            rows = frame[frame["method"] == method].sort_values("read")
            if method == "dense":
                panel.axhline(rows[backbone].iloc[0], color="black", lw=0.8, label="dense")
                continue
            panel.plot(
                rows["read"],
                rows[backbone],
                label=METHODS.get(method, method),
                color=colors(i % 20),
                ls=LINES[phases[method]],
                marker="osv^D"[i // 5 % 5],
                ms=4,
                lw=1.4,
            )
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda x, _: str(Fraction(x).limit_denominator(1024)))
        panel.set_title(backbone, fontsize=11)
        panel.set_xlabel("fraction of the context read or stored, measured")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
        panel.set_ylim(-3, 103)
    panels[0].set_ylabel("mean accuracy, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    return figure
