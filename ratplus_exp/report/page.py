"""One page of everything, as self-contained HTML and as Markdown."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ratplus_exp.report.prose import render
from ratplus_exp.report.table import Table
from ratplus_exp.store import write_atomically


class Picture(NamedTuple):
    """A PNG file and its caption."""

    path: Path
    caption: str

    def base64(self) -> str:
        return base64.b64encode(self.path.read_bytes()).decode()


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        words: paragraphs before the tables and pictures.
        points: a list of sentences after the words.
        pictures: PNG files with what stands under them.
        code: text to show as it is, folded away.
    """

    title: str
    words: tuple[str, ...] = ()
    points: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    code: str = ""


def write_page(title: str, sections: list[Section], folder: Path, name: str) -> list[Path]:
    """Write name.html, with its pictures inside, and name.md, with links to them."""
    pages = {f"{name}.html": to_html(title, sections), f"{name}.md": to_markdown(title, sections)}
    for file, text in pages.items():
        write_atomically(folder / file, text)
    return [folder / file for file in pages]


def to_markdown(title: str, sections: list[Section]) -> str:
    """Pictures are linked by file name, so they belong beside the file."""
    text = render("page.md.j2", title=title, sections=sections)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def to_html(title: str, sections: list[Section]) -> str:
    """A page that needs no other file and no network."""
    return render("page.html.j2", title=title, sections=sections)
