"""The report of the bench: bench.json, a table (bench.md) and a plot (bench.png).

A folder has the results of one device, from one run or from several runs of parts. Each run keeps
its provenance and the rates that set its floors. Its rows replace earlier rows of the same suite,
case and form.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from ratplus_bench.timing import PLANS, Row

CASE = ["suite", "case"]
COLUMNS = 3  # of panels in the plot


class Run(NamedTuple):
    """Rows, with their provenance, dtype, rates, and whether it was a dry run."""

    about: dict[str, Any]
    rows: list[Row]


def read(folder: Path, about: dict[str, Any]) -> list[Run]:
    """Earlier runs in a folder; ValueError where they are not of the same device and kind."""
    path = folder / "bench.json"
    if not path.exists():
        return []
    try:
        runs = json.loads(path.read_text())["runs"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a benchmark result: remove it, or set --out") from None
    for earlier, name in product((run["about"] for run in runs), ("device", "dtype", "dry")):
        if earlier[name] != about[name]:
            raise ValueError(
                f"{path} has {name}={earlier[name]} and this run {about[name]}: "
                "remove it, or set another folder with --out"
            )
    return [Run(run["about"], [Row(**row) for row in run["rows"]]) for run in runs]


def write(folder: Path, runs: Sequence[Run], plot: bool = True) -> None:
    """Write bench.json and bench.md of all runs, oldest first, and the plot if `plot`."""
    latest = {(x.suite, x.case, x.form): run for run in runs for x in run.rows}
    kept = [[x for x in run.rows if latest[x.suite, x.case, x.form] is run] for run in runs]
    runs = [Run(run.about, rows) for run, rows in zip(runs, kept, strict=True) if rows]
    record = {
        "fastest_plans": fastest_plans(runs),
        "runs": [{"about": run.about, "rows": [asdict(row) for row in run.rows]} for run in runs],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "bench.md").write_text(markdown(runs))
    if plot:
        _plot(folder / "bench.png", _frame(runs), runs[-1].about["device"])


def _frame(runs: Sequence[Run]) -> pd.DataFrame:
    """All rows, grouped by case, those of the latest run first. So the first row of a case is that
    of its first form, even if a run was cut short."""
    frame = pd.DataFrame(
        asdict(row) | {"run": i, "matmul": run.about["matmul_flop_per_second"]}
        for i, run in enumerate(runs)
        for row in run.rows
    )
    numbers = ["seconds", "floor", "bytes", "flops", "error", "gpu_seconds", "peak_memory"]
    frame[numbers] = frame[numbers].astype(float)
    frame["place"] = frame.groupby(CASE, sort=False).ngroup()
    return frame.sort_values(["place", "run"], ascending=[True, False], kind="stable")


def fastest_plans(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """The plan that took the least time, by suite and case."""
    frame = _frame(runs).dropna(subset="seconds")
    plans = frame[frame["suite"].str.endswith(PLANS)]
    best: dict[str, dict[str, str]] = {}
    for row in plans.loc[plans.groupby(CASE, sort=False)["seconds"].idxmin()].itertuples():
        best.setdefault(row.suite, {})[row.case] = f"{row.form} {seconds(row.seconds)}"
    return best


def markdown(runs: Sequence[Run]) -> str:
    lines = [f"# Bench on {runs[-1].about['device']}", ""]
    for about in (run.about for run in runs):
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        lines.append(
            f"- {about['date']}, commit {about['commit']}, `{about['command']}`: device copy "
            f"{about['copy_bytes_per_second'] / 1e12:.3g} TB/s, matrix product ({about['dtype']}) "
            f"{about['matmul_flop_per_second'] / 1e12:.3g} TFLOP/s; {versions}; "
            f"{about['threads']} CPU threads"
        )
    lines += ["", LEGEND]
    if any(run.about["dry"] for run in runs):
        lines += ["", "**A dry run on tiny shapes: its times mean nothing.**"]
    frame = _frame(runs)
    for suite, table in _table(frame).groupby(frame["suite"], sort=False):
        rule = ["---", "---", *["---:"] * (table.shape[1] - 3), "---"]
        lines += ["", f"## {suite}", "", _line(table.columns), f"|{'|'.join(rule)}|"]
        lines += map(_line, table.itertuples(index=False))
    if plans := fastest_plans(runs):
        lines += ["", "## Fastest plans", ""]
        lines += [f"- {suite}, {case}: {x}" for suite in plans for case, x in plans[suite].items()]
    return "\n".join(lines) + "\n"


LEGEND = (
    "Floor: the larger of bytes over the one rate and FLOPs over the other, both measured in the "
    "same run. × first: how many times the time of the case's first form. Error: relative to "
    "float64. Models run without CUDA graphs: where their GPU time, all kernels together, is well "
    "below the time, launches set it."
)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(frame: pd.DataFrame) -> pd.DataFrame:
    first = frame.groupby(CASE)["seconds"].transform(lambda times: times.iloc[0])

    def shown(column: pd.Series, form: str) -> pd.Series:
        return column.map(lambda x: "" if pd.isna(x) else form.format(x))

    return pd.DataFrame(
        {
            "case": frame["case"],
            "form": frame["form"],
            "time": frame["seconds"].map(seconds),
            "GB": shown(frame["bytes"].replace(0, math.nan) / 1e9, "{:.3g}"),
            "GFLOP": shown(frame["flops"].replace(0, math.nan) / 1e9, "{:.3g}"),
            "floor": frame["floor"].map(seconds),
            "time / floor": shown(frame["seconds"] / frame["floor"], "{:.2f}"),
            "× first": shown(frame["seconds"] / first, "{:.2f}"),
            "error": shown(frame["error"], "{:.1e}"),
            "peak memory": shown(frame["peak_memory"] / 1e9, "{:.2f} GB"),
            "note": [note(x, x.matmul).replace("|", "/") for x in frame.itertuples()],
        }
    )


def note(row: Any, matmul: float) -> str:
    """A row's note, its GPU time, and the share of the matrix peak that it reached."""
    parts = [row.note] if row.note else []
    if pd.notna(row.gpu_seconds):
        parts.append(f"GPU {seconds(row.gpu_seconds)}")
    if row.executed and row.seconds:
        parts.append(
            f"{row.executed / row.flops:.2f} × the FLOPs on the tiles it computes, "
            f"{row.executed / row.seconds / matmul:.0%} of the matrix peak on them"
        )
    return "; ".join(parts)


