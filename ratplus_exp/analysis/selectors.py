"""H2 from the store: random selection beside top-k, oracle and dense; what a lost point is due to.

The oracle always selects what holds the gold values. What it wins over the method's own choice is
the share of the loss that is selection's; what it still lacks to dense attention is due to all else
that is not attended. It takes as many candidates as the method, so what holds the values displaces
others, and where those mattered it can lose.
"""

from __future__ import annotations

import pandas as pd

from ratplus_exp.analysis.bootstrap import RESAMPLES, Estimate, resample
from ratplus_exp.analysis.frame import BACKBONES, SETTING, TASKS

SELECTORS = ("random", "topk", "oracle", "dense")


def selector_means(samples: pd.DataFrame, score: str, n_boot: int = RESAMPLES) -> pd.DataFrame:
    """Mean accuracies over the tasks by selector, for settings that were run at random too.

    Args:
        samples: rows of `sample_scores`, one model a backbone; seeds of a selector are averaged
            within a training.
        score: column of `samples`.

    Returns:
        SETTING, then name ("Attention random" …, "Attention dense", "RAT+ …", "gap random",
        "gap topk", "gap oracle", "gap dense": RAT+ minus Attention; "Attention selection" …:
        oracle minus topk), value, low, high (percent or points), over the tasks that all of a
        setting's cells have and the samples that all selectors answered; n is the smallest number
        of those of a task.
    """
    samples = samples.assign(
        selector=samples["selector"].where(samples["method"] != "dense", "dense")
    )
    samples = samples[samples["selector"].isin(SELECTORS) & samples["task"].isin(TASKS)]
    rows = []
    for setting, _ in samples[samples["selector"] == "random"].groupby(SETTING):
        own = (samples[SETTING] == list(setting)).all(axis=1)
        here = samples[own | (samples["selector"] == "dense")]
        found = resample(here, score, ["backbone", "selector"], shared=True, n_boot=n_boot)
        counts = found.counts.min(axis=1)  # 0 where a task lacks a selector of either backbone
        tasks = [task for task, count in zip(found.tasks, counts, strict=True) if count]
        if not tasks:
            continue
        means = {" ".join(group): 100 * found.mean(group, tasks) for group in found.groups}
        derived = dict(means)
        for kind in SELECTORS:
            if all(f"{b} {kind}" in means for b in BACKBONES):
                derived[f"gap {kind}"] = means[f"RAT+ {kind}"] - means[f"Attention {kind}"]
        for b in BACKBONES:
            if f"{b} oracle" in means and f"{b} topk" in means:
                derived[f"{b} selection"] = means[f"{b} oracle"] - means[f"{b} topk"]
        place = dict(zip(SETTING, setting, strict=True)) | {"n": counts[counts > 0].min()}
        rows += [place | {"name": x} | vars(Estimate.of(values)) for x, values in derived.items()]
    return pd.DataFrame(rows, columns=[*SETTING, "name", "value", "low", "high", "n"])
