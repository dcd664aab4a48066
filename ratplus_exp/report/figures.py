"""Figures of finished cells, in one style. Each function writes a PNG and a PDF, and returns the
PNG's path or, if nothing was measured, None."""

from collections.abc import Iterable
from fractions import Fraction
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps

from ratplus_exp.analysis.bootstrap import Estimate
from ratplus_exp.analysis.frame import (
    ALL_TASKS,
    BACKBONES,
    DENSE,
    SETTING,
    TASKS,
    backbones_of,
    grouped,
    select,
)
from ratplus_exp.analysis.hits import MEAN, estimate
from ratplus_exp.analysis.pattern import DECISIVE
from ratplus_exp.report.drawing import COLORS, draw_bars, draw_line, drawing
from ratplus_exp.report.prose import METHODS, SELECTORS, sentence
from ratplus_exp.report.results import Results

METHOD_COLORS = {"quest": "#1f77b4", "moba": "#2a9d5c", "snapkv": "#c98a1b"}
PHASE_LINES = {"decode": "-", "prefill": "--", "once": ":", "step": "-.", None: "--"}
OTHER = "#555555"  # of other methods
DASHES = {"Attention": (0, (4, 4)), "RAT+": (4, (4, 4))}  # alternate, so that both stay visible
ACCURACY = "mean accuracy, %"


def accuracy_by_budget(results: Results, folder: Path) -> Path | None:
    """Mean accuracy over the tasks against the budget: a panel a method, a line a backbone. Bars
    are 95 % bootstrap intervals, dashed lines dense accuracies. Only a method's most frequent block
    size is drawn, and only points with every task."""
    cells = grouped(results.cells)
    cells = cells[(cells["selector"] == "topk") & (cells["method"] != "dilated")]
    tasks = [task for task in TASKS if task in results.draws.tasks]
    names = _names(cells["method"])
    if not names:
        return None
    title = sentence("fig1_title", r=results)
    with drawing(folder / "fig1", title, names, ACCURACY, "budget") as panels:
        for method, panel in panels.items():
            of_method = cells[cells["method"] == method]
            block = of_method["block_size"].mode()[0]
            budgets = by_size(of_method.loc[of_method["block_size"] == block, "budget"])
            for backbone, color in COLORS.items():
                dense = 100 * results.draws.mean((*DENSE, backbone), tasks)[0]
                if np.isfinite(dense):
                    style = {"label": f"{backbone}, dense", "ls": DASHES[backbone], "lw": 1.6}
                    panel.axhline(dense, color=color, **style)
                groups = [(method, block, budget, "topk", backbone) for budget in budgets]
                points = [Estimate.of(100 * results.draws.mean(group, tasks)) for group in groups]
                draw_line(panel, points, color=color, label=backbone)
            panel.set_xticks(range(len(budgets)), budgets)
    return folder / "fig1.png"


def accuracy_by_length(results: Results, folder: Path) -> Path | None:
    """Mean accuracy over the tasks against the context length, at equal budget: a panel a budget
    and backbone, a line a method, dashed if its block size is fixed. Bars are 95 % intervals."""
    curves = results.length_curves
    budgets = by_size(curves.loc[curves["method"] != "dense", "budget"])
    lines = curves.groupby(["budget", "backbone"]).groups
    names = {(b, x): f"{x}, budget {b}" for b in budgets for x in BACKBONES if (b, x) in lines}
    if not names:
        return None
    title, label = sentence("lengths_title", r=results), "context length, tokens"
    with drawing(folder / "lengths", title, names, ACCURACY, label, width=3.8) as panels:
        for (budget, backbone), panel in panels.items():
            shown = select(curves, {"backbone": backbone, "budget": ["1", budget]})
            for method, name in {"dense": "dense", **_names(shown["method"])}.items():
                for blocks, line in shown[shown["method"] == method].groupby("blocks"):
                    ends = line.set_index("length").reindex([*results.by_length])
                    points = [Estimate(*x) for x in ends[["accuracy", "low", "high"]].to_numpy()]
                    label = ", ".join(filter(None, (name, blocks)))
                    style = {"label": label, "ls": "--" if " of " in blocks else "-"}
                    draw_line(panel, points, color=METHOD_COLORS.get(method, OTHER), **style)
            panel.set_xticks(range(len(results.by_length)), [*results.by_length])
    return folder / "lengths.png"


