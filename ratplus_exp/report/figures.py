"""Figures of finished cells, in one style. Each function writes a PNG and a PDF, and returns the
PNG's path or, if nothing was measured, None."""

import textwrap
from collections.abc import Iterable, Sequence
from fractions import Fraction
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from ratplus_exp.analysis.bootstrap import Estimate
from ratplus_exp.analysis.frame import BACKBONES, DENSE, TASKS, grouped, select
from ratplus_exp.analysis.hits import MEAN, estimate
from ratplus_exp.analysis.pattern import DECISIVE
from ratplus_exp.budget import Budget
from ratplus_exp.report.prose import METHODS, SELECTORS, sentence
from ratplus_exp.report.results import Results
from ratplus_exp.store import write_atomically

COLORS = {"Attention": "#8a8a8a", "RAT+": "#c23b22"}
METHOD_COLORS = {"quest": "#1f77b4", "moba": "#2a9d5c", "snapkv": "#c98a1b"}
PHASE_LINES = {"decode": "-", "prefill": "--", "once": ":", "step": "-.", None: "--"}
DASHES = {"Attention": (0, (4, 4)), "RAT+": (4, (4, 4))}  # alternate, so that both stay visible


def accuracy_by_budget(results: Results, folder: Path) -> Path | None:
    """Mean accuracy over the tasks against the budget: a panel a method, a line a backbone. Bars
    are 95 % bootstrap intervals, dashed lines dense accuracies. Only a method's most frequent block
    size is drawn, and only points with every task."""
    cells = grouped(results.cells)
    cells = cells[(cells["selector"] == "topk") & (cells["method"] != "dilated")]
    tasks = [task for task in TASKS if task in results.draws.tasks]
    methods = _methods(cells["method"])
    if not methods:
        return None
    panels = _panels(
        sentence("fig1_title", r=results), [METHODS.get(m, m) for m in methods], "mean accuracy, %"
    )
    for panel, method in zip(panels, methods, strict=True):
        of_method = cells[cells["method"] == method]
        block = of_method["block_size"].mode()[0]
        budgets = by_size(of_method.loc[of_method["block_size"] == block, "budget"])
        for backbone in BACKBONES:
            style: dict[str, Any] = {"color": COLORS[backbone]}
            mean = results.draws.mean((*DENSE, backbone), tasks)
            dense = 100 * float(mean[0])
            if np.isfinite(dense):
                label = f"{backbone}, dense"
                panel.axhline(dense, label=label, ls=DASHES[backbone], lw=1.6, **style)
            groups = [(method, block, budget, "topk", backbone) for budget in budgets]
            points = [Estimate.of(100 * results.draws.mean(group, tasks)) for group in groups]
            _line(panel, points, style | {"label": backbone})
        panel.set_xticks(range(len(budgets)), budgets)
        panel.set_xlabel("budget")
    return _save(panels, folder, "fig1")


def accuracy_by_length(results: Results, folder: Path) -> Path | None:
    """Mean accuracy over the tasks against the context length, at equal budget: a panel a budget
    and backbone, a line a method, dashed if its block size is fixed. Bars are 95 % intervals."""
    curves = results.length_curves
    budgets = by_size(curves.loc[curves["method"] != "dense", "budget"])
    sides = [(budget, b) for budget in budgets for b in BACKBONES if b in set(curves["backbone"])]
    if not sides:
        return None
    names = [f"{backbone}, budget {budget}" for budget, backbone in sides]
    panels = _panels(sentence("lengths_title", r=results), names, "mean accuracy, %", 3.8)
    for panel, (budget, backbone) in zip(panels, sides, strict=True):
        shown = select(curves, {"backbone": backbone, "budget": ["1", budget]})
        for method in ("dense", *_methods(set(shown["method"]) - {"dense"})):
            for blocks, line in shown[shown["method"] == method].groupby("blocks"):
                ends = line.set_index("length").reindex([*results.by_length])
                points = [Estimate(*x) for x in ends[["accuracy", "low", "high"]].to_numpy()]
                style = {"color": METHOD_COLORS.get(method, "#555555"), "label": method}
                style["label"] = ", ".join(filter(None, (METHODS.get(method, method), blocks)))
                _line(panel, points, style | {"ls": "--" if " of " in blocks else "-"})
        panel.set_xticks(range(len(results.by_length)), [*results.by_length])
        panel.set_xlabel("context length, tokens")
    return _save(panels, folder, "lengths")


