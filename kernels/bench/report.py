"""One run of the bench on paper: bench.json, a table (bench.md) and a plot (bench.png)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kernels.bench.timing import Machine, Row


def write(
    folder: Path, rows: list[Row], machine: Machine, about: dict[str, Any], plot: bool = True
) -> None:
    """about: device, versions, date and command, as they stand in every result of the project."""
    folder.mkdir(parents=True, exist_ok=True)
    record = about | {
        "dtype": str(machine.dtype).removeprefix("torch."),
        "dry": machine.dry,
        "copy_bytes_per_second": machine.bandwidth,
        "matmul_flop_per_second": machine.matmul,
        "rows": [asdict(row) for row in rows],
    }
    (folder / "bench.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "bench.md").write_text(markdown(rows, machine, about))
    if plot:
        _plot(folder / "bench.png", rows, about["device"])


def markdown(rows: list[Row], machine: Machine, about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"# Bench on {about['device']}",
        "",
        f"{about['date']}, commit {about['commit']}, `{about['command']}`",
        f"{versions}; {about['threads']} CPU threads",
        "",
        f"Measured here: device copy {machine.bandwidth / 1e12:.3g} TB/s, matrix product "
        f"({str(machine.dtype).removeprefix('torch.')}) {machine.matmul / 1e12:.3g} TFLOP/s. "
        "Floor: the larger of bytes over the one and FLOPs over the other. × first: how many times "
        "the time of the case's first form. Error: relative to float64.",
    ]
    if machine.dry:
        lines += ["", "**A dry run on tiny shapes: its times mean nothing.**"]
    for suite in dict.fromkeys(row.suite for row in rows):
        lines += ["", f"## {suite}", "", _HEADER, "|---|---|" + "---:|" * 8 + "---|"]
        mine = [row for row in rows if row.suite == suite]
        for case in dict.fromkeys(row.case for row in mine):
            lines += _table(row for row in mine if row.case == case)
    return "\n".join(lines) + "\n"


_HEADER = (
    "| case | form | time | GB | GFLOP | floor | time / floor | × first | error | peak memory "
    "| note |"
)


def _table(rows: Iterable[Row]) -> Iterable[str]:
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
            row.note.replace("|", "/"),
        ]
        yield "| " + " | ".join(cells) + " |"


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
            points = [(cases.index(row.case), row.seconds) for row in own]
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", label=form)
        floors = {cases.index(row.case): row.floor for row in mine if row.floor}
        panel.plot(list(floors), list(floors.values()), "k--", label="floor")
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
