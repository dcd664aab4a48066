"""The store as tidy frames: one row per finished cell, or one row per sample of finished cells."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pandas as pd

from ratplus_exp import tasks
from ratplus_exp.store import Cell, Finished, Store, warn

BACKBONES = ("Attention", "RAT+")
TASKS, ALL_TASKS = tuple(tasks.TASKS), tuple(tasks.RULER_NAMES)
"""The paper's, and all of RULER's."""
SCORERS = ("exact", "substring")
"""Shares of gold values, in samples (0 to 1), metrics and frames (percent): among the
comma-separated parts of the answer (the RAT+ paper's), or anywhere in it (RULER's)."""
LABELS = {"attention": "Attention", "ratplus": "RAT+"}  # the paper's names of the backbones
SETTING = ["method", "block_size", "budget"]
DENSE = ("dense", 1, "1", "dense")  # the setting and selector of dense attention
GROUP = [*SETTING, "selector", "backbone"]
"""Cells that are equal in these columns differ in task, training and seeds alone."""
COLUMNS = (
    *("backbone", "training", "method", "block_size", "budget", "budget_measured", "selector"),
    *("task", "seed", "n", *SCORERS),
    *("model", "checkpoint", "top_k", "first_token", "selector_seed", "variant"),
    *("context_length", "effective_memory_length", "gate_mean", "tier", "cell"),
)
_INTEGERS = ("training", "block_size", "seed", "selector_seed", "n", "top_k", "context_length")
_FLOATS = ("budget_measured", *SCORERS, "effective_memory_length", "gate_mean")
_ORDER = (
    *("tier", "model", "backbone", "training", "method", "block_size", "budget", "first_token"),
    *("variant", "selector", "selector_seed", "task", "seed"),
)

COMMON = ("dtype", "rope", "data")  # parts of a variant that are not of the method

FIELDS: dict[str, dict[str, Any]] = {  # of a stage's samples, for `sample_scores`
    "eval": dict.fromkeys(SCORERS, int | float),
    "hit_rate": {"hits": list, "values": int},
}
Cells = Store | Iterable[Cell | Finished]


class LeftOut(ValueError):
    """A table or figure can't be made: no finished cell fits it, or several fit one place."""


def backbones_of(frame: pd.DataFrame, column: str = "backbone") -> list[str]:
    """The backbones that were measured: tables have no empty rows of the other one."""
    return [backbone for backbone in BACKBONES if backbone in set(frame[column])]


def finished(cells: Cells, stage: str) -> list[Finished]:
    """The finished cells of a stage, read unless they are already. A cell with a value of a wrong
    type is left out with a warning."""
    listed = cells.cells(stage) if isinstance(cells, Store) else cells
    read = (x if isinstance(x, Finished) else x.finished() for x in listed)
    return [x for x in read if x and x.cell.key["stage"] == stage and _is_valid(x)]


def all_finished(cells: Collection[Cell], stage: str) -> list[Finished]:
    """`finished` of cells that are; ValueError if some have values of a wrong type."""
    read = finished(cells, stage)
    if len(read) < len(cells):
        raise ValueError(
            f"{len(cells) - len(read)} of the cells have invalid values: delete the folders that "
            "the warnings name, and run this again"
        )
    return read


def tidy(cells: Cells, stage: str = "eval") -> pd.DataFrame:
    """One row per finished cell of a stage, sorted by setting.

    Values are those of the cell's metrics or else of its key. Accuracies are percent; budget is the
    nominal fraction as a string ("1" for method "dense"), budget_measured the fraction attended or
    stored; effective_memory_length is in tokens; variant is a text of a method's other settings and
    of the data.

    Returns:
        COLUMNS, with one dtype a column (Int64, float64 or object), also when empty.
    """
    rows = [_row(x) for x in finished(cells, stage)]
    frame = pd.DataFrame(rows, columns=COLUMNS, dtype=object)
    frame = frame.astype(dict.fromkeys(_INTEGERS, "Int64") | dict.fromkeys(_FLOATS, "float64"))
    return frame.sort_values(list(_ORDER), kind="stable", ignore_index=True)


def sample_scores(cells: Cells, stage: str = "eval", **where: Any) -> pd.DataFrame:
    """One row per sample of the finished cells, for statistics that pair samples.

    where: for `select`, as in `sample_scores(store, tier="pocket", task=["MK-1", "MK-2"])`.

    Returns:
        Columns cell, id, the scorers (0 to 1) and the setting columns of `tidy`; of stage
        "hit_rate", instead of scorers, hits (gold values hit, an array over layers and heads) and
        values (their number).
    """
    by_id = {x.cell.id: x for x in finished(cells, stage)}
    settings = select(tidy(by_id.values(), stage), where).drop(columns=[*_FLOATS, "n"])
    fields = tuple(FIELDS[stage])
    rows = [
        (name, i, *(record[field] for field in fields))
        for name in settings["cell"]
        for i, record in by_id[name].records.items()
    ]
    frame = pd.DataFrame(rows, columns=["cell", "id", *fields])
    return frame.merge(settings, on="cell", validate="many_to_one")


