"""H1 from the store: hit rates by head, heads ranked, and the top heads of both backbones compared.

A head's hit rate is the share of gold values whose golden position was among the head's selected
candidates at every step (P1, Sec. on H1); the mean over tasks weighs every task alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd

from ratplus_exp.results.frame import SETTING, select, tidy
from ratplus_exp.results.labels import first_token_note, measured_at
from ratplus_exp.results.layout import MISSING, Table, number
from ratplus_exp.results.paper import BACKBONES, TASKS
from ratplus_exp.results.stats import RESAMPLES, resamplings
from ratplus_exp.results.store import Store

STAGE = "hit_rate"
MEAN = "mean"
"""Stands in the task column for the mean over tasks."""
TOP = 4
"""Heads of either backbone that are compared one by one."""


def hit_rates(store: Store, **where: Any) -> pd.DataFrame:
    """One row a layer, head and finished cell: the tidy frame of H1.

    Args:
        where: choices by column of `tidy`, a value or a list.

    Returns:
        layer, head (from 0), task, backbone, method, block_size, budget, budget_measured,
        hit_rate (percent), n (samples), values (gold values counted), selector, selector_seed,
        first_token, seed, model, checkpoint, context_length, tier, cell.
    """
    cells = {cell.id: cell for cell in store.cells(STAGE) if cell.done()}
    rows = []
    for row in select(tidy(store, STAGE), where).to_dict("records"):
        metrics = cells[row["cell"]].metrics()
        for layer, heads in enumerate(metrics["hit_rate"]):
            for head, rate in enumerate(heads):
                own = {"layer": layer, "head": head, "hit_rate": rate, "values": metrics["values"]}
                rows.append(row | own)
    columns = [
        *("layer", "head", "task", "backbone", "method", "block_size", "budget"),
        *("budget_measured", "hit_rate", "n", "values", "selector", "selector_seed", "first_token"),
        *("seed", "model", "checkpoint", "context_length", "tier", "cell"),
    ]
    return pd.DataFrame(rows, columns=columns)


def ranked_heads(rates: pd.DataFrame) -> pd.DataFrame:
    """Heads by their mean hit rate over tasks, best first, within each setting and backbone.

    rates: rows of `hit_rates`. Returns SETTING, backbone, rank (from 1), layer, head, hit_rate.
    """
    means = rates.groupby([*SETTING, "backbone", "layer", "head"], as_index=False)[
        "hit_rate"
    ].mean()
    means = means.sort_values("hit_rate", ascending=False, kind="stable")
    means["rank"] = means.groupby([*SETTING, "backbone"]).cumcount() + 1
    return means.sort_values([*SETTING, "backbone", "rank"], ignore_index=True)


def rank_curves(
    store: Store, rates: pd.DataFrame, n_boot: int = RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """Hit rate by rank, with 95 % bootstrap intervals; heads are ranked anew in every resampling.

    Samples are drawn by id, alike for both backbones. Since the best of many heads looks better
    than it is, so does the top of every curve, alike for both backbones if they have as many heads.

    Args:
        rates: rows of `hit_rates`, one model a backbone.

    Returns:
        SETTING, task (a task, or MEAN of all that both backbones have), rank, and for Attention,
        RAT+ and difference (RAT+ minus Attention at the same rank) the value, and "… low" and
        "… high"; n is the number of samples of a task.
    """
    frames = []
    cells = {cell.id: cell for cell in store.cells(STAGE) if cell.done()}
    places = rates[[*SETTING, "task", "backbone", "cell"]].drop_duplicates()
    for setting, here in sorted(places.groupby(SETTING), key=_by_size):
        total, count, n = np.zeros(()), 0, 0
        generator = np.random.default_rng(seed)
        for task, pair in here.groupby("task"):
            ids = pair.set_index("backbone")["cell"]
            if not ids.index.is_unique:
                raise ValueError(
                    f"several models or seeds share {' '.join(map(str, setting))} {task}: choose "
                    "one of each backbone with stage.where"
                )
            if set(ids.index) != set(BACKBONES):
                continue
            records = [cells[ids[backbone]].records() for backbone in BACKBONES]
            shared = sorted(set(records[0]) & set(records[1]))
            n = len(shared)
            weights = resamplings(n, n_boot, generator)
            heads = np.stack([_rates(weights, [side[i] for i in shared]) for side in records], 1)
            total, count = total + heads, count + 1
            frames.append(_curve(setting, str(task), heads, n))
        if count:
            frames.append(_curve(setting, MEAN, total / count, n))
    bounds = [f"{x}{end}" for x in (*BACKBONES, "difference") for end in ("", " low", " high")]
    columns = [*SETTING, "task", "rank", *bounds, "n"]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def _curve(setting: tuple[Any, ...], task: str, heads: np.ndarray, n: int) -> pd.DataFrame:
    """Rows of `rank_curves` from percent (n_boot + 1, backbones, layers · heads)."""
    ordered = -np.sort(-heads, axis=-1)
    place = dict(zip(SETTING, setting, strict=True)) | {"task": task}
    found: dict[str, Any] = {"rank": np.arange(1, ordered.shape[-1] + 1)}
    sides = (ordered[:, 0], ordered[:, 1], ordered[:, 1] - ordered[:, 0])
    for name, values in zip((*BACKBONES, "difference"), sides, strict=True):
        low, high = np.quantile(values[1:], (0.025, 0.975), axis=0)
        found |= {name: values[0], f"{name} low": low, f"{name} high": high}
    return pd.DataFrame({**found, "n": n}).assign(**place)[[*SETTING, "task", *found, "n"]]


def _by_size(group: tuple[tuple[Any, ...], pd.DataFrame]) -> tuple[str, int, Fraction]:
    method, block, budget = group[0]
    return method, block, -Fraction(budget)


def _rates(weights: np.ndarray, records: Sequence[dict[str, Any]]) -> np.ndarray:
    hits = np.array([np.ravel(record["hits"]) for record in records], float)
    values = np.array([record["values"] for record in records], float)
    return 100 * (weights @ hits) / (weights @ values)[:, None]


def hits_table(
    curves: pd.DataFrame, rates: pd.DataFrame, tier: str, first_token: str = "prefill"
) -> Table:
    """The best head, and the mean of all heads, of both backbones: setting × (tasks and mean).

    curves: from `rank_curves`; rates: the rows of `hit_rates` that it was made from.
    """
    first = curves[curves["rank"] == 1]
    ranked = ranked_heads(rates)
    rows: list[tuple[str, ...]] = []
    breaks = set()
    for setting, here in first.groupby(SETTING, sort=False):
        place = dict(zip(SETTING, setting, strict=True))
        by_task = here.set_index("task")
        if rows and rows[-1][0] != place["method"]:
            breaks.add(len(rows))
        for backbone in BACKBONES:
            mine = select(ranked, place | {"backbone": backbone})
            best = mine.iloc[0]
            gap: tuple[str, str] = ("", "")
            if backbone == "RAT+":
                mean = by_task.loc[MEAN]
                low, high = number(mean["difference low"]), number(mean["difference high"])
                gap = number(mean["difference"], sign="+"), f"[{low}, {high}]"
            rows.append(
                (
                    *(str(place[name]) for name in SETTING),
                    backbone,
                    *(
                        number(by_task.loc[task, backbone]) if task in by_task.index else MISSING
                        for task in TASKS
                    ),
                    number(by_task.loc[MEAN, backbone]),
                    *gap,
                    f"{best['layer']}.{best['head']}",
                    number(mine["hit_rate"].mean()),
                    str(by_task.loc[MEAN, "n"]),
                )
            )
    return Table(
        title=f"H1: hit rate of the best head, at {measured_at(tier, first_token)}",
        caption=(
            "Share of gold values, in %, whose golden position the head's selected candidates hold "
            "at every decoding step; gold values are teacher-forced, and every occurrence of the "
            "value counts. For each task the head that is best there; Best of mean: the head best "
            "on the mean of the tasks, named by layer and number in Head. Δ: RAT+ minus Attention "
            "there, with a 95 % bootstrap interval over samples, heads ranked anew in each "
            "resampling. All heads: mean over heads and tasks. MoBA selects nothing while "
            f"decoding, so it has no hit rate. {first_token_note(first_token)} {MISSING}: not "
            "measured with both backbones."
        ),
        columns=(
            *("Method", "Block", "Budget", "Backbone", *TASKS, "Best of mean", "Δ", "Δ 95 %"),
            *("Head", "All heads", "n"),
        ),
        rows=tuple(rows),
        breaks=frozenset(breaks),
    )


def top_heads_table(curves: pd.DataFrame, tier: str, first_token: str = "prefill") -> Table:
    """The heads of the first ranks on the mean of the tasks, and their difference, by setting."""
    rows: list[tuple[str, ...]] = []
    breaks = set()
    top = curves[(curves["task"] == MEAN) & (curves["rank"] <= TOP)]
    ranks = sorted(top["rank"].unique())
    for setting, here in top.groupby(SETTING, sort=False):
        if rows:
            breaks.add(len(rows))
        by_rank = here.set_index("rank")
        n = str(here["n"].min())
        for backbone in BACKBONES:
            values = (number(by_rank.loc[rank, backbone]) for rank in ranks)
            rows.append((*map(str, setting), backbone, *values, n))
        gaps = (by_rank.loc[rank, _GAP] for rank in ranks)
        texts = (f"{number(x, sign='+')} [{number(low)}, {number(high)}]" for x, low, high in gaps)
        rows.append((*map(str, setting), "RAT+ − Attention", *texts, n))
    return Table(
        title=f"H1: the {len(ranks)} best heads, at {measured_at(tier, first_token)}",
        caption=(
            "Hit rate in %, mean over the tasks, of each backbone's best head, its second best and "
            "so on, and their difference in points, with 95 % bootstrap intervals over samples, "
            f"heads ranked anew in each resampling. {first_token_note(first_token)} n: samples a "
            "task."
        ),
        columns=(
            *("Method", "Block", "Budget", "Backbone"),
            *(f"rank {rank}" for rank in ranks),
            "n",
        ),
        rows=tuple(rows),
        breaks=frozenset(breaks),
    )


_GAP = ["difference", "difference low", "difference high"]
