"""One page with all sections, as self-contained HTML and as Markdown."""

import base64
import re
from dataclasses import dataclass
from pathlib import Path

from ratplus_exp.report.prose import render
from ratplus_exp.report.table import Table
from ratplus_exp.store import write_atomically


@dataclass(frozen=True)
class Section:
    """A part of the page, in the order of its fields.

    words: paragraphs; points: items of a list; picture: a PNG file; code: collapsed text.
    """

    title: str
    words: tuple[str, ...] = ()
    points: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    picture: Path | None = None
    caption: str = ""
    code: str = ""

    def base64(self) -> str:
        """The picture."""
        assert self.picture is not None
        return base64.b64encode(self.picture.read_bytes()).decode()


def write_page(title: str, sections: list[Section], folder: Path, name: str) -> list[Path]:
    """Write name.html, which includes its pictures, and name.md, which links them."""
    html = render("page.html.j2", title=title, sections=sections)
    markdown = render("page.md.j2", title=title, sections=sections)
    markdown = re.sub(r"\n{3,}", "\n\n", markdown).strip() + "\n"
    pages = {f"{name}.html": html, f"{name}.md": markdown}
    for file, text in pages.items():
        write_atomically(folder / file, text)
    return [folder / file for file in pages]
