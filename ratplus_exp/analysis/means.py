"""Mean accuracies by selector (H2), and against the context length."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd

from ratplus_exp.analysis.bootstrap import Bootstrap, Estimate
from ratplus_exp.analysis.frame import (
    BACKBONES,
    DENSE,
    SETTING,
    TASKS,
    LeftOut,
    backbones_of,
    sample_scores,
    tidy,
)
from ratplus_exp.store import Finished

SELECTORS = ("random", "topk", "oracle", "dense")
GAP = "RAT+ − Attention"
LINE = ["backbone", "budget", "method", "blocks"]


def selector_means(draws: Bootstrap) -> pd.DataFrame:
    """Mean accuracies by selector of every setting with random selection.

    The oracle selects the candidates with gold values first, and as many as the method. Its gain
    over top-k is the loss due to selection; its loss to dense attention is due to other tokens that
    are not attended to. It can be worse than top-k, since the gold candidates displace others.

    Returns:
        SETTING, side (a backbone, or GAP), selector (or "selection": oracle minus topk), estimate
        (percent or points), over the tasks (a list) and samples that all of a setting's groups
        have; n is the smallest number of samples of a task.
    """
    settings = sorted({group[:3] for group in draws.groups if group[3] == "random"})
    rows = []
    for setting in settings:
        groups = {
            (side, kind): (*(DENSE if kind == "dense" else (*setting, kind)), side)
            for side in BACKBONES
            for kind in SELECTORS
        }
        groups = {place: group for place, group in groups.items() if group in draws.groups}
        counts = {task: draws.count(task, groups.values()) for task in TASKS}
        tasks = [task for task, count in counts.items() if count]
        if not tasks:
            continue
        means = {x: 100 * draws.mean(g, tasks, groups.values()) for x, g in groups.items()}
        if np.isnan(next(iter(means.values()))[0]):  # no training has them all
            continue
        for kind in SELECTORS:
            if all((side, kind) in groups for side in BACKBONES):
                attention, ratplus = (means[side, kind] for side in BACKBONES)
                means[GAP, kind] = ratplus - attention
        for side in BACKBONES:
            if (side, "oracle") in groups and (side, "topk") in groups:
                means[side, "selection"] = means[side, "oracle"] - means[side, "topk"]
        n = min(counts[task] for task in tasks)
        rows += [(*setting, *x, Estimate.of(values), tasks, n) for x, values in means.items()]
    return pd.DataFrame(rows, columns=[*SETTING, "side", "selector", "estimate", "tasks", "n"])


def method_means(cells: Sequence[Finished], scorer: str) -> tuple[pd.DataFrame, list[str]]:
    """A row for each method and budget, in the order of the budgets and of the last backbone's
    accuracy; and the tasks that some method lacks, which the means leave out.

    Returns:
        method, budget; read and choosing, the measured fractions; the accuracy of each measured
        backbone in percent, also under random selection if that was; if both were, their
        difference `gain`; n. Of own and of random selection, the samples that all methods answered
        count. LeftOut if the methods share no task.
    """
    by_cell = tidy(cells)
    choosing = {x.cell.id: x.metrics.get("choosing_measured", 0.0) for x in cells}
    by_cell = by_cell.assign(choosing=by_cell["cell"].map(choosing))
    place = ["method", "budget"]
    draws = Bootstrap(sample_scores(cells), scorer, [*place, "selector", "backbone"])
    backbones = backbones_of(by_cell)
    groups = {kind: [g for g in draws.groups if g[2] == kind] for kind in ("topk", "random")}
    tasks = [t for t in draws.tasks if all(draws.count(t, x) for x in groups.values() if x)]
    if not tasks:
        raise LeftOut("no task was answered by all methods")
    n = min(draws.count(task, groups["topk"]) for task in tasks)
    rows: list[dict[str, Any]] = []
    for setting, of_setting in by_cell[by_cell["selector"] == "topk"].groupby(place, sort=False):
        row: dict[str, Any] = dict(zip(place, setting, strict=True)) | {"n": n}
        row["read"] = of_setting["budget_measured"].mean()
        row["choosing"] = of_setting["choosing"].mean()
        means = {
            (kind, b): 100 * draws.mean((*setting, kind, b), tasks, groups[kind])
            for kind in groups
            for b in backbones
        }
        row |= {b: means["topk", b][0] for b in backbones}
        row |= {f"{b} random": means["random", b][0] for b in backbones if groups["random"]}
        if len(backbones) > 1:
            row["gain"] = Estimate.of(means["topk", BACKBONES[1]] - means["topk", BACKBONES[0]])
        rows.append(row)
    frame = pd.DataFrame(rows)
    frame = frame.assign(size=frame["budget"].map(Fraction).astype(float))
    frame = frame.sort_values(["size", backbones[-1]], ascending=False, ignore_index=True)
    return frame, [task for task in draws.tasks if task not in tasks]


def length_curves(draws: Mapping[int, Bootstrap]) -> pd.DataFrame:
    """Means over the tasks that all lengths have, in percent with their 95 % intervals.

    draws: the accuracies of each context length, by `GROUP`. The columns LINE name a line of a
    plot: of a method with blocks, one line has a fixed block size and another a fixed number of
    blocks; a point may be in both. Lines of at most half of the lengths, such as those of other
    block sizes in a table, are left out. n: samples per task.
    """
    tasks = sorted(set.intersection(*(set(x.tasks) for x in draws.values()))) if draws else []
    rows = []
    for length, of_length in draws.items():
        for group in of_length.groups:
            method, size, budget, selector, backbone = group
            if selector not in ("topk", "dense"):
                continue
            x = Estimate.of(100 * of_length.mean(group, tasks))
            n = min((of_length.count(task, [group]) for task in tasks), default=0)
            names = [f"blocks of {size}", f"{length // size} blocks"] if size > 1 else [""]
            rows += [
                (backbone, budget, method, blocks, length, size, x.value, x.low, x.high, n)
                for blocks in names
            ]
    columns = [*LINE, "length", "block_size", "accuracy", "low", "high", "n"]
    frame = pd.DataFrame(rows, columns=columns).dropna()
    several = frame.groupby(LINE)["length"].transform("nunique") > max(1, len(draws) / 2)
    return frame[several].sort_values([*LINE, "length"], ignore_index=True)
