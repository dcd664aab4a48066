"""Figures of finished cells, in one clean style and with the paper's names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from ratplus_exp.analysis.bootstrap import Estimate, resample
from ratplus_exp.analysis.frame import BACKBONES, TASKS
from ratplus_exp.analysis.hits import MEAN
from ratplus_exp.analysis.pattern import DECISIVE
from ratplus_exp.budget import Budget
from ratplus_exp.report.prose import METHODS, SELECTORS

COLORS = {"Attention": "#8a8a8a", "RAT+": "#c23b22"}
METHOD_COLORS = {"quest": "#1f77b4", "moba": "#2a9d5c", "snapkv": "#c98a1b"}


DASHES = {"Attention": (0, (4, 4)), "RAT+": (4, (4, 4))}
"""Of the dense lines: each fills the other's gaps, so that equal accuracies show both."""


def accuracy_by_budget(
    samples: pd.DataFrame, score: str, folder: Path, name: str, title: str
) -> list[Path]:
    """Mean accuracy over the tasks against the budget: a panel a method, a line a backbone.

    samples: rows of `sample_scores` of one tier; score: its column to show. Only a method's most
    frequent block size is drawn, and only points with every task that the frame has. Bars are 95 %
    bootstrap intervals; a dashed line is the backbone's dense accuracy.
    """
    samples = samples[samples["selector"] == "topk"]
    methods = _methods(set(samples["method"]) - {"dense", "dilated"})
    if not methods:
        return []
    samples = samples.assign(block_size=samples["block_size"].fillna(0))
    found = resample(samples, score, ["backbone", "method", "block_size", "budget"])
    dense = {group[0]: group for group in found.groups if group[1] == "dense"}
    figure, panels = _panels(len(methods), title)
    for panel, method in zip(panels, methods, strict=True):
        here = samples[samples["method"] == method]
        block = here["block_size"].mode()[0]
        budgets = by_size(here[here["block_size"] == block])
        for backbone in BACKBONES:
            color = COLORS[backbone]
            if backbone in dense:
                level = 100 * found.mean(dense[backbone])[0]
                style = {"color": color, "ls": DASHES[backbone], "lw": 1.6}
                panel.axhline(level, label=f"{backbone}, dense", **style)
            means = [found.mean((backbone, method, block, budget)) for budget in budgets]
            points = [(i, Estimate.of(100 * x)) for i, x in enumerate(means) if x[0] == x[0]]
            if points:
                x = [i for i, _ in points]
                y, low, high = np.array([(p.value, p.low, p.high) for _, p in points]).T
                panel.errorbar(
                    x, y, [y - low, high - y], marker="o", ms=4, capsize=3, color=color,
                    label=backbone,
                )  # fmt: skip
        panel.set_title(METHODS.get(method, method), fontsize=11)
        panel.set_xticks(range(len(budgets)), budgets)
        panel.set_xlabel("budget")
    panels[0].set_ylabel("mean accuracy, %")
    _legend(figure, panels[-1])
    return _save(figure, folder, name)


def ranked_heads(
    curves: pd.DataFrame, method: str, folder: Path, name: str, title: str
) -> list[Path]:
    """Hit rate by rank of the head, on the mean of the tasks: a panel a budget, a line a backbone.

    curves: from `rank_curves`. Bands are 95 % bootstrap intervals. At most 32 heads are drawn.
    """
    here = curves[(curves["method"] == method) & (curves["task"] == MEAN) & (curves["rank"] <= 32)]
    budgets = by_size(here)
    if not budgets:
        return []
    figure, panels = _panels(len(budgets), title)
    for panel, budget in zip(panels, budgets, strict=True):
        line = here[here["budget"] == budget].sort_values("rank")
        for backbone in BACKBONES:
            color = COLORS[backbone]
            panel.plot(line["rank"], line[backbone], marker=".", color=color, label=backbone)
            panel.fill_between(
                line["rank"].to_numpy(),
                line[f"{backbone} low"].to_numpy(),
                line[f"{backbone} high"].to_numpy(),
                color=color,
                alpha=0.2,
                lw=0,
            )
        panel.set_title(f"budget {budget}", fontsize=11)
        panel.set_xlabel("rank of the head")
        panel.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel("hit rate, %")
    _legend(figure, panels[-1])
    return _save(figure, folder, name)


def heads_by_task(
    curves: pd.DataFrame, budget: str, folder: Path, name: str, title: str
) -> list[Path]:
    """Hit rate of the best head, task by task: a panel a method, a bar a backbone."""
    here = curves[(curves["rank"] == 1) & (curves["budget"] == budget)]
    methods = _methods(set(here["method"]))
    if not methods:
        return []
    figure, panels = _panels(len(methods), title, width=5.0)
    for panel, method in zip(panels, methods, strict=True):
        mine = here[here["method"] == method].set_index("task")
        tasks = [task for task in (*TASKS, MEAN) if task in mine.index]
        mine = mine.loc[tasks]
        _bars(
            panel,
            tasks,
            {b: [mine[b], mine[f"{b} low"], mine[f"{b} high"]] for b in BACKBONES},
        )
        panel.set_title(METHODS.get(method, method), fontsize=11)
    panels[0].set_ylabel("hit rate of the best head, %")
    _legend(figure, panels[-1])
    return _save(figure, folder, name)


