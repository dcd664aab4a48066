"""Checks of results: cells that do not belong together, and implausible differences."""

from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import pandas as pd

from ratplus_exp.analysis.bootstrap import Bootstrap, Estimate, Group
from ratplus_exp.analysis.frame import (
    COMMON,
    DENSE,
    GROUP,
    SETTING,
    TASKS,
    LeftOut,
    part_of_variant,
    parts_of_variants,
)

LEVEL = 0.999
"""Of the one-sided bootstrap bound; high, since a report makes some two hundred comparisons."""
FEWEST = 20
"""Samples of a task below which it is not checked."""


class Anomaly(NamedTuple):
    """A group (of `GROUP`) that is significantly better than one that attends to more.

    than: the other group's budget, or "dense"; task: None for the mean over the tasks; gain, bound:
    points, and their one-sided lower bound.
    """

    group: Group
    than: str
    task: str | None
    gain: float
    bound: float


def anomalies(draws: Bootstrap) -> list[Anomaly]:
    """Sparse attention better than dense, and a smaller budget better than a larger one on the mean
    of the tasks, at the same method and block size."""
    compared: list[tuple[Group, Group, str, str | None]] = []
    by_budget: dict[Group, list[Group]] = {}  # groups that differ in the budget alone
    for group in (group for group in draws.groups if group[3] == "topk"):
        compared += [(group, (*DENSE, group[-1]), "dense", task) for task in (None, *TASKS)]
        by_budget.setdefault((*group[:2], *group[3:]), []).append(group)
    for groups in by_budget.values():
        groups.sort(key=lambda group: Fraction(group[2]))
        compared += [(small, large, large[2], None) for small, large in pairwise(groups)]
    result = []
    for group, other, than, task in compared:
        tasks = [t for t in TASKS if task in (t, None) and draws.count(t, (group, other)) >= FEWEST]
        difference = draws.mean(group, tasks, (other,)) - draws.mean(other, tasks, (group,))
        gain = Estimate.of(100 * difference, level=2 * LEVEL - 1)
        if gain.low > 0:
            result.append(Anomaly(group, than, task, gain.value, gain.low))
    return result


def check_unmixed(cells: pd.DataFrame) -> None:
    """LeftOut if cells of different models or data would share a place, or be compared.

    cells: rows of `tidy` with the columns of GROUP.
    """
    origin = ["backbone", "training", "seed", "selector_seed"]
    scopes = {
        "context_length": ["tier"],
        "model": ["backbone"],
        "checkpoint": origin,
        "training": ["backbone", "checkpoint"],
    }
    for column, scope in scopes.items():
        for _, group in cells.groupby(scope, dropna=False):
            _refuse(group, column, group[column])
    for name in sorted(parts_of_variants(cells)):
        common = name in (*COMMON, "question")  # to all methods
        for _, group in cells.groupby([*(() if common else SETTING), "task"]):
            values = part_of_variant(group, name)  # methods without a question share its cells
            _refuse(group, name, values if name == "question" else values.fillna("none"))
    for _, group in cells.groupby([*origin, *GROUP[:-1], "task"], dropna=False):
        _refuse(group, "cell", group["cell"])


def _refuse(group: pd.DataFrame, column: str, values: pd.Series) -> None:
    """LeftOut if the values of a group's rows differ; column: to choose them by."""
    if values.nunique() > 1:
        names, first = sorted(map(str, values.dropna().unique())), group.iloc[0]
        each = ", one for each backbone" if column in ("model", "checkpoint") else ""
        raise LeftOut(
            f"the table would mix results that differ in {column} ({', '.join(names)}; "
            f"{first['backbone']} {first['method']}, {first['task']}, seed {first['seed']}): "
            f'choose which, as in stage.where={{{column}: "{names[0]}"}}{each}'
        )
