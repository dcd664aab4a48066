"""The accuracies that P1 prints, as data: Tables 2-5 (arXiv 2605.28640)."""

from __future__ import annotations

from importlib.resources import files

import pandas as pd

BACKBONES = ("Attention", "RAT+")
TASKS = ("S-1", "S-2", "S-3", "MK-1", "MK-2", "MK-3", "MV", "MQ")


def paper_tables() -> pd.DataFrame:
    """Every accuracy of P1's Tables 2-5, one row a cell, in the paper's order.

    Returns:
        Columns table ("table2" … "table5"), model, backbone, method, block_size and top_k
        (tokens or blocks), budget (a string such as "1/16"), selector, task, accuracy and std
        (percent; std is NaN where P1 gives none), and inferred: True where the text at hand lost
        the row's model or budget, so that it was inferred (a trailing "?" in the file).
    """
    source = files("ratplus_exp.results").joinpath("paper_tables.csv")
    with source.open(encoding="utf-8") as file:
        raw = pd.read_csv(file, dtype=str, keep_default_na=False)
    frame = raw.apply(lambda column: column.str.removesuffix("?"))
    frame["inferred"] = (frame != raw).any(axis=1)
    return frame.astype({"block_size": int, "top_k": int, "accuracy": float}).assign(
        std=pd.to_numeric(frame["std"])
    )


def paper_means(table: str) -> pd.DataFrame:
    """Means over the tasks of one of P1's tables, one row a setting, in the paper's order.

    Returns:
        Columns method, block_size, top_k, budget, selector, Attention, RAT+ (percent) and gain
        (RAT+ minus Attention, in points).
    """
    cells = paper_tables().query("table == @table")
    if cells.empty:
        raise ValueError(f"P1 has no {table!r} here; choose one of table2, table3, table4, table5")
    setting = ["method", "block_size", "top_k", "budget", "selector"]
    means = cells.groupby([*setting, "backbone"], sort=False)["accuracy"].mean()
    wide = means.unstack("backbone", sort=False).reset_index().rename_axis(columns=None)
    return wide.assign(gain=wide["RAT+"] - wide["Attention"])