def accuracy_by_task(results: Results, folder: Path) -> Path | None:
    """Accuracy by task: a panel for dense attention and for each of the paper's methods and its
    protocols, a bar a backbone. Only a method's most frequent block size is drawn, and the budget
    with the most cells."""
    cells = results.of_protocols
    cells = cells[cells["method"].isin(["dense", *METHODS])]
    budgets = by_size(cells.loc[cells["method"] != "dense", "budget"].mode())[:1]
    cells = cells[cells["budget"].isin(["1", *budgets])]
    order = {method: i for i, method in enumerate(("dense", *METHODS))}
    parts = sorted(
        cells.groupby(["method", "protocol"]), key=lambda x: (order[x[0][0]], x[0][1] == "split")
    )
    names = {}
    for (method, protocol), part in parts:
        setting = (method, part["block_size"].mode()[0], *part[["budget", "selector"]].iloc[0])
        words = [METHODS.get(method, method), *part["budget"][:1], protocol]
        shown = words[: 1 if method == "dense" else 3 if protocol == "split" else 2]
        names[setting, protocol] = ", ".join(shown)
    tasks = [task for task in ALL_TASKS if task in set(cells["task"])]
    title, width = sentence("tasks_title", r=results), max(2.5, 0.5 + 0.26 * len(tasks))
    if not names:
        return None
    with drawing(folder / "tasks", title, names, "accuracy, %", width=width) as panels:
        for (setting, protocol), panel in panels.items():
            mean = results.draws_of(protocol).mean
            groups = {backbone: (*setting, backbone) for backbone in backbones_of(cells)}
            bars = {b: [Estimate.of(100 * mean(g, [t])) for t in tasks] for b, g in groups.items()}
            draw_bars(panel, tasks, bars)
            panel.tick_params(axis="x", rotation=90)
    return folder / "tasks.png"


def accuracy_by_read(frame: pd.DataFrame, phases: dict[str, str | None], folder: Path) -> Path:
    """Accuracy against the measured fraction: a panel a backbone, a line a method, in the style of
    its phase. frame: method, read, and the accuracy of each backbone in percent."""
    title, label = sentence("methods_title"), "fraction of the context read or stored, measured"
    methods = sorted(phases, key=lambda m: (str(phases[m]), m))
    colors = colormaps["tab20"]
    names = {backbone: backbone for backbone in BACKBONES if backbone in frame}
    with drawing(folder / "methods", title, names, ACCURACY, label, 5.5, 5.5) as panels:
        for backbone, panel in panels.items():
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
            panel.set_ylim(-3, 103)  # points at 0 stay whole
    return folder / "methods.png"


def ranked_heads(results: Results, method: str, folder: Path, name: str) -> Path | None:
    """Hit rate by rank of the head, mean of the tasks, at most 32 heads: a panel a budget, a line a
    backbone. Bands are 95 % bootstrap intervals. Only the most frequent block size is drawn."""
    curves = _of_main_blocks(select(results.curves, {"method": method, "task": MEAN}))
    curves = curves[curves["rank"] <= 32]
    names = {budget: f"budget {budget}" for budget in by_size(curves["budget"])}
    if not names:
        return None
    title = sentence("ranked_title", r=results, method=METHODS[method])
    with drawing(folder / name, title, names, "hit rate, %", "rank of the head") as panels:
        for budget, panel in panels.items():
            line = curves[curves["budget"] == budget].sort_values("rank").astype({"rank": float})
            for side in backbones_of(results.rates):
                color = COLORS[side]
                panel.plot(line["rank"], line[side], marker=".", label=side, color=color)
                ends = line[f"{side} low"], line[f"{side} high"]
                panel.fill_between(line["rank"], *ends, alpha=0.2, lw=0, color=color)
            panel.xaxis.get_major_locator().set_params(integer=True)
    return folder / f"{name}.png"


def heads_by_task(results: Results, folder: Path) -> Path | None:
    """Hit rate of the best head at the smallest budget, task by task: a panel a method, a bar a
    backbone. Only a method's most frequent block size is drawn."""
    budgets = by_size(results.curves["budget"])
    best = _of_main_blocks(select(results.curves, {"rank": 1, "budget": budgets[-1:]}))
    names = _names(best["method"])
    if not names:
        return None
    title = sentence("fig4_title", r=results, budget=budgets[-1])
    with drawing(folder / "fig4", title, names, "hit rate of the best head, %", width=5) as panels:
        for method, panel in panels.items():
            rates = best[best["method"] == method].set_index("task")
            tasks = [task for task in (*TASKS, MEAN) if task in rates.index]
            rows = [rates.loc[task] for task in tasks]
            sides = backbones_of(results.rates)
            draw_bars(panel, tasks, {b: [estimate(row, b) for row in rows] for b in sides})
    return folder / "fig4.png"


