"""The accuracies that the paper prints, as data: Tables 2-5 (arXiv 2605.28640)."""

from __future__ import annotations

from importlib.resources import files

import pandas as pd

PAPER_TABLES = {  # what a table is of
    "table2": "random selection, OLMo2-7B (inferred)",
    "table3": "RAT+ 7B models",
    "table4": "OLMo2-7B",
    "table5": "random selection, OLMo2-7B (inferred)",
}


def paper_tables(table: str | None = None) -> pd.DataFrame:
    """Every accuracy of the paper's Tables 2-5, or of one, one row a cell, in the paper's order.

    Returns:
        Columns table ("table2" … "table5"), model, backbone, method, block_size and top_k
        (tokens or blocks), budget (a string such as "1/16"), selector, task, accuracy and std
        (percent; std is NaN where it gives none), and inferred: True where the text at hand lost
        the row's model or budget, so that it was inferred (a trailing "?" in the file).
    """
    source = files("ratplus_exp.report").joinpath("paper_tables.csv")
    with source.open(encoding="utf-8") as file:
        raw = pd.read_csv(file, dtype=str, keep_default_na=False)
    frame = raw.apply(lambda column: column.str.removesuffix("?"))
    frame["inferred"] = (frame != raw).any(axis=1)
    if table is not None:
        if table not in PAPER_TABLES:
            raise ValueError(
                f"the paper has no {table!r} here: choose one of {', '.join(PAPER_TABLES)}"
            )
        frame = frame[frame["table"] == table].reset_index(drop=True)
    return frame.astype({"block_size": int, "top_k": int, "accuracy": float}).assign(
        std=pd.to_numeric(frame["std"])
    )