def accuracy_by_read(frame: pd.DataFrame, phases: dict[str, str | None], folder: Path) -> Path:
    """Accuracy against the measured fraction: a panel a backbone, a line a method, in the style of
    its phase. frame: method, read, and the accuracy of each backbone in percent."""
    panels = _panels(sentence("methods_title"), BACKBONES, "mean accuracy, %", 5.5, 5.5)
    methods = sorted(phases, key=lambda m: (str(phases[m]), m))
    colors = plt.get_cmap("tab20")
    for panel, backbone in zip(panels, BACKBONES, strict=True):
        for i, method in enumerate(methods):
            rows = frame[frame["method"] == method].sort_values("read")
            if method == "dense":
                panel.axhline(rows[backbone].iloc[0], color="black", lw=0.8, label="dense")
                continue
            style = {"color": colors(i % 20), "ls": PHASE_LINES[phases[method]]}
            style |= {"marker": "osv^D"[i // 5 % 5], "label": METHODS.get(method, method)}
            panel.plot(rows["read"], rows[backbone], ms=4, lw=1.4, **style)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda x, _: str(Fraction(x).limit_denominator(1024)))
        panel.set_xlabel("fraction of the context read or stored, measured")
        panel.set_ylim(-3, 103)  # points at 0 stay whole
    return _save(panels, folder, "methods")


def ranked_heads(results: Results, method: str, folder: Path, name: str) -> Path | None:
    """Hit rate by rank of the head, mean of the tasks, at most 32 heads: a panel a budget, a line a
    backbone. Bands are 95 % bootstrap intervals."""
    curves = select(results.curves, {"method": method, "task": MEAN})
    curves = curves[curves["rank"] <= 32]
    budgets = by_size(curves["budget"])
    if not budgets:
        return None
    names = [f"budget {budget}" for budget in budgets]
    panels = _panels(
        sentence("ranked_title", r=results, method=METHODS[method]), names, "hit rate, %"
    )
    for panel, budget in zip(panels, budgets, strict=True):
        line = curves[curves["budget"] == budget].sort_values("rank").astype({"rank": float})
        for backbone in BACKBONES:
            low, high = line[f"{backbone} low"], line[f"{backbone} high"]
            style = {"color": COLORS[backbone]}
            panel.plot(line["rank"], line[backbone], marker=".", label=backbone, **style)
            panel.fill_between(line["rank"], low, high, alpha=0.2, lw=0, **style)
        panel.set_xlabel("rank of the head")
        panel.xaxis.get_major_locator().set_params(integer=True)
    return _save(panels, folder, name)


def heads_by_task(results: Results, folder: Path) -> Path | None:
    """Hit rate of the best head at the smallest budget, task by task: a panel a method, a bar a
    backbone."""
    budgets = by_size(results.curves["budget"])
    best = select(results.curves, {"rank": 1, "budget": budgets[-1:]})
    methods = _methods(best["method"])
    if not methods:
        return None
    names = [METHODS.get(method, method) for method in methods]
    label = "hit rate of the best head, %"
    panels = _panels(sentence("fig4_title", r=results, budget=budgets[-1]), names, label, 5.0)
    for panel, method in zip(panels, methods, strict=True):
        rates = best[best["method"] == method].set_index("task")
        tasks = [task for task in (*TASKS, MEAN) if task in rates.index]
        rows = [rates.loc[task] for task in tasks]
        _bars(panel, tasks, {b: [estimate(row, b) for row in rows] for b in BACKBONES})
    return _save(panels, folder, "fig4")


def selectors(results: Results, folder: Path) -> Path | None:
    """Mean accuracy by selector: a panel a method, a bar a backbone."""
    means = results.selector_means
    sides = means.groupby(["method", "selector"])["side"].agg(set)
    methods = _methods(sides[sides >= set(BACKBONES)].index.get_level_values("method"))
    if not methods:  # no cells, or a single backbone
        return None
    first = means.drop_duplicates(["method", "side", "selector"])
    frames = [first[first["method"] == m].set_index(["selector", "side"]) for m in methods]
    names = [
        f"{METHODS.get(method, method)}, budget {frame['budget'].iloc[0]}"
        for method, frame in zip(methods, frames, strict=True)
    ]
    panels = _panels(sentence("selectors_title", r=results), names, "mean accuracy, %", 3.6)
    for panel, frame in zip(panels, frames, strict=True):
        kinds = [k for k in SELECTORS if all((k, b) in frame.index for b in BACKBONES)]
        sides = {b: [frame.loc[(kind, b), "estimate"] for kind in kinds] for b in BACKBONES}
        _bars(panel, [SELECTORS[kind] for kind in kinds], sides)
    return _save(panels, folder, "selectors")


def gains(results: Results, table: str, folder: Path) -> Path | None:
    """RAT+ minus Attention, paper (x) against measured (y): a point a setting and task, filled in
    the paper's decisive cells."""
    place = ["method", "paper_block", "budget", "task"]
    compared = results.compared(table)
    wide = compared.pivot_table(["accuracy", "measured"], place, "backbone")
    if "measured" not in wide or set(wide["measured"]) != set(BACKBONES):
        return None
    paper, measured = (wide[x]["RAT+"] - wide[x]["Attention"] for x in ("accuracy", "measured"))
    label = "measured: RAT+ − Attention, points"
    (panel,) = _panels(sentence("gains_title", r=results, table=table[-1]), [""], label, 4.6, 4.0)
    for method in _methods(wide.index.get_level_values("method")):
        of_method = wide.index.get_level_values("method") == method
        for decisive in (True, False):
            rows = of_method & ((paper.abs() >= DECISIVE) == decisive).to_numpy()
            color = METHOD_COLORS.get(method, "#555555")
            style: dict[str, Any] = {"edgecolors": color}
            style["facecolors"] = color if decisive else "none"
            style["label"] = METHODS.get(method, method) if decisive else None
            panel.scatter(paper[rows], measured[rows], s=22, lw=0.8, alpha=0.8, **style)
    panel.axhline(0, color="black", lw=0.8)
    panel.axvline(0, color="black", lw=0.8)
    panel.autoscale()
    panel.set_xlabel(f"paper: RAT+ − Attention, points (filled: {DECISIVE:g} or more)")
    return _save([panel], folder, f"{table}_gains")


def losses(frame: pd.DataFrame, folder: Path, **what: Any) -> list[Path]:
    """Held-out loss by dilation (loss) and, at the largest one, by part of the context
    (loss_by_position): a panel a window, a line a model, the mean of its trainings. Nothing without
    a dilated pattern.

    frame: backbone, model, dilation (1: dense), local, initial, loss in nats, parts (a list of the
    loss in each); what: of the title, see prose.j2.
    """
    sizes, widest = ["local", "initial"], frame["dilation"].max()
    patterns = [[*x] for x in frame[frame["dilation"] > 1].groupby(sizes).groups]
    names = [f"window {local}" if local else "no window" for local, _ in patterns]
    names = [f"{x}, first {i}" if i else x for x, (_, i) in zip(names, patterns, strict=True)]
    frame, styles = _of_models(frame)
    parts = frame[frame["dilation"].isin([1, widest])].explode("parts")
    parts = parts.assign(loss=parts["parts"].astype(float))
    parts["part of the context"] = parts.groupby(level=0).cumcount() + 1
    parts.loc[parts["dilation"] == 1, "line"] += ", dense"
    axes = {"loss": (frame, "dilation"), "loss_by_position": (parts, "part of the context")}
    for name, (points, x) in axes.items() if patterns else ():
        panels = _panels(sentence(f"{name}_title", widest=widest, **what), names, "loss, nats")
        places = sorted(points[x].unique())
        for panel, pattern in zip(panels, patterns, strict=True):
            own = (points[sizes] == pattern).all(axis=1) | (points["dilation"] == 1)
            for line, of_line in points[own].groupby("line", sort=False):
                mean = of_line.groupby(x)["loss"].mean()
                at = np.searchsorted(places, mean.index)
                panel.plot(at, mean, label=line, marker=".", **styles[line])
            dense = ["dense" if x == "dilation" and place == 1 else place for place in places]
            panel.set_xticks(range(len(places)), dense)
            panel.set_xlabel(x)
            panel.set_ylim(0, 1.05 * points["loss"].max())
        _save(panels, folder, name)
    return [folder / f"{name}.png" for name in axes] if patterns else []


def _of_models(frame: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, dict[str, Any]]]:
    """The frame with the label of each model in `line`: its backbone, and what its name has beyond
    that of the first of its backbone; and the style of each label."""
    labels, styles = {}, {}
    for backbone, models in frame.groupby("backbone", sort=False)["model"].unique().items():
        for model, dash in zip(models, cycle(("-", "--", "-."))):
            other = model.removeprefix(models[0]).strip("_")
            label = labels[model] = f"{backbone}, {other}" if other else str(backbone)
            styles[label] = {"color": COLORS[str(backbone)], "ls": dash}
            styles[f"{label}, dense"] = {"color": COLORS[str(backbone)], "ls": ":"}
    return frame.assign(line=frame["model"].map(labels)), styles


