"""What should make a reader doubt a result: checks that published tables rarely come with."""

from __future__ import annotations

from itertools import pairwise

import pandas as pd

from ratplus_exp.budget import Budget
from ratplus_exp.results.labels import METHODS
from ratplus_exp.results.layout import number
from ratplus_exp.results.paper import TASKS
from ratplus_exp.results.stats import paired_bootstrap
from ratplus_exp.results.store import Store

LEVEL = 0.999
"""Of the one-sided bootstrap bound beyond which a difference is no noise: a report makes some two
hundred comparisons."""
FEWEST = 20
"""Samples of a task without which nothing is said."""


Run = dict[str, pd.Series]
"""Mean score by sample id, of each task of one setting."""


def warnings(store: Store, samples: pd.DataFrame, score: str) -> list[str]:
    """One sentence for each thing to look at; empty if there is none.

    Args:
        store: for the prompts' lengths.
        samples: rows of `sample_scores` to check, one model a backbone.
        score: column of `samples`.
    """
    chosen = samples[samples["task"].isin(TASKS) & (samples["selector"] == "topk")]
    runs: dict[tuple[str, str, int, str], Run] = {}
    place = ["backbone", "method", "block_size", "budget", "task"]
    means = chosen.groupby([*place, "id"])[score].mean()
    for (*setting, task), scores in means.groupby(level=place):
        runs.setdefault(tuple(setting), {})[task] = scores.droplevel(place)
    return [
        *_sparse_beats_dense(runs),
        *_not_monotonic(runs),
        *_cut_prompts(store, set(samples["cell"])),
    ]


def _sparse_beats_dense(runs: dict[tuple[str, str, int, str], Run]) -> list[str]:
    """Less attention can't know more; where it scores higher, dense attention is badly trained, or
    the sparse run sees something that it shouldn't."""
    found = []
    dense = {setting[0]: run for setting, run in runs.items() if setting[1] == "dense"}
    for (backbone, method, block, budget), run in runs.items():
        if method == "dense" or backbone not in dense:
            continue
        for task in (None, *TASKS):
            gain = _gain(run, dense[backbone], TASKS if task is None else (task,))
            if gain and gain[1] > 0:
                where = "on the mean of the tasks" if task is None else f"on {task}"
                found.append(
                    f"Sparse beats dense: {backbone}, {_name(method, block, budget)}, {where} by "
                    f"{number(gain[0])} points (99.9 % bound {number(gain[1])})."
                )
    return found


def _not_monotonic(runs: dict[tuple[str, str, int, str], Run]) -> list[str]:
    """A larger budget should not cost accuracy, at the same method and block size; checked on the
    mean of the tasks alone."""
    found = []
    for backbone, method, block in dict.fromkeys(setting[:3] for setting in runs):
        budgets = [budget for *other, budget in runs if other == [backbone, method, block]]
        budgets.sort(key=lambda b: Budget.parse(b).fraction)
        for small, large in pairwise(budgets):
            a, b = (runs[backbone, method, block, budget] for budget in (small, large))
            gain = _gain(a, b, TASKS)
            if gain and gain[1] > 0:
                found.append(
                    f"Not monotonic in the budget: {backbone}, {_name(method, block, small)}, is "
                    f"better on the mean of the tasks than at {large} by {number(gain[0])} points "
                    f"(99.9 % bound {number(gain[1])})."
                )
    return found


def _cut_prompts(store: Store, cells: set[str]) -> list[str]:
    """A prompt that leaves no room for its answer was cut, or will be."""
    found = []
    for cell in store.cells("eval"):
        if cell.id not in cells:
            continue
        data = cell.key.get("data", {})
        reserve = data.get("forms", data).get("reserve", 0)  # RULER's files have no forms
        room = cell.key["context_length"] - reserve
        long = sum(r.get("prompt_tokens", 0) > room for r in cell.records().values())
        if long:
            found.append(
                f"Prompts were cut: {long} of cell {cell.path.name} have more than {room} tokens."
            )
    return found


def _gain(a: Run, b: Run, tasks: tuple[str, ...]) -> tuple[float, float] | None:
    """Mean of a − b in points over shared tasks, and its lower bound; None if none is shared."""
    sides: tuple[Run, Run] = {}, {}
    for task in tasks:
        if task not in a or task not in b:
            continue
        shared = a[task].index.intersection(b[task].index)
        if len(shared) >= FEWEST:
            sides[0][task], sides[1][task] = a[task][shared], b[task][shared]
    if not sides[0]:
        return None
    first, second = map(pd.concat, sides)
    gain, low, _ = paired_bootstrap(first, second, level=2 * LEVEL - 1)
    return 100 * gain, 100 * low


def _name(method: str, block: int, budget: str) -> str:
    blocks = f" with block size {block}" if block > 1 else ""
    return f"{METHODS.get(method, method)} at {budget}{blocks}"
