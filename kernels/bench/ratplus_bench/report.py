"""The bench on paper: bench.json, a table (bench.md) and a plot (bench.png).

A folder holds the bench of one device, measured by one run or by several, a part each. A run keeps
what it was: command, date, commit, versions and the rates that its floors are made of. Its rows
take the place of earlier runs' rows of the same suite, case and form.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ratplus_bench.timing import Machine, Row


class Run(NamedTuple):
    """Rows, and where they come from: device, versions, date, command, rates."""

    about: dict[str, Any]
    rows: list[Row]


def about_run(about: dict[str, Any], machine: Machine) -> dict[str, Any]:
    """about, as it stands in every result of the project, with what was measured of the device."""
    return about | {
        "dtype": str(machine.dtype).removeprefix("torch."),
        "dry": machine.dry,
        "copy_bytes_per_second": machine.bandwidth,
        "matmul_flop_per_second": machine.matmul,
    }


def read(folder: Path, about: dict[str, Any]) -> list[Run]:
    """Earlier runs in a folder; ValueError where they are not of the same device and kind."""
    path = folder / "bench.json"
    if not path.exists():
        return []
    runs = [Run(run.pop("about"), [Row(**row) for row in run["rows"]]) for run in _load(path)]
    for run in runs:
        for name in ("device", "dtype", "dry"):
            if run.about[name] != about[name]:
                raise ValueError(
                    f"{path} has {name}={run.about[name]} and this run {about[name]}: "
                    "remove it, or set another folder with --out"
                )
    return runs


def _load(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text())["runs"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a bench's: remove it, or set --out") from None


def merged(runs: Sequence[Run]) -> list[Run]:
    """The runs, oldest first, each without the rows that a later one measured again."""
    kept: list[Run] = []
    seen: set[tuple[str, str, str]] = set()
    for run in reversed(runs):
        rows = [row for row in run.rows if _key(row) not in seen]
        seen.update(map(_key, run.rows))
        if rows:
            kept.append(Run(run.about, rows))
    return kept[::-1]


def _key(row: Row) -> tuple[str, str, str]:
    return row.suite, row.case, row.form


def write(folder: Path, runs: Sequence[Run], plot: bool = True) -> None:
    """bench.json and bench.md of all runs, and the plot, where it is asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = merged(runs)
    record = {
        "fastest_plans": fastest_plans(runs),
        "runs": [{"about": run.about, "rows": [asdict(row) for row in run.rows]} for run in runs],
    }
    (folder / "bench.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "bench.md").write_text(markdown(runs))
    if plot and runs:
        rows = [row for row in _rows(runs) if not row.suite.endswith(PLANS)]
        _plot(folder / "bench.png", rows, runs[-1].about["device"])


PLANS = ": plans"  # ends the names of the suites whose forms are plans


def fastest_plans(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """The plan that took the least time, by suite and case."""
    best: dict[str, dict[str, Row]] = {}
    for row in _rows(runs):
        if row.suite.endswith(PLANS) and row.seconds:
            found = best.setdefault(row.suite, {})
            if row.case not in found or row.seconds < (found[row.case].seconds or 0):
                found[row.case] = row
    return {
        suite: {case: f"{row.form} {seconds(row.seconds)}" for case, row in cases.items()}
        for suite, cases in best.items()
    }


def _rows(runs: Sequence[Run]) -> list[Row]:
    """All rows, those of one case together. Where a later run was cut short in a case, its rows
    come first: they have the first form."""
    cases: dict[tuple[str, str], list[Row]] = {
        (row.suite, row.case): [] for run in runs for row in run.rows
    }
    for run in reversed(runs):
        for row in run.rows:
            cases[row.suite, row.case].append(row)
    return [row for case in cases.values() for row in case]


def markdown(runs: Sequence[Run]) -> str:
    lines = [f"# Bench on {runs[-1].about['device']}" if runs else "# Bench", ""]
    for about in (run.about for run in runs):
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        lines.append(
            f"- {about['date']}, commit {about['commit']}, `{about['command']}`: device copy "
            f"{about['copy_bytes_per_second'] / 1e12:.3g} TB/s, matrix product ({about['dtype']}) "
            f"{about['matmul_flop_per_second'] / 1e12:.3g} TFLOP/s; {versions}; "
            f"{about['threads']} CPU threads"
        )
    lines += [
        "",
        "Floor: the larger of bytes over the one rate and FLOPs over the other, both measured in "
        "the same run. × first: how many times the time of the case's first form. Error: relative "
        "to float64. Models run without CUDA graphs: where their GPU time, all kernels together, "
        "is well below the time, launches set it.",
    ]
    if any(run.about["dry"] for run in runs):
        lines += ["", "**A dry run on tiny shapes: its times mean nothing.**"]
    matmul = {_key(row): run.about["matmul_flop_per_second"] for run in runs for row in run.rows}
    rows = _rows(runs)
    for suite in dict.fromkeys(row.suite for row in rows):
        lines += ["", f"## {suite}", "", _HEADER, "|---|---|" + "---:|" * 8 + "---|"]
        mine = [row for row in rows if row.suite == suite]
        for case in dict.fromkeys(row.case for row in mine):
            lines += _table((row for row in mine if row.case == case), matmul)
    if plans := fastest_plans(runs):
        lines += ["", "## Fastest plans", ""]
        lines += [
            f"- {suite}, {case}: {plan}" for suite in plans for case, plan in plans[suite].items()
        ]
    return "\n".join(lines) + "\n"


_HEADER = (
    "| case | form | time | GB | GFLOP | floor | time / floor | × first | error | peak memory "
    "| note |"
)


def _table(rows: Iterable[Row], matmul: dict[tuple, float]) -> Iterable[str]:
    first = None
    for i, row in enumerate(rows):
        first = row.seconds if i == 0 else first
        cells = [
            row.case,
            row.form,
            seconds(row.seconds),
            f"{row.bytes / 1e9:.3g}" if row.bytes else "",
            f"{row.flops / 1e9:.3g}" if row.flops else "",
            seconds(row.floor),
            f"{row.seconds / row.floor:.2f}" if row.seconds and row.floor else "",
            f"{row.seconds / first:.2f}" if row.seconds and first else "",
            f"{row.error:.1e}" if row.error is not None else "",
            f"{row.peak_memory / 1e9:.2f} GB" if row.peak_memory is not None else "",
            note(row, matmul[_key(row)]).replace("|", "/"),
        ]
        yield "| " + " | ".join(cells) + " |"


def note(row: Row, matmul: float) -> str:
    """What a row says of itself, its GPU time, and how well it used the FLOPs that it did."""
    parts = [row.note] if row.note else []
    if row.gpu_seconds is not None:
        parts.append(f"GPU {seconds(row.gpu_seconds)}")
    if row.executed and row.seconds:
        share = row.executed / row.seconds / matmul
        parts.append(
            f"{row.executed / row.flops:.2f} × the FLOPs on the tiles it computes, "
            f"{share:.0%} of the matrix peak on them"
        )
    return "; ".join(parts)


def seconds(value: float | None) -> str:
    """A time with three digits and the unit that suits it."""
    if not value:
        return "—" if value is None else ""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"


def _plot(path: Path, rows: list[Row], device: str) -> None:
    """A panel a suite: time of every form over the suite's cases, and the floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    suites = list(dict.fromkeys(row.suite for row in rows if row.seconds))
    if not suites:
        return
    columns = min(2, len(suites))
    figure, panels = plt.subplots(
        -(-len(suites) // columns), columns, squeeze=False,
        figsize=(8 * columns, 4.5 * -(-len(suites) // columns)), layout="constrained",
    )  # fmt: skip
    for panel, suite in zip(panels.flat, suites, strict=False):
        mine = [row for row in rows if row.suite == suite]
        cases = list(dict.fromkeys(row.case for row in mine))
        for form in dict.fromkeys(row.form for row in mine):
            own = [row for row in mine if row.form == form and row.seconds]
            if own:
                panel.plot(*_line(cases, {r.case: r.seconds for r in own}), marker="o", label=form)
        floors = {row.case: row.floor for row in mine if row.floor}
        panel.plot(*_line(cases, floors), "k--", label="floor")
        panel.set_yscale("log")
        panel.set_ylabel("seconds")
        panel.set_xticks(range(len(cases)), cases, rotation=30, ha="right", fontsize=7)
        panel.set_title(suite, fontsize=10)
        panel.legend(fontsize=7)
    for panel in list(panels.flat)[len(suites) :]:
        panel.set_visible(False)
    figure.suptitle(device)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _line(cases: list[str], values: Mapping[str, float | None]) -> tuple[list[float], list[Any]]:
    """x and y of a curve over the cases, broken where more than the length T changes."""
    x: list[float] = []
    y: list[Any] = []
    shape: list[str] | None = None
    for place, case in enumerate(cases):
        others = [part for part in case.split() if not part.startswith("T=")]
        if shape is not None and shape != others:
            x, y = [*x, place - 0.5], [*y, float("nan")]
        shape = others
        if case in values:
            x, y = [*x, place], [*y, values[case]]
    return x, y
