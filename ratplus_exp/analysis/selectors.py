"""H2: random selection beside top-k, oracle and dense attention.

The oracle selects the candidates with gold values first, and as many as the method. Its gain over
top-k is the loss due to selection; its loss to dense attention is due to other tokens that are not
attended to. It can be worse than top-k, since the gold candidates displace others.
"""

import numpy as np
import pandas as pd

from ratplus_exp.analysis.bootstrap import Bootstrap, Estimate
from ratplus_exp.analysis.frame import BACKBONES, DENSE, SETTING, TASKS

SELECTORS = ("random", "topk", "oracle", "dense")
GAP = "RAT+ − Attention"


def selector_means(draws: Bootstrap) -> pd.DataFrame:
    """Mean accuracies by selector of every setting with random selection.

    Returns:
        SETTING, side (a backbone, or GAP), selector (or "selection": oracle minus topk), estimate
        (percent or points), over the tasks and samples that all of a setting's groups have; n is
        the smallest number of samples of a task.
    """
    settings = sorted({group[:3] for group in draws.trainings if group[3] == "random"})
    rows = []
    for setting in settings:
        groups = {
            (side, kind): group
            for side in BACKBONES
            for kind in SELECTORS
            for group in [(*(DENSE if kind == "dense" else (*setting, kind)), side)]
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