def by_size(budgets: Iterable[str]) -> list[str]:
    """Distinct budgets, the largest first."""
    return sorted(set(budgets), key=lambda b: -Budget.parse(b).fraction)


def _methods(column: Iterable[str]) -> list[str]:
    return sorted(set(column), key=lambda m: (m not in METHODS, [*METHODS, m].index(m)))


def _panels(
    text: str, names: Sequence[str], label: str, width: float = 3.2, height: float = 3.0
) -> list[Any]:
    """Named panels side by side under a title, in the common style."""
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
    figure.suptitle(textwrap.fill(text, round(13 * size[0])), fontsize=10)
    return list(grid[0])


def _line(panel: Any, points: Sequence[Estimate], style: dict[str, Any]) -> None:
    """The measured points with their intervals."""
    places = [i for i, x in enumerate(points) if np.isfinite(x.value)]
    if places:
        values, errors = _errors([points[i] for i in places])
        panel.errorbar(places, values, errors, marker="o", ms=4, capsize=3, **style)


def _bars(panel: Any, labels: Sequence[str], sides: dict[str, list[Estimate]]) -> None:
    """Bars of both backbones with their intervals."""
    style = {"capsize": 2, "error_kw": {"ecolor": "#333333", "elinewidth": 1}}
    for shift, (backbone, points) in zip((-0.2, 0.2), sides.items(), strict=True):
        values, errors = _errors(points)
        style |= {"color": COLORS[backbone], "label": backbone}
        panel.bar(np.arange(len(labels)) + shift, values, 0.38, yerr=errors, **style)
    panel.set_xticks(range(len(labels)), labels, fontsize=9)


def _errors(points: Sequence[Estimate]) -> tuple[np.ndarray, np.ndarray]:
    """The values (n,) and the lengths of their error bars (2, n)."""
    values, low, high = np.array([(x.value, x.low, x.high) for x in points]).T
    return values, np.stack((values - low, high - values)).clip(0)


def _save(panels: Sequence[Any], folder: Path, name: str) -> Path:
    """PNG and PDF, with the last panel's legend beside the panels."""
    figure = panels[-1].figure
    handles, labels = panels[-1].get_legend_handles_labels()
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
    return folder / f"{name}.png"
