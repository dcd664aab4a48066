"""Tables as terminal text, Markdown, CSV and LaTeX."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import tabulate

from ratplus_exp.report.prose import METHODS, MISSING, cell_text, paragraphs
from ratplus_exp.store import write_atomically

WIDTH = 120  # characters of a terminal's line
tabulate.MIN_PADDING = 0  # otherwise headers are two characters wider
_ROW, _RULE = tabulate.DataRow("", " ", ""), tabulate.Line("", "-", " ", "")
_NARROW = tabulate.TableFormat(
    None, _RULE, None, None, _ROW, _ROW, padding=0, with_header_hide=None
)
_ESCAPES = str.maketrans(dict(tabulate.LATEX_ESCAPE_RULES))
_SYMBOLS = str.maketrans(
    {"[": "{[}", "—": "---", "–": "--", "−": "$-$", "±": r"$\pm$", "Δ": r"$\Delta$", "ρ": r"$\rho$"}
)


@dataclass(frozen=True)
class Table:
    """A table of strings.

    rows: one string a column each; MISSING for a missing number, "" where none is expected.
    breaks: indices of the rows that start a new group.
    text_hides: columns that `to_text` leaves out.
    """

    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    breaks: frozenset[int] = frozenset()
    text_hides: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), "one string a column"

    @classmethod
    def described(
        cls,
        macro: str,
        columns: Sequence[str],
        rows: Sequence[tuple[Any, ...]],
        group: int = 1,
        hide: Iterable[str] = (),
        **values: Any,
    ) -> Table:
        """A table with title and caption from a macro of prose.j2, formatted with `values`. rows:
        of what `cell_text` takes; group: those with the same first columns, of this number, are
        one group (0: no groups)."""
        texts = tuple(tuple(map(cell_text, row)) for row in rows)
        pairs = enumerate(pairwise(texts), start=1)
        breaks = frozenset(i for i, (above, row) in pairs if above[:group] != row[:group])
        title, caption = paragraphs(macro, **values)
        return cls(title, caption, tuple(columns), texts, breaks, frozenset(hide))

    def lines(self) -> list[tuple[str, ...]]:
        """The columns' names, then the rows, with the papers' names of the methods."""
        frame = pd.DataFrame(self.rows, columns=self.columns)
        for column in {"Method", "Methods"} & {*self.columns}:
            frame[column] = frame[column].replace(METHODS)
        return [self.columns, *frame.itertuples(index=False, name=None)]

    def without(self, columns: Container[str]) -> Table:
        """The table without some of its columns."""
        kept = [i for i, name in enumerate(self.columns) if name not in columns]
        rows = tuple(tuple(row[i] for i in kept) for row in self.rows)
        return replace(self, columns=tuple(self.columns[i] for i in kept), rows=rows)

    def align(self) -> str:
        """For each column "r" if it has numbers, else "l"."""
        columns = ([row[i] for row in self.rows] for i in range(len(self.columns)))
        return "".join("r" if _numbers(column) else "l" for column in columns)

    def formatted(self, form: str | tabulate.TableFormat, breaks: bool = True) -> str:
        """Columns and rows in a format of tabulate."""
        header, *rows = self.lines()
        for i in sorted(self.breaks if breaks else (), reverse=True):
            rows.insert(i, tabulate.SEPARATING_LINE)
        sides = ["right" if side == "r" else "left" for side in self.align()]
        return tabulate.tabulate(rows, header, form, disable_numparse=True, colalign=sides)

    def to_text(self) -> str:
        """For a terminal; two spaces between columns if that fits in WIDTH, else one."""
        shown = self.without(self.text_hides)
        body = shown.formatted("simple")
        if len(body.splitlines()[1]) > WIDTH:
            body = shown.formatted(_NARROW)
        rule = "-" * len(body.splitlines()[1])
        caption = textwrap.fill(self.caption, max(len(rule), 60))
        return "\n".join([self.title, rule, body, rule, caption]) + "\n"

    def to_markdown(self) -> str:
        """A GitHub table under its title, the caption below."""
        columns, *rows = (
            tuple(cell.replace("|", r"\|") for cell in row) for row in (self.columns, *self.rows)
        )
        escaped = replace(self, columns=columns, rows=tuple(rows))
        body = escaped.formatted("pipe", breaks=False)
        return f"### {self.title}\n\n{body}\n\n{self.caption}\n"

    def to_latex(self) -> str:
        """A table* float; the document needs the booktabs package."""
        caption = f"{self.title}. {self.caption}".translate(_ESCAPES)
        text = (
            f"\\begin{{table*}}\n\\caption{{{caption}}}\n"
            "\\centering\\footnotesize\\setlength{\\tabcolsep}{3pt}\n"
            f"{self.formatted('latex_booktabs')}\n\\end{{table*}}\n"
        )
        return text.translate(_SYMBOLS)

    def to_csv(self) -> str:
        """Header and rows with ASCII minus signs and the methods' configured names; no caption."""
        frame = pd.DataFrame(self.rows, columns=self.columns)
        return frame.replace("−", "-", regex=True).to_csv(index=False, lineterminator="\n")

    def write(self, folder: str | Path, name: str) -> Table:
        """Write name.md, name.csv and name.tex, each atomically; returns the table."""
        texts = {"md": self.to_markdown(), "csv": self.to_csv(), "tex": self.to_latex()}
        Path(folder).mkdir(parents=True, exist_ok=True)
        for kind, text in texts.items():
            write_atomically(Path(folder, f"{name}.{kind}"), text)
        return self


def _numbers(column: Sequence[str]) -> bool:
    return all(re.match(r"\[?[+−]?\d", cell) for cell in column if cell not in ("", MISSING))