def seconds(value: float | None) -> str:
    """A time with three digits, in s, ms or µs."""
    if value is None or math.isnan(value):
        return "—"
    unit, size = next((x for x in (("s", 1.0), ("ms", 1e-3)) if value >= x[1]), ("µs", 1e-6))
    return f"{value / size:.3g} {unit}"


def slug(device: str) -> str:
    """A device's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _plot(path: Path, frame: pd.DataFrame, device: str) -> None:
    """One panel per suite: the time of every form in each case, and the floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    frame = frame[~frame["suite"].str.endswith(PLANS)].dropna(subset="seconds")
    suites = list(frame.groupby("suite", sort=False))
    if not suites:
        return
    height = math.ceil(len(suites) / COLUMNS)  # in panels
    figure, panels = plt.subplots(
        height, COLUMNS, squeeze=False, figsize=(7 * COLUMNS, 4 * height), layout="constrained"
    )
    for panel in panels.flat[len(suites) :]:
        panel.axis("off")
    for panel, (suite, rows) in zip(panels.flat, suites, strict=False):
        cases, forms = rows["case"].unique(), rows["form"].unique()
        times = rows.pivot(index="case", columns="form", values="seconds").loc[cases, forms]
        times["floor"] = rows.groupby("case")["floor"].first()
        style = [*["o"] * len(forms), "_"]
        colors = [*map(plt.get_cmap("tab20"), range(len(forms))), "black"]
        times.plot(ax=panel, style=style, color=colors, logy=True, xlabel="", ylabel="seconds")
        words = [case.split() for case in cases]
        shared = set.intersection(*map(set, words)) if len(cases) > 1 else set()
        labels = [" ".join(x for x in case if x not in shared) for case in words]
        panel.set_xticks(range(len(cases)), labels, rotation=20, ha="right", fontsize=7)
        panel.set_title(suite, fontsize=10)
        panel.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(device)
    figure.savefig(path, dpi=110)
    plt.close(figure)