def _of_main_blocks(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of each method's most frequent block size."""
    main = frame.groupby("method")["block_size"].agg(lambda sizes: sizes.mode()[0])
    return frame[frame["block_size"] == frame["method"].map(main)]


def selectors(results: Results, folder: Path) -> Path | None:
    """Mean accuracy by selector: a panel a method, in its setting with the most selectors, a bar a
    backbone."""
    means = results.selector_means
    backbones = backbones_of(means, "side")
    sides = means.groupby(["method", "selector"])["side"].agg(set)
    names = _names(sides[sides >= set(backbones)].index.get_level_values("method"))
    if not names:
        return None
    of_settings = means[means["method"].isin(names)].groupby(SETTING)
    sizes = of_settings.size().sort_values(ascending=False, kind="stable")
    most = {method: (method, *rest) for method, *rest in reversed(sizes.index)}
    frames = {method: of_settings.get_group(most[method]) for method in names}
    names = {m: f"{name}, budget {most[m][2]}" for m, name in names.items()}
    title = sentence("selectors_title", r=results)
    with drawing(folder / "selectors", title, names, ACCURACY, width=3.6) as panels:
        for method, panel in panels.items():
            frame = frames[method].set_index(["selector", "side"])
            kinds = [k for k in SELECTORS if all((k, b) in frame.index for b in backbones)]
            sides = {b: [frame.loc[(kind, b), "estimate"] for kind in kinds] for b in backbones}
            draw_bars(panel, [SELECTORS[kind] for kind in kinds], sides)
    return folder / "selectors.png"


def gains(results: Results, table: str, folder: Path) -> Path | None:
    """RAT+ minus Attention, paper (x) against measured (y): a point a setting and task, filled in
    the paper's decisive cells."""
    place = ["method", "paper_block", "budget", "task"]
    compared = results.compared(table)
    wide = compared.pivot_table(["accuracy", "measured"], place, "backbone")
    if "measured" not in wide or set(wide["measured"]) != set(BACKBONES):
        return None
    paper, measured = (wide[x]["RAT+"] - wide[x]["Attention"] for x in ("accuracy", "measured"))
    decisive = paper.abs() >= DECISIVE
    title = sentence("gains_title", r=results, table=table[-1])
    labels = (
        "measured: RAT+ − Attention, points",
        f"paper: RAT+ − Attention, points (filled: {DECISIVE:g} or more)",
    )
    with drawing(folder / f"{table}_gains", title, {"": ""}, *labels, 4.6, 4.0) as panels:
        panel, methods = panels[""], wide.index.get_level_values("method")
        for method, name in _names(methods).items():
            of_method, color = methods == method, METHOD_COLORS.get(method, OTHER)
            for rows, fill in ((of_method & decisive, color), (of_method & ~decisive, "none")):
                style = {"edgecolors": color, "facecolors": fill, "s": 22, "lw": 0.8, "alpha": 0.8}
                label = name if fill == color else None
                panel.scatter(paper[rows], measured[rows], label=label, **style)
        panel.axhline(0, color="black", lw=0.8)
        panel.axvline(0, color="black", lw=0.8)
        panel.autoscale()
    return folder / f"{table}_gains.png"


def losses(frame: pd.DataFrame, folder: Path, **words: Any) -> list[Path]:
    """Held-out loss by dilation (loss) and, at the largest one, by part of the context
    (loss_by_position): a panel a window, a line a model, the mean of its trainings. Nothing without
    a dilated pattern.

    frame: backbone, model, dilation (1: dense), local, initial, loss in nats, parts (a list of the
    loss in each); words: of the title's macro in prose.j2.
    """
    sizes, widest = ["local", "initial"], frame["dilation"].max()
    patterns = frame[frame["dilation"] > 1]
    names = {(x, i): f"window {x}" if x else "no window" for x, i in patterns.groupby(sizes).groups}
    names = {key: f"{name}, first {key[1]}" if key[1] else name for key, name in names.items()}
    frame, styles = _labelled(frame)
    parts = frame[frame["dilation"].isin([1, widest])].explode("parts")
    parts = parts.assign(loss=parts["parts"].astype(float))
    parts["part of the context"] = parts.groupby(level=0).cumcount() + 1
    parts.loc[parts["dilation"] == 1, "line"] += ", dense"
    axes = {"loss": (frame, "dilation"), "loss_by_position": (parts, "part of the context")}
    for name, (points, x) in axes.items() if names else ():
        title = sentence(f"{name}_title", widest=widest, **words)
        places = sorted(points[x].unique())
        labels = ["dense" if x == "dilation" and place == 1 else place for place in places]
        with drawing(folder / name, title, names, "loss, nats", x) as panels:
            for pattern, panel in panels.items():
                drawn = (points[sizes] == [*pattern]).all(axis=1) | (points["dilation"] == 1)
                for line, of_line in points[drawn].groupby("line", sort=False):
                    mean = of_line.groupby(x)["loss"].mean()
                    at = np.searchsorted(places, mean.index)
                    panel.plot(at, mean, label=line, marker=".", **styles[line])
                panel.set_xticks(range(len(places)), labels)
                panel.set_ylim(0, 1.05 * points["loss"].max())
    return [folder / f"{name}.png" for name in axes] if names else []


def _labelled(frame: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, dict[str, Any]]]:
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
    return sorted(set(budgets), key=Fraction, reverse=True)


def _names(methods: Iterable[str]) -> dict[str, str]:
    """Names of the methods but dense, the paper's in its order and then the others."""
    others = sorted(set(methods) - METHODS.keys() - {"dense"})
    return {m: METHODS.get(m, m) for m in (*METHODS, *others) if m in set(methods)}
