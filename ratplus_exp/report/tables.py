"""The other tables: findings, the paper cell by cell, the pattern, heads, selectors, cost."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ratplus_exp.analysis.bootstrap import Bootstrap, Estimate, spread
from ratplus_exp.analysis.frame import BACKBONES, SETTING, TASKS, LeftOut, backbones_of, select
from ratplus_exp.analysis.hits import (
    MEAN,
    UP_TO,
    common_trainings,
    estimate,
    rank_curves,
    ranked_heads,
)
from ratplus_exp.analysis.means import GAP
from ratplus_exp.analysis.pattern import DECISIVE, FEWEST, SOLVED, patterns, rank_agreement
from ratplus_exp.report.paper import PAPER_TABLES
from ratplus_exp.report.prose import (
    METHODS,
    MISSING,
    SELECTORS,
    bounds,
    interval,
    number,
    plus_minus,
)
from ratplus_exp.report.results import Results
from ratplus_exp.report.table import Table
from ratplus_exp.store import Finished

TOP = 4  # heads of each backbone in the table of top heads
_PLACE = ("Method", "Block", "Budget", "Backbone")


def findings_table(results: Results) -> Table:
    """The paper's two questions and its main table at its main block size, a row a method and
    budget, each with a verdict; and single tasks that contradict the paper under random selection.
    """
    rows: list[tuple[Any, ...]] = []

    def add(question: str, name: str, tasks: Sequence[str], single: bool = False) -> None:
        paper = results.paper(name)
        paper = paper[paper["paper_block"].isin([1, 64]) & paper["task"].isin(tasks)]
        for group, printed in paper.groupby([*SETTING, "selector"], sort=False):
            means = printed.groupby("backbone")["accuracy"].mean()
            attention, ratplus = sides = [(*group, b) for b in BACKBONES]
            gain = results.draws.gain(ratplus, attention, tasks)
            paper_gain = means["RAT+"] - means["Attention"]
            result = verdict(gain, paper_gain)
            if result and (not single or result == OPPOSITE):
                both = (100 * results.draws.mean(side, tasks, sides)[0] for side in sides)
                change = (gain, number(paper_gain, sign="+"), result)
                rows.append((question, group[0], group[2], *both, *change))

    add("accuracy (Table 3)", "table3", TASKS)
    try:
        curves = results.curves
    except LeftOut:  # the figures of hit rates give the reason
        curves = rank_curves(results.hit_samples[:0])
    curves = select(curves, {"task": MEAN})
    last = curves.groupby(SETTING)["rank"].transform("max")
    heads = {"the best head": curves["rank"] == 1, f"the {TOP} best heads": curves["rank"] == TOP}
    heads["all heads"] = (curves["rank"] == last) & (last > TOP)
    for name, of_heads in heads.items():
        for row in curves[of_heads].to_dict("records"):
            gain = estimate(row, f"difference{UP_TO}")
            place = (f"hit rate of {name} (H1)", row["method"], row["budget"])
            sides = (row[f"{b}{UP_TO}"] for b in BACKBONES)
            # The paper compares the top heads, and prints no numbers.
            paper = (MISSING, MISSING) if name == "all heads" else ("> 0", verdict(gain, 1.0))
            if not np.isnan(gain.value):
                rows.append((*place, *sides, gain, *paper))
    hard = list(results.paper("table2")["task"].unique())
    add("random selection, tasks of Table 2 (H2)", "table5", hard)
    add("random selection, all tasks (H2)", "table5", TASKS)
    for task in TASKS:
        add(f"random selection, {task} alone (H2)", "table5", [task], single=True)
    columns = ("Question", "Method", "Budget", *BACKBONES, "Δ", "Paper Δ", "Verdict")
    return Table.described("findings", columns, rows, r=results)


OPPOSITE = "against the paper"


def verdict(gain: Estimate, paper: float) -> str:
    """Whether a difference, if its interval excludes zero, has the sign of the paper's; "" if it
    was not measured."""
    if np.isnan(gain.value):
        return ""
    if paper == 0 or gain.low <= 0 <= gain.high:
        return "undecided"
    return "as in the paper" if np.sign(gain.value) == np.sign(paper) else OPPOSITE


def pattern_table(results: Results) -> Table:
    """The patterns of every table of the paper that has a measured cell."""
    by_table = (patterns(results.paper(table), results.draws) for table in PAPER_TABLES)
    rows = [
        (
            f"Table {p.table[-1]}",
            p.scope,
            *(p.decisive, p.measured, p.agree, p.against, p.tied),
            interval(p.agreement, 0, sign="-"),
            p.settings,
            *(interval(x, 2, sign="-") for x in (p.gain, p.attention, p.ratplus)),
        )
        for of_table in by_table
        if of_table["measured"].any()
        for p in of_table.itertuples()
    ]
    columns = (
        *("Of paper", "Methods", "Decisive", "Measured", "agree", "against", "tied"),
        *("Agreement, %", "Settings", "ρ of gain", "ρ of Attention", "ρ of RAT+"),
    )
    decisive = f"{DECISIVE:g}"
    return Table.described("pattern", columns, rows, r=results, decisive=decisive, fewest=FEWEST)


def against_table(results: Results, name: str) -> Table:
    """The table of `compare`."""
    names = (
        *("method", "paper_block", "top_k", "budget", "selector", "backbone", "task", "accuracy"),
        *("std", "measured", "measured_std", "difference", "n", "trainings", "seeds"),
        "budget_measured",
    )
    digits = {"std": 2, "measured_std": 2, "budget_measured": 3}
    rows = [
        tuple(number(row[x], digits[x]) if x in digits else row[x] for x in names)
        for row in results.compared(name).to_dict("records")
    ]
    columns = (
        *("Method", "Paper block", "Paper k", "Budget", "Selector", "Backbone", "Task", "Paper"),
        *("Paper std", "measured", "std", "difference", "n", "trainings", "seeds", "Kept"),
    )
    return Table.described("against", columns, rows, group=0, r=results, table=name[-1])


def heads_table(results: Results, method: str) -> Table:
    """The best head, and the mean of all heads, of both backbones: setting × (tasks and mean)."""
    every = select(results.curves, {"method": method})
    curves, means, rows = select(every, {"rank": 1}), select(every, {"task": MEAN}), []
    backbones = backbones_of(results.rates)
    for setting, group in curves.groupby(SETTING, sort=False):
        by_task = group.set_index("task").reindex([*TASKS, MEAN])
        mean = by_task.loc[MEAN]
        gap = estimate(mean, "difference")
        rates = results.rates
        rates = rates[(rates[SETTING] == list(setting)).all(axis=1)]
        rates = rates[rates["task"].isin(group["task"])]
        heads = ranked_heads(select(rates, {"training": common_trainings(rates)}))
        last = means[(means[SETTING] == list(setting)).all(axis=1)].sort_values("rank").iloc[-1]
        for backbone in backbones:
            best = heads[(heads["backbone"] == backbone) & (heads["rank"] == 1)]
            best = best.sort_values("training")
            best_mean = plus_minus(mean[backbone], best["hit_rate"].std())
            gains = (number(gap.value, sign="+"), bounds(gap)) if backbone == "RAT+" else ("", "")
            names = ", ".join(f"{head.layer}.{head.head}" for head in best.itertuples())
            tail = (names, last[backbone + UP_TO], int(mean["n"]))
            of_tasks = by_task.loc[list(TASKS), backbone]
            rows.append((*setting, backbone, *of_tasks, best_mean, *gains, *tail))
    columns = (*_PLACE, *TASKS, "Best of mean", "Δ", "Δ 95 %", "Head", "All heads", "n")
    table = Table.described("heads", columns, rows, r=results)
    return table if len(backbones) > 1 else table.without(("Δ", "Δ 95 %"))


def top_heads_table(results: Results, method: str) -> Table:
    """The best heads on the mean of the tasks, and their difference, by setting."""
    curves = select(results.curves, {"method": method, "task": MEAN})
    top = curves[curves["rank"] <= TOP].sort_values("rank")
    rows: list[tuple[Any, ...]] = []
    for setting, group in top.groupby(SETTING, sort=False):
        rates: dict[str, list[Any]] = {b: list(group[b]) for b in backbones_of(results.rates)}
        if len(rates) > 1:
            rates[GAP] = [estimate(row, "difference") for row in group.to_dict("records")]
        rows += [(*setting, side, *of_side, group["n"].min()) for side, of_side in rates.items()]
    ranks = sorted(top["rank"].unique())
    columns = (*_PLACE, *(f"rank {rank}" for rank in ranks), "n")
    return Table.described("top_heads", columns, rows, len(SETTING), r=results, count=len(ranks))


def selector_table(results: Results) -> Table:
    """The table of `selector_means`: a row a setting and backbone, and one for their gap."""
    random = results.cells[results.cells["selector"] == "random"]
    means, rows = results.selector_means, []
    shown = set(means["side"])  # not both of a lone model
    for setting, group in means.groupby(SETTING, sort=False):
        estimates = group.set_index(["side", "selector"])["estimate"].to_dict()
        for side in (side for side in (*BACKBONES, GAP) if side in shown):
            cells = random[(random[[*SETTING, "backbone"]] == [*setting, side]).all(axis=1)]
            cells = cells[cells["task"].isin(group["tasks"].iloc[0])]
            row: list[Any] = [*setting, side]
            for kind in SELECTORS:
                x = estimates.get((side, kind))
                std = spread(cells, results.scorer).std if kind == "random" else np.nan
                row.append(x if x is None or side == GAP else plus_minus(x.value, std))
            selection = "" if side == GAP else estimates.get((side, "selection"))
            rows.append((*row, selection, group["n"].min()))
    columns = (*_PLACE, *SELECTORS.values(), "Selection", "n")
    return Table.described("selectors", columns, rows, len(SETTING), r=results)


def model_table(
    samples: pd.DataFrame,
    lengths: Mapping[str, float],
    models: Sequence[str],
    scorer: str,
    **setting: Any,
) -> Table:
    """Models side by side: the mean over the tasks in each setting, over the samples that all
    models answered, and each model's difference to the first.

    samples: rows of `sample_scores`; lengths: the effective memory length of each model, in tokens;
    setting: their tier, budget, seed, first_token, protocol.
    """
    place = ["method", "budget", "selector"]
    draws = Bootstrap(samples, scorer, [*place, "model"])
    order = ("dense", *METHODS)
    settings = sorted(
        set(samples[place].itertuples(index=False, name=None)),
        key=lambda x: (x[2] == "random", order.index(x[0]) if x[0] in order else len(order), *x),
    )
    rows = []
    for model in models:
        row: list[Any] = [model, lengths[model]]
        for values in settings:
            groups = [(*values, name) for name in models]
            mean: np.ndarray = 100 * draws.mean((*values, model), among=groups)
            first: np.ndarray = 100 * draws.mean((*values, models[0]), among=groups)
            row += [mean[0], "" if model == models[0] else Estimate.of(mean - first)]
        rows.append(tuple(row))
    main = [setting["budget"], "1", "topk"]  # in the title, or of dense attention
    names = [
        " ".join((METHODS.get(method, method), *(x for x in values if x not in main)))
        for method, *values in settings
    ]
    columns = ("Model", "Length", *(column for name in names for column in (name, f"Δ {name}")))
    n = min(draws.count(t, [(*x, m) for m in models]) for x in settings for t in draws.tasks)
    trainings = sorted(map(int, samples["training"].unique()))
    about = setting | {"trainings": trainings, "scorer": scorer}
    return Table.described("models", columns, rows, group=0, r=about, n=n, first_model=models[0])


def methods_table(
    means: pd.DataFrame, scorer: str, left_out: Sequence[str], trainings: Sequence[int]
) -> Table:
    """The table of `method_means`, its rows grouped by budget; for the caption: the tasks left_out
    and the trainings."""
    names = {"budget": "Budget", "method": "Method", "read": "Read", "choosing": "Choosing"}
    names |= {b: b for b in BACKBONES} | {"gain": "Δ 95 %"}
    names |= {f"{b} random": f"{b}, random" for b in BACKBONES} | {"n": "n"}
    shown = [name for name in names if name in means]  # of a lone model, not the other's
    rows = [
        tuple(number(row[x], 3) if x in ("read", "choosing") else row[x] for x in shown)
        for row in means.to_dict("records")
    ]
    columns = [names[name] for name in shown]
    about = {"trainings": trainings, "scorer": scorer, "left_out": left_out}
    return Table.described("methods", columns, rows, r=about)


def random_table(cells: pd.DataFrame, tasks: Iterable[str], scorer: str, **values: Any) -> Table:
    """One model and setting: a row a selector, a column a task, mean ± std over selector seeds.

    cells: rows of `tidy`; values: the setting, for the title.
    """
    rows = []
    for name in ("random", "topk", "oracle"):
        side = cells[cells["selector"] == name]
        parts = [*(side[side["task"] == task] for task in tasks), side]
        texts = [plus_minus(*spread(part, scorer)[:2]) for part in parts]
        rows.append((name, *texts, side["n"].min(), side["selector_seed"].nunique()))
    columns = ("Selector", *tasks, "Mean", "n", "seeds")
    return Table.described("random", columns, rows, group=0, scorer=scorer, **values)


def cost_table(cells: Iterable[Finished]) -> Table:
    """Cells, samples and seconds of all processes, by stage, device and model."""
    place = ["stage", "device", "model"]
    costs = []
    for cell, metrics, provenance, _ in cells:
        where = (cell.key["stage"], provenance[-1].get("device", ""), cell.key["model"])
        costs.append((*where, 1, metrics["n"], metrics.get("seconds", 0.0)))
    frame = pd.DataFrame(costs, columns=[*place, "cells", "samples", "seconds"])
    rows = []
    for x in frame.groupby(place).sum().itertuples():
        rate = x.samples / x.seconds if x.seconds else ""
        rows.append((*x.Index, x.cells, x.samples, number(x.seconds, 0), rate))
    columns = ("Stage", "Device", "Model", "Cells", "Samples", "Seconds", "Samples/s")
    return Table.described("cost", columns, rows, group=0)


def rank_table(results: Results) -> Table:
    """The table of `rank_agreement`: attention beside the paper's Table 4."""
    agreement = rank_agreement(results.paper("table4"), results.draws)
    rows = [
        (over, count, interval(rho, 2, "-"), ", ".join(tasks))
        for over, tasks, count, rho in agreement.itertuples(index=False, name=None)
    ]
    columns = ("Over", "Count", "ρ", "Tasks")
    return Table.described("ranks", columns, rows, group=0, r=results, solved=f"{SOLVED:.0f}")
