"""H2 from the store: random selection beside top-k, oracle and dense; what a lost point is due to.

The oracle always selects what holds the gold values. What it wins over the method's own choice is
the share of the loss that is selection's; what it still lacks to dense attention is due to all else
that is not attended. It takes as many candidates as the method, so what holds the values displaces
others, and where those mattered it can lose.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from ratplus_exp.results.frame import SETTING
from ratplus_exp.results.labels import SELECTORS, first_token_note, measured_at
from ratplus_exp.results.layout import MISSING, Table, number
from ratplus_exp.results.paper import BACKBONES, TASKS
from ratplus_exp.results.stats import RESAMPLES, Estimate, resamplings


def selector_means(
    samples: pd.DataFrame, score: str, n_boot: int = RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """Mean accuracies over the tasks by selector, for settings that were run at random too.

    Args:
        samples: rows of `sample_scores`, one model a backbone; selector seeds are averaged.
        score: column of `samples`.

    Returns:
        SETTING, then name ("Attention random" …, "Attention dense", "RAT+ …", "gap random",
        "gap topk", "gap oracle", "gap dense": RAT+ minus Attention; "Attention selection" …:
        oracle minus topk), value, low, high (percent or points), over the tasks that all of a
        setting's cells have; n is the smallest number of samples of a task.
    """
    samples = samples.assign(
        selector=samples["selector"].where(samples["method"] != "dense", "dense")
    )
    samples = samples[samples["selector"].isin(SELECTORS)]
    rows = []
    randoms = samples[samples["selector"] == "random"]
    for setting, _ in randoms.groupby(SETTING):
        own = (samples[SETTING] == list(setting)).all(axis=1)
        here = samples[own | (samples["selector"] == "dense")]
        means, n = _means(here, score, n_boot, seed)
        derived = dict(means)
        for kind in SELECTORS:
            if all(f"{b} {kind}" in means for b in BACKBONES):
                derived[f"gap {kind}"] = means[f"RAT+ {kind}"] - means[f"Attention {kind}"]
        for b in BACKBONES:
            if f"{b} oracle" in means and f"{b} topk" in means:
                derived[f"{b} selection"] = means[f"{b} oracle"] - means[f"{b} topk"]
        for name, values in derived.items():
            estimate = Estimate.of(values)
            place = dict(zip(SETTING, setting, strict=True))
            bounds = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
            rows.append(place | {"name": name} | bounds | {"n": n})
    return pd.DataFrame(rows, columns=[*SETTING, "name", "value", "low", "high", "n"])


def _means(
    samples: pd.DataFrame, score: str, n_boot: int, seed: int
) -> tuple[dict[str, np.ndarray], int]:
    """Of each "backbone selector" the resampled means over tasks, and the samples of a task."""
    generator = np.random.default_rng(seed)
    kinds = {(b, s) for b, s in zip(samples["backbone"], samples["selector"], strict=True)}
    by_task, least = [], 0
    for task in TASKS:
        wide = samples[samples["task"] == task].pivot_table(
            index="id", columns=["backbone", "selector"], values=score, aggfunc="mean"
        )
        if set(wide.columns) != kinds:
            continue
        wide = wide.dropna()  # the samples that every selector answered
        if wide.empty:
            continue
        least = min(least or len(wide), len(wide))
        weights = resamplings(len(wide), n_boot, generator)
        means = 100 * weights @ wide.to_numpy()
        by_task.append({f"{b} {s}": means[:, i] for i, (b, s) in enumerate(wide.columns)})
    names = by_task[0] if by_task else {}
    return {name: np.mean([task[name] for task in by_task], axis=0) for name in names}, least


def selector_table(
    means: pd.DataFrame,
    cells: pd.DataFrame,
    tier: str,
    accuracy: str = "accuracy",
    first_token: str = "prefill",
) -> Table:
    """`selector_means` to read: one row a setting and backbone, and one for their gap.

    cells: rows of `tidy`, for the deviation over selector seeds; accuracy: their column.
    """
    rows: list[tuple[str, ...]] = []
    breaks = set()
    for setting, here in means.groupby(SETTING, sort=False):
        found = here.set_index("name")
        if rows:
            breaks.add(len(rows))
        random = cells[(cells[SETTING] == list(setting)).all(axis=1)]
        random = random[random["selector"] == "random"]
        for side in (*BACKBONES, "gap"):
            row = [*map(str, setting), {"gap": "RAT+ − Attention"}.get(side, side)]
            sign = "+" if side == "gap" else "-"
            for kind in (*SELECTORS, "selection"):
                name = f"{side} {kind}"
                if name not in found.index:
                    row.append("" if (side, kind) == ("gap", "selection") else MISSING)
                    continue
                x = found.loc[name]
                text = number(x["value"], sign="+" if kind == "selection" else sign)
                if side == "gap" or kind == "selection":
                    text += f" [{number(x['low'])}, {number(x['high'])}]"
                elif kind == "random":
                    mine = random[random["backbone"] == side]
                    drawn = mine.groupby("selector_seed")[accuracy].mean()
                    text += f"±{number(drawn.std())}" if len(drawn) > 1 else ""
                row.append(text)
            rows.append((*row, str(found["n"].min())))
    return Table(
        title=f"H2: who selects, at {measured_at(tier, first_token)}",
        caption=(
            "Mean accuracy in % over the tasks when as many candidates are chosen at random "
            "(forced ones kept; mean ± std over selector seeds), by the method (top-k), or by an "
            "oracle that first takes what holds the gold values, and with dense attention. "
            "Selection: oracle minus top-k, what knowing where the values stand wins; since these "
            "candidates displace others of the method's choice, it can be negative. In brackets: "
            "95 % bootstrap intervals over samples, paired by id. n: samples a task that all "
            f"selectors answered. {first_token_note(first_token)}"
        ),
        columns=(
            *("Method", "Block", "Budget", "Backbone"),
            *(*SELECTORS.values(), "Selection", "n"),
        ),
        rows=tuple(rows),
        breaks=frozenset(breaks),
    )
