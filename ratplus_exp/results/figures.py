"""Figures of finished cells, in one clean style and with the paper's names."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

from ratplus_exp.budget import Budget
from ratplus_exp.results.paper import BACKBONES

NAMES = {"quest": "Quest", "moba": "MoBA", "snapkv": "SnapKV"}
COLORS = {"Attention": "#8a8a8a", "RAT+": "#c23b22"}


def accuracy_by_budget(cells: pd.DataFrame, folder: Path, name: str, title: str) -> list[Path]:
    """Mean accuracy over the tasks against the budget: a panel a method, a line a backbone.

    cells: rows of `tidy` of one tier. Only a method's most frequent block size is drawn, and only
    points with every task that the frame has. A dashed line is the backbone's dense accuracy.
    """
    cells = cells[cells["selector"] == "topk"]
    tasks = cells["task"].nunique()
    found = set(cells["method"]) - {"dense", "dilated"}
    methods = sorted(found, key=lambda m: (m not in NAMES, [*NAMES, m].index(m)))
    if not methods:
        return []
    figure, panels = plt.subplots(
        1, len(methods), figsize=(3.2 * len(methods), 3.0), sharey=True, squeeze=False
    )
    for panel, method in zip(panels[0], methods, strict=True):
        here = cells[cells["method"] == method]
        here = here[here["block_size"] == here["block_size"].mode()[0]]
        budgets = sorted(set(here["budget"]), key=lambda b: -Budget.parse(b).fraction)
        for backbone in BACKBONES:
            side = here[here["backbone"] == backbone].groupby("budget")["accuracy"]
            means = side.mean()[side.count() >= tasks]
            shown = [b for b in budgets if b in means]
            panel.plot(
                [budgets.index(b) for b in shown],
                [means[b] for b in shown],
                marker="o",
                color=COLORS[backbone],
                label=backbone,
            )
            dense = cells[(cells["method"] == "dense") & (cells["backbone"] == backbone)]
            if len(dense):
                panel.axhline(
                    dense["accuracy"].mean(), color=COLORS[backbone], ls=":", lw=1, alpha=0.8
                )
        panel.set_title(NAMES.get(method, method), fontsize=11)
        panel.set_xticks(range(len(budgets)), budgets)
        panel.set_xlabel("budget")
        panel.set_ylim(0, 103)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", alpha=0.25)
    panels[0][0].set_ylabel("mean accuracy, %")
    panels[0][-1].legend(frameon=False, fontsize=9, loc="lower left")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "pdf")]
    for path in paths:
        figure.savefig(
            path, dpi=160, metadata={"CreationDate": None} if path.suffix == ".pdf" else {}
        )
    plt.close(figure)
    return paths