def selectors(means: pd.DataFrame, folder: Path, name: str, title: str) -> list[Path]:
    """Mean accuracy by who selects: a panel a method, a bar a backbone.

    means: from `selector_means`. Whiskers are 95 % bootstrap intervals.
    """
    methods = _methods(set(means["method"]))
    if not methods:
        return []
    figure, panels = _panels(len(methods), title, width=3.6)
    for panel, method in zip(panels, methods, strict=True):
        here = means[means["method"] == method].drop_duplicates("name").set_index("name")
        kinds = [kind for kind in SELECTORS if all(f"{b} {kind}" in here.index for b in BACKBONES)]
        sides = {}
        for backbone in BACKBONES:
            mine = here.loc[[f"{backbone} {kind}" for kind in kinds]]
            sides[backbone] = [mine["value"], mine["low"], mine["high"]]
        _bars(panel, [SELECTORS[kind] for kind in kinds], sides)
        budget = here["budget"].iloc[0]
        panel.set_title(f"{METHODS.get(method, method)}, budget {budget}", fontsize=11)
    panels[0].set_ylabel("mean accuracy, %")
    _legend(figure, panels[-1])
    return _save(figure, folder, name)


def gains(against: pd.DataFrame, folder: Path, name: str, title: str) -> list[Path]:
    """RAT+ minus Attention, paper (x) against measured (y): a point a setting and task.

    against: from `cell_by_cell`. Filled points are the paper's decisive cells.
    """
    place = ["method", "block_size", "budget", "task"]
    wide = against.pivot_table(index=place, columns="backbone", values=["paper", "measured"])
    if "measured" not in wide or set(wide["measured"]) != set(BACKBONES):
        return []
    paper, ours = (wide[x]["RAT+"] - wide[x]["Attention"] for x in ("paper", "measured"))
    figure, (panel,) = _panels(1, title, width=4.6, height=4.0)
    for method in _methods(set(wide.index.get_level_values("method"))):
        mine = wide.index.get_level_values("method") == method
        for decisive in (True, False):
            chosen = mine & ((paper.abs() >= DECISIVE) == decisive).to_numpy()
            color = METHOD_COLORS.get(method, "#555555")
            panel.scatter(
                paper[chosen],
                ours[chosen],
                s=22,
                edgecolors=color,
                facecolors=color if decisive else "none",
                lw=0.8,
                alpha=0.8,
                label=METHODS.get(method, method) if decisive else None,
            )
    panel.axhline(0, color="black", lw=0.8)
    panel.axvline(0, color="black", lw=0.8)
    panel.autoscale()
    panel.set_xlabel("paper: RAT+ − Attention, points (filled: 5 or more)")
    panel.set_ylabel("measured: RAT+ − Attention, points")
    _legend(figure, panel)
    return _save(figure, folder, name)


def _methods(found: set[str]) -> list[str]:
    return sorted(found, key=lambda m: (m not in METHODS, [*METHODS, m].index(m)))


def by_size(frame: pd.DataFrame) -> list[str]:
    """The budgets of a frame, largest first."""
    return sorted(set(frame["budget"]), key=lambda b: -Budget.parse(b).fraction)


def _panels(
    count: int, title: str, width: float = 3.2, height: float = 3.0
) -> tuple[Any, Sequence[Any]]:
    """Panels side by side for percentages, in the common style."""
    figure, panels = plt.subplots(
        1, count, figsize=(width * count, height), sharey=True, squeeze=False, layout="constrained"
    )
    for panel in panels[0]:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", alpha=0.25)
        panel.set_axisbelow(True)
        panel.set_ylim(0, 103)
    figure.suptitle(title, fontsize=10)
    return figure, list(panels[0])


def _legend(figure: Any, panel: Any) -> None:
    """Of one panel, beside the panels, where it hides nothing."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)


def _bars(panel: Any, labels: Sequence[str], sides: dict[str, list[Any]]) -> None:
    """Bars of both backbones; a side is its values and their lower and upper bounds."""
    for shift, (backbone, (value, low, high)) in zip((-0.2, 0.2), sides.items(), strict=True):
        errors = [(value - low).clip(lower=0), (high - value).clip(lower=0)]
        places = [i + shift for i in range(len(labels))]
        panel.bar(
            places,
            value,
            0.38,
            color=COLORS[backbone],
            label=backbone,
            yerr=errors,
            capsize=2,
            error_kw={"ecolor": "#333333", "elinewidth": 1},
        )
    panel.set_xticks(range(len(labels)), labels, fontsize=9)


def _save(figure: Any, folder: Path, name: str) -> list[Path]:
    """PNG and PDF; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in ("png", "pdf")]
    for path in paths:
        figure.savefig(
            path, dpi=160, metadata={"CreationDate": None} if path.suffix == ".pdf" else {}
        )
    plt.close(figure)
    return paths
