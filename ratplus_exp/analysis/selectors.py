"""H2: random selection beside top-k, oracle and dense; what a lost point is due to.

The oracle always selects what holds the gold values. What it wins over the method's own choice is
the share of the loss that is due to selection; what it lacks to dense attention is due to all else
that is not attended. It takes as many candidates as the method, so what holds the values displaces
others, and where those mattered it can lose.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from ratplus_exp.analysis.bootstrap import Bootstrap, Estimate
from ratplus_exp.analysis.frame import BACKBONES, SETTING, TASKS

SELECTORS = ("random", "topk", "oracle", "dense")
GAP = "RAT+ − Attention"


def selector_means(draws: Bootstrap) -> pd.DataFrame:
    """Mean accuracies by selector of every setting that was run at random, too.

    Returns:
        SETTING, side (a backbone, or GAP), selector (or "selection": oracle minus topk), estimate
        (percent or points), over the tasks that all of a setting's groups have and the samples that
        all of them answered; n is the smallest number of those of a task.
    """
    settings = sorted({group[:3] for group in draws.trainings if group[3] == "random"})
    rows = []
    for setting in settings:
        groups = {
            (side, kind): group
            for side in BACKBONES
            for kind in SELECTORS
            for group in [(*(("dense", 1, "1") if kind == "dense" else setting), kind, side)]
            if group in draws.trainings
        }
        counts = {task: draws.count(task, groups.values()) for task in TASKS}
        tasks = [task for task, count in counts.items() if count]
        if not tasks:
            continue
        means: dict[tuple[str, str], np.ndarray]
        means = {x: 100 * draws.mean(g, tasks, groups.values()) for x, g in groups.items()}
        for kind in SELECTORS:
            if all((side, kind) in groups for side in BACKBONES):
                attention, ratplus = (means[side, kind] for side in BACKBONES)
                means[GAP, kind] = ratplus - attention
        for side in BACKBONES:
            if (side, "oracle") in groups and (side, "topk") in groups:
                means[side, "selection"] = means[side, "oracle"] - means[side, "topk"]
        n = min(counts[task] for task in tasks)
        rows += [(*setting, *x, Estimate.of(values), n) for x, values in means.items()]
    return pd.DataFrame(rows, columns=[*SETTING, "side", "selector", "estimate", "n"])
