"""The store as tidy frames: one row a finished cell, or one row a sample of the finished cells."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ratplus_exp.results.files import write_atomically
from ratplus_exp.results.store import Cell, Store

LABELS = {"attention": "Attention", "ratplus": "RAT+"}
"""P1's names of the backbones, for those who configure them in lower case."""

COLUMNS = (
    "backbone",
    "method",
    "block_size",
    "budget",
    "budget_measured",
    "selector",
    "task",
    "seed",
    "n",
    "accuracy",
    "accuracy_ruler",
)
EXTRA = (
    "model",
    "checkpoint",
    "top_k",
    "first_token",
    "selector_seed",
    "variant",
    "context_length",
    "effective_memory_length",
    "gate_mean",
    "tier",
    "cell",
)
_INTEGERS = ("block_size", "seed", "selector_seed", "n", "top_k", "context_length")
_FLOATS = (
    "budget_measured",
    "accuracy",
    "accuracy_ruler",
    "effective_memory_length",
    "gate_mean",
)
SETTING = ["method", "block_size", "budget"]
"""Columns that say how a method was run."""
_ORDER = (
    *("tier", "model", "backbone", "method", "block_size", "budget", "first_token", "variant"),
    *("selector", "selector_seed", "task", "seed"),
)


def tidy(store: Store, stage: str = "eval") -> pd.DataFrame:
    """One row a finished cell of a stage, sorted by setting.

    Each value comes from the cell's metrics or, failing that, from its key; what neither has is
    missing. Accuracies are percent (0-100) in metrics.json and here; budget is the nominal fraction
    as a string, "1" on dense rows, whose method is "dense"; budget_measured is the fraction that
    was attended or stored; effective_memory_length is in tokens; cell is the cell's id. variant
    is what else a method was set to (pooling, kernel, …) and what samples it saw, as text.

    Returns:
        COLUMNS then EXTRA, with one dtype a column (Int64, float64 or object), also when empty.
    """
    return _frame(_row(cell) for cell in store.cells(stage) if cell.done())


def sample_scores(store: Store, stage: str = "eval", **where: Any) -> pd.DataFrame:
    """One row a sample of the finished cells, for statistics that pair samples.

    Args:
        where: keep cells whose column of `tidy` has this value, or one of a list of values:
            `sample_scores(store, tier="pocket", task=["MK-1", "MK-2"])`.

    Returns:
        Columns cell, id, score_p2 and score_ruler (0 to 1), and all setting columns of `tidy`.
    """
    cells = {cell.id: cell for cell in store.cells(stage) if cell.done()}
    settings = select(_frame(map(_row, cells.values())), where)
    settings = settings.drop(columns=[*_FLOATS, "n"])
    scores = [
        (name, record["id"], record["score_p2"], record["score_ruler"])
        for name in settings["cell"]
        for record in cells[name].records().values()
    ]
    columns = ["cell", "id", "score_p2", "score_ruler"]
    return pd.DataFrame(scores, columns=columns).merge(settings, on="cell", validate="many_to_one")


def select(frame: pd.DataFrame, where: Mapping[str, Any]) -> pd.DataFrame:
    """Rows whose columns have the given value, or one of a list of values."""
    for column, wanted in where.items():
        if column not in frame:
            raise ValueError(f"no column {column!r} to select by; choose from {list(frame)}")
        values = wanted if isinstance(wanted, list | tuple | set) else [wanted]
        frame = frame[frame[column].isin(list(values))]
    return frame


def accuracies(records: Mapping[Any, Mapping[str, Any]]) -> dict[str, float]:
    """The means of `Cell.records()` that metrics.json must have: both scorers, in percent."""
    n = len(records)
    return {
        "accuracy": 100 * sum(record["score_p2"] for record in records.values()) / n,
        "accuracy_ruler": 100 * sum(record["score_ruler"] for record in records.values()) / n,
    }


def write_cells_csv(frame: pd.DataFrame, path: str | Path) -> Path:
    """Write a frame of `tidy` as CSV, atomically; missing values are empty."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, frame.to_csv(index=False, lineterminator="\n"))
    return path


def _row(cell: Cell) -> dict[str, Any]:
    found = {**cell.key, **cell.metrics(), "cell": cell.id, "variant": _variant(cell.key)}
    row: dict[str, Any] = {column: found.get(column) for column in (*COLUMNS, *EXTRA)}
    return row | {
        "selector_seed": row["selector_seed"] or 0,
        "backbone": LABELS.get(row["backbone"], row["backbone"]),
        "budget": str(row["budget"]),
    }


def _variant(key: Mapping[str, Any]) -> str:
    """Settings that have no column of their own, so that unlike cells never pass for one."""
    settings = key.get("settings", {})
    parts = [f"{k}={v}" for k, v in sorted(settings.items()) if k not in ("block_size", "top_k")]
    parts += [f"dtype={key['dtype']}"] if "dtype" in key else []
    if "data" in key:
        text = json.dumps(key["data"], sort_keys=True)
        parts.append(f"data={hashlib.sha256(text.encode()).hexdigest()[:6]}")
    return " ".join(parts)


def _frame(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(list(rows), columns=[*COLUMNS, *EXTRA], dtype=object)
    frame = frame.astype(dict.fromkeys(_INTEGERS, "Int64") | dict.fromkeys(_FLOATS, "float64"))
    return frame.sort_values(list(_ORDER), kind="stable", ignore_index=True)
