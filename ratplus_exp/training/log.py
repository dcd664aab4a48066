"""log.jsonl of a training."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ratplus_exp.store import naming, write_atomically


class Log:
    """Rows with the means over the steps since the previous row.

    report: called with each row. peak: FLOP/s of all processes, for the MFU; None: unknown.
    seconds: of all rows, including those of earlier runs.
    """

    def __init__(
        self, file: Path, report: Callable[[dict[str, Any]], None], peak: float | None
    ) -> None:
        self.file, self.report, self.peak, self.seconds = file, report, peak, 0.0
        self.begin_row()

    def begin_row(self) -> None:
        self.values: dict[str, list[float]] = defaultdict(list)
        self.tokens, self.flops, self.start = 0, 0.0, time.perf_counter()

    def end_row(self, **state: float) -> dict[str, float]:
        """The row: means, the state after its last step, rates, and the MFU."""
        seconds = time.perf_counter() - self.start
        self.seconds += seconds
        row = {name: round(sum(x) / len(x), 5) for name, x in self.values.items()} | state
        row["tokens_per_second"] = round(self.tokens / seconds)
        row["seconds"] = round(self.seconds, 1)
        if self.peak:
            row["mfu"] = round(self.flops / seconds / self.peak, 4)
        self.begin_row()
        return row

    def write(self, row: dict[str, Any]) -> None:
        with naming(self.file), self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.report(row)

    def drop_after(self, step: int) -> None:
        """Drop incomplete rows, and rows of later steps, which will be repeated."""
        if self.file.exists():
            lines = self.file.read_text("utf-8", errors="replace").splitlines(keepends=True)
            write_atomically(self.file, "".join(x for x in lines if _step_of(x) <= step))


def _step_of(line: str) -> float:
    """The step of a row; infinite for an incomplete one."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf
