"""The accuracies in the paper's Tables 2-5 (arXiv 2605.28640)."""

from pathlib import Path

import pandas as pd

PAPER_TABLES = {  # the models of each table
    "table2": "random selection, OLMo2-7B (inferred)",
    "table3": "RAT+ 7B models",
    "table4": "OLMo2-7B",
    "table5": "random selection, OLMo2-7B (inferred)",
}


def paper_tables(table: str | None = None) -> pd.DataFrame:
    """Every accuracy of the paper's Tables 2-5, or of one, one row a cell, in the paper's order.

    Columns: table ("table2" … "table5"), model, backbone, method, block_size and top_k (tokens or
    blocks), budget (a string such as "1/16"), selector, task, accuracy and std (percent; std may be
    NaN), and inferred: whether model or budget of the row are inferred (a trailing "?" in the
    file), since the text of the paper lacks them.
    """
    file = Path(__file__).with_name("paper_tables.csv")
    raw = pd.read_csv(file, dtype=str, keep_default_na=False)
    frame = raw.apply(lambda column: column.str.removesuffix("?"))
    frame["inferred"] = (frame != raw).any(axis=1)
    place = ["inferred", *raw.loc[:, :"selector"]]  # the other columns are tasks
    cells = frame.melt(place, var_name="task", value_name="printed", ignore_index=False)
    cells = cells[cells["printed"] != ""].sort_index(kind="stable")
    if table is not None:
        cells = cells[cells["table"] == table]
    printed = cells.pop("printed").str.partition("±")
    cells = cells.assign(accuracy=printed[0].astype(float), std=pd.to_numeric(printed[2]))
    return cells.astype({"block_size": int, "top_k": int}).reset_index(drop=True)
