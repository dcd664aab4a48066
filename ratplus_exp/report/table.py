"""How any table is written: terminal text, Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from ratplus_exp.report.prose import METHODS, MISSING
from ratplus_exp.store import write_atomically


@dataclass(frozen=True)
class Table:
    """A table of strings, ready to be read.

    Attributes:
        rows: one string a column each; MISSING where there is no number, "" where none belongs.
        breaks: indices of the rows that start a new group.
        text_hides: columns that `to_text` leaves out to stay narrow.
    """

    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    breaks: frozenset[int] = frozenset()
    text_hides: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), "one string a column"

    def lines(self) -> list[tuple[str, ...]]:
        """The columns' names, then the rows as people read them: with the methods' proper names."""
        named = [name in ("Method", "Methods") for name in self.columns]
        return [
            self.columns,
            *(
                tuple(
                    METHODS.get(cell, cell) if name else cell
                    for cell, name in zip(row, named, strict=True)
                )
                for row in self.rows
            ),
        ]

    def without(self, columns: Container[str]) -> Table:
        """The table without some of its columns."""
        kept = [i for i, name in enumerate(self.columns) if name not in columns]
        rows = tuple(tuple(row[i] for i in kept) for row in self.rows)
        return replace(self, columns=tuple(self.columns[i] for i in kept), rows=rows)

    def to_text(self, width: int = 120) -> str:
        """For a terminal; tighter where it would not fit in `width` characters."""
        shown = [i for i, name in enumerate(self.columns) if name not in self.text_hides]
        lines = [[line[i] for i in shown] for line in self.lines()]
        sizes = [max(map(len, column)) for column in zip(*lines, strict=True)]
        numbers = [self.is_number(i) for i in shown]
        gap = "  " if sum(sizes) + 2 * (len(sizes) - 1) <= width else " "
        rule = "─" * (sum(sizes) + len(gap) * (len(sizes) - 1))

        text = [self.title, rule]
        for i, line in enumerate(lines, start=-1):  # the header is row -1
            if i == 0 or i in self.breaks:
                text.append(rule)
            padded = (
                cell.rjust(size) if number else cell.ljust(size)
                for cell, size, number in zip(line, sizes, numbers, strict=True)
            )
            text.append(gap.join(padded).rstrip())
        return "\n".join([*text, rule, textwrap.fill(self.caption, max(len(rule), 60))]) + "\n"

    def to_markdown(self) -> str:
        """A GitHub table under its title, the caption below."""
        header, *rows = self.lines()
        marks = ["---:" if self.is_number(i) else "---" for i in range(len(self.columns))]
        lines = [
            "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |"
            for line in (header, marks, *rows)
        ]
        return "\n".join([f"### {self.title}", "", *lines, "", self.caption]) + "\n"

    def to_csv(self) -> str:
        """Header and rows with ASCII minus signs and the methods' configured names; no caption."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([cell.replace("−", "-") for cell in row] for row in self.rows)
        return file.getvalue()

    def to_latex(self) -> str:
        """A table* float; the document needs the booktabs package."""
        align = "".join("r" if self.is_number(i) else "l" for i in range(len(self.columns)))
        header, *rows = (" & ".join(map(escape_latex, line)) + r" \\" for line in self.lines())
        lines = [
            r"\begin{table*}",
            rf"\caption{{{escape_latex(f'{self.title}. {self.caption}')}}}",
            r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
            rf"\begin{{tabular}}{{{align}}}",
            r"\toprule",
            header,
            r"\midrule",
        ]
        for i, row in enumerate(rows):
            lines += [r"\midrule", row] if i in self.breaks else [row]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table*}"]) + "\n"

    def write(self, folder: str | Path, name: str) -> list[Path]:
        """Write name.md, name.csv and name.tex, each atomically; returns their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        texts = {
            f"{name}.md": self.to_markdown(),
            f"{name}.csv": self.to_csv(),
            f"{name}.tex": self.to_latex(),
        }
        for file, text in texts.items():
            write_atomically(folder / file, text)
        return [folder / file for file in texts]

    def is_number(self, column: int) -> bool:
        """Whether a column holds numbers, which are aligned to the right."""
        cells = [row[column] for row in self.rows if row[column] not in ("", MISSING)]
        return all(re.match(r"\[?[+−]?\d", cell) for cell in cells)


def breaks(rows: Sequence[Sequence[str]], columns: int = 1) -> frozenset[int]:
    """The rows that differ from the one above in their first columns."""
    pairs = enumerate(pairwise(rows), start=1)
    return frozenset(i for i, (above, row) in pairs if above[:columns] != row[:columns])


def escape_latex(text: str) -> str:
    """Text such that LaTeX prints it as it is."""
    return "".join(_LATEX.get(character, character) for character in text)


_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "[": "{[}",  # else an option of the \\ before it
    "—": "---",
    "–": "--",
    "−": "$-$",
    "±": r"$\pm$",
    "Δ": r"$\Delta$",
}
