"""Figures of finished cells, in one clean style and with the paper's names."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
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
from ratplus_exp.store import write_atomically

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
    samples = samples.assign(block_size=samples["block_size"].fillna(0))
    methods = _methods(samples["method"][~samples["method"].isin(["dense", "dilated"])])
    if not methods:
        return []
    found = resample(samples, score, ["backbone", "method", "block_size", "budget"])
    dense = {group[0]: 100 * found.mean(group)[0] for group in found.groups if group[1] == "dense"}
    figure, panels = _panels([METHODS.get(m, m) for m in methods], title, "mean accuracy, %")
    for panel, method in zip(panels, methods, strict=True):
        here = samples[samples["method"] == method]
        block = here["block_size"].mode()[0]
        budgets = by_size(here[here["block_size"] == block])
        for backbone in BACKBONES:
            style: dict[str, Any] = {"color": COLORS[backbone]}
            if backbone in dense:
                label = f"{backbone}, dense"
                panel.axhline(dense[backbone], label=label, ls=DASHES[backbone], lw=1.6, **style)
            means = [found.mean((backbone, method, block, budget)) for budget in budgets]
            places = [i for i, mean in enumerate(means) if np.isfinite(mean[0])]
            if places:
                points = [Estimate.of(100 * means[i]) for i in places]
                y, low, high = np.array([(x.value, x.low, x.high) for x in points]).T
                style |= {"marker": "o", "ms": 4, "capsize": 3, "label": backbone}
                panel.errorbar(places, y, [y - low, high - y], **style)
        panel.set_xticks(range(len(budgets)), budgets)
        panel.set_xlabel("budget")
    return _save(figure, panels[-1], folder, name)


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
    figure, panels = _panels([f"budget {budget}" for budget in budgets], title, "hit rate, %")
    for panel, budget in zip(panels, budgets, strict=True):
        line = here[here["budget"] == budget].sort_values("rank").astype({"rank": float})
        for backbone in BACKBONES:
            x, y, low, high = (
                line[c].to_numpy()
                for c in ("rank", backbone, f"{backbone} low", f"{backbone} high")
            )
            panel.plot(x, y, marker=".", color=COLORS[backbone], label=backbone)
            panel.fill_between(x, low, high, color=COLORS[backbone], alpha=0.2, lw=0)
        panel.set_xlabel("rank of the head")
        panel.xaxis.get_major_locator().set_params(integer=True)
    return _save(figure, panels[-1], folder, name)


def heads_by_task(
    curves: pd.DataFrame, budget: str, folder: Path, name: str, title: str
) -> list[Path]:
    """Hit rate of the best head, task by task: a panel a method, a bar a backbone."""
    here = curves[(curves["rank"] == 1) & (curves["budget"] == budget)]
    methods = _methods(here["method"])
    if not methods:
        return []
    names = [METHODS.get(method, method) for method in methods]
    figure, panels = _panels(names, title, "hit rate of the best head, %", width=5.0)
    for panel, method in zip(panels, methods, strict=True):
        mine = here[here["method"] == method].set_index("task")
        tasks = [task for task in (*TASKS, MEAN) if task in mine.index]
        ends = ("", " low", " high")
        sides = {b: [mine.loc[tasks, f"{b}{end}"] for end in ends] for b in BACKBONES}
        _bars(panel, tasks, sides)
    return _save(figure, panels[-1], folder, name)


def selectors(means: pd.DataFrame, folder: Path, name: str, title: str) -> list[Path]:
    """Mean accuracy by who selects: a panel a method, a bar a backbone.

    means: from `selector_means`. Whiskers are 95 % bootstrap intervals.
    """
    methods = _methods(means["method"])
    if not methods:
        return []
    frames = [
        means[means["method"] == m].drop_duplicates("name").set_index("name") for m in methods
    ]
    names = [
        f"{METHODS.get(method, method)}, budget {here['budget'].iloc[0]}"
        for method, here in zip(methods, frames, strict=True)
    ]
    figure, panels = _panels(names, title, "mean accuracy, %", width=3.6)
    for panel, here in zip(panels, frames, strict=True):
        kinds = [kind for kind in SELECTORS if all(f"{b} {kind}" in here.index for b in BACKBONES)]
        rows = {b: here.loc[[f"{b} {kind}" for kind in kinds]] for b in BACKBONES}
        sides = {b: [mine[x] for x in ("value", "low", "high")] for b, mine in rows.items()}
        _bars(panel, [SELECTORS[kind] for kind in kinds], sides)
    return _save(figure, panels[-1], folder, name)


def gains(against: pd.DataFrame, folder: Path, name: str, title: str) -> list[Path]:
    """RAT+ minus Attention, paper (x) against measured (y): a point a setting and task.

    against: from `cell_by_cell`. Filled points are the paper's decisive cells.
    """
    place = ["method", "block_size", "budget", "task"]
    wide = against.pivot_table(index=place, columns="backbone", values=["paper", "measured"])
    if "measured" not in wide or set(wide["measured"]) != set(BACKBONES):
        return []
    paper, ours = (wide[x]["RAT+"] - wide[x]["Attention"] for x in ("paper", "measured"))
    figure, (panel,) = _panels([""], title, "measured: RAT+ − Attention, points", 4.6, 4.0)
    for method in _methods(wide.index.get_level_values("method")):
        mine = wide.index.get_level_values("method") == method
        for decisive in (True, False):
            chosen = mine & ((paper.abs() >= DECISIVE) == decisive).to_numpy()
            color = METHOD_COLORS.get(method, "#555555")
            style: dict[str, Any] = {"edgecolors": color}
            style["facecolors"] = color if decisive else "none"
            style["label"] = METHODS.get(method, method) if decisive else None
            panel.scatter(paper[chosen], ours[chosen], s=22, lw=0.8, alpha=0.8, **style)
    panel.axhline(0, color="black", lw=0.8)
    panel.axvline(0, color="black", lw=0.8)
    panel.autoscale()
    panel.set_xlabel(f"paper: RAT+ − Attention, points (filled: {DECISIVE:g} or more)")
    return _save(figure, panel, folder, name)


def by_size(frame: pd.DataFrame) -> list[str]:
    """The budgets of a frame, largest first."""
    return sorted(set(frame["budget"]), key=lambda b: -Budget.parse(b).fraction)


def _methods(column: Any) -> list[str]:
    return sorted(set(column), key=lambda m: (m not in METHODS, [*METHODS, m].index(m)))


def _panels(
    names: Sequence[str], title: str, label: str, width: float = 3.2, height: float = 3.0
) -> tuple[Any, Sequence[Any]]:
    """Named panels side by side for percentages, in the common style."""
    size = (width * len(names), height)
    figure, grid = plt.subplots(
        1, len(names), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for panel, name in zip(grid[0], names, strict=True):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", alpha=0.25)
        panel.set_axisbelow(True)
        panel.set_ylim(0, 103)
        panel.set_title(name, fontsize=11)
    grid[0][0].set_ylabel(label)
    figure.suptitle(title, fontsize=10)
    return figure, list(grid[0])


def _bars(panel: Any, labels: Sequence[str], sides: dict[str, list[Any]]) -> None:
    """Bars of both backbones; a side is its values and their lower and upper bounds."""
    for shift, (backbone, (value, low, high)) in zip((-0.2, 0.2), sides.items(), strict=True):
        errors = [(value - low).clip(lower=0), (high - value).clip(lower=0)]
        places = [i + shift for i in range(len(labels))]
        style = {"capsize": 2, "error_kw": {"ecolor": "#333333", "elinewidth": 1}}
        color = COLORS[backbone]
        panel.bar(places, value, 0.38, color=color, label=backbone, yerr=errors, **style)
    panel.set_xticks(range(len(labels)), labels, fontsize=9)


def _save(figure: Any, panel: Any, folder: Path, name: str) -> list[Path]:
    """PNG and PDF, with the panel's legend beside the panels, where it hides nothing."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, dict[str, Any]] = {
        ".png": {"dpi": 160},
        ".pdf": {"metadata": {"CreationDate": None}},
    }
    for kind, how in files.items():
        drawn = BytesIO()
        figure.savefig(drawn, format=kind[1:], **how)
        write_atomically(folder / f"{name}{kind}", drawn.getvalue())
    plt.close(figure)
    return [folder / f"{name}{kind}" for kind in files]