def select(frame: pd.DataFrame, where: Mapping[str, Any]) -> pd.DataFrame:
    """Rows whose columns have the given value, or one of a list of values.

    A part of the variants (dtype, data, a method's setting) can stand for a column. Rows whose
    method lacks the setting stay; a missing one of COMMON counts as "none".
    """
    for column, value in where.items():
        values = [*value] if isinstance(value, list | tuple | set) else [value]
        if column in frame:
            frame = frame[frame[column].isin(values)]
            continue
        if len(frame) and column not in parts_of_variants(frame):
            raise ValueError(f"no column {column!r} to select by; choose from {list(frame)}")
        parts = part_of_variant(frame, column)
        chosen = parts.fillna("none").isin([*map(str, values)])
        frame = frame[chosen if column in COMMON else chosen | parts.isna()]
    return frame


def parts_of_variants(frame: pd.DataFrame) -> set[str]:
    """The names in the variants of a frame."""
    if "variant" not in frame:
        return set()
    return set(frame["variant"].str.findall(r"\b(\w+)=").explode().dropna())


def part_of_variant(frame: pd.DataFrame, name: str) -> pd.Series:
    """The value of name in each row's variant, NaN without it."""
    found = frame["variant"].str.extract(rf"\b{re.escape(name)}=(.*?)(?: \w+=|$)")
    return found[0].astype(object)


def accuracies(records: Mapping[Any, Mapping[str, Any]]) -> dict[str, float]:
    """The mean of every scorer over `Cell.records()`, in percent, for metrics.json."""
    count = len(records)
    return {name: 100 * sum(r[name] for r in records.values()) / count for name in SCORERS}


def grouped(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with a value in every column of GROUP: block size 1 for methods that select tokens
    and for dense attention, whose selector is "dense"."""
    dense = frame["method"] == "dense"
    return frame.assign(
        block_size=frame["block_size"].fillna(1).mask(dense, 1).astype(int),
        selector=frame["selector"].mask(dense, "dense"),
    )


def _row(read: Finished) -> dict[str, Any]:
    cell = read.cell
    values = {**cell.key, **read.metrics, "cell": cell.id, "variant": _variant(cell.key)}
    row: dict[str, Any] = {column: values.get(column) for column in COLUMNS}
    return row | {
        "training": row["training"] or 0,
        "selector_seed": row["selector_seed"] or 0,
        "backbone": LABELS.get(row["backbone"], row["backbone"]),
        "budget": str(row["budget"]),
    }


def _is_valid(read: Finished) -> bool:
    """Whether all values of a cell have their types; a warning names a file with others."""
    row, stage = _row(read), read.cell.key["stage"]
    integers, floats = ([row[name] or 0 for name in names] for names in (_INTEGERS, _FLOATS))
    valid = {
        "config.json": isinstance(row["method"], str)
        and all(isinstance(number, int) and abs(number) < 2**63 for number in integers),
        "metrics.json": all(isinstance(number, int | float) for number in floats)
        and (stage != "hit_rate" or isinstance(read.metrics.get("hit_rate"), list)),
        "samples.jsonl": all(
            isinstance(record.get(name), kind)
            for record in read.records.values()
            for name, kind in FIELDS.get(stage, {}).items()
        ),
    }
    for name in (name for name, is_valid in valid.items() if not is_valid):
        warn(f"{read.cell.path / name} has an invalid value: delete its folder")
    return all(valid.values())


def _variant(key: Mapping[str, Any]) -> str:
    """Settings without a column, to tell different cells apart."""
    settings = key.get("settings", {})
    parts = [f"{k}={v}" for k, v in sorted(settings.items()) if k not in ("block_size", "top_k")]
    parts += [f"{name}={key[name]}" for name in ("dtype", "rope") if name in key]
    if "target" in key:
        parts.append(f"target={'+'.join(key['target'])}")
    if "question" in key:
        parts.append(f"question={hashlib.sha256(key['question'].encode()).hexdigest()[:6]}")
    if "data" in key:
        text = json.dumps(key["data"], sort_keys=True)
        parts.append(f"data={hashlib.sha256(text.encode()).hexdigest()[:6]}")
    return " ".join(parts)
