"""One page of everything, as self-contained HTML and as Markdown."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import NamedTuple

from ratplus_exp.results.files import write_atomically
from ratplus_exp.results.layout import Table


class Picture(NamedTuple):
    """A PNG file and its caption."""

    path: Path
    caption: str


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
    parts = [f"# {title}"]
    for section in sections:
        parts += [f"## {section.title}", *section.words]
        if section.points:
            parts.append("\n".join(f"- {point}" for point in section.points))
        for picture in section.pictures:
            parts += [f"![{_alt(section, picture)}]({picture.path.name})", picture.caption]
        parts += [table.to_markdown().rstrip() for table in section.tables]
        if section.code:
            parts.append(f"```yaml\n{section.code.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def to_html(title: str, sections: list[Section]) -> str:
    """A page that needs no other file and no network."""
    links = "".join(
        f'<li><a href="#s{i}">{escape(section.title)}</a></li>'
        for i, section in enumerate(sections)
    )
    body = "".join(_html_section(i, section) for i, section in enumerate(sections))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1><nav><ul>{links}</ul></nav>\n{body}</body></html>\n"
    )


def _html_section(index: int, section: Section) -> str:
    parts = [f'<section id="s{index}"><h2>{escape(section.title)}</h2>']
    parts += [f"<p>{escape(words)}</p>" for words in section.words]
    if section.points:
        points = "".join(f"<li>{escape(point)}</li>" for point in section.points)
        parts.append(f"<ul>{points}</ul>")
    for picture in section.pictures:
        data = base64.b64encode(picture.path.read_bytes()).decode()
        alt = escape(_alt(section, picture), quote=True)
        parts.append(
            f'<figure><img alt="{alt}" src="data:image/png;base64,{data}">'
            f"<figcaption class=c>{escape(picture.caption)}</figcaption></figure>"
        )
    parts += [_html_table(table) for table in section.tables]
    if section.code:
        parts.append(f"<details><summary>Show</summary><pre>{escape(section.code)}</pre></details>")
    return "\n".join([*parts, "</section>\n"])


def _html_table(table: Table) -> str:
    numbers = [table.is_number(i) for i in range(len(table.columns))]

    def line(cells: tuple[str, ...], tag: str, css: str = "") -> str:
        inner = "".join(
            f"<{tag}{' class=n' if number else ''}>{escape(cell)}</{tag}>"
            for cell, number in zip(cells, numbers, strict=True)
        )
        return f"<tr{css}>{inner}</tr>"

    header, *body = table.lines()
    rows = "\n".join(
        line(row, "td", " class=b" if i in table.breaks else "") for i, row in enumerate(body)
    )
    return (
        f"<h3>{escape(table.title)}</h3>\n<div class=t><table><thead>{line(header, 'th')}"
        f"</thead>\n<tbody>{rows}</tbody></table></div>\n<p class=c>{escape(table.caption)}</p>"
    )


def _alt(section: Section, picture: Picture) -> str:
    return f"{section.title}: {picture.path.stem}"


_STYLE = """
body{font:16px/1.55 system-ui,sans-serif;color:#1c1c1c;background:#fff;max-width:72rem;
margin:2rem auto;padding:0 1.2rem}
h1{font-size:1.7rem}h2{font-size:1.3rem;margin-top:2.6rem;border-bottom:1px solid #ddd}
h3{font-size:1rem;margin:1.6rem 0 .4rem}p,li{max-width:48rem}nav ul{columns:2;padding-left:1.2rem}
.t{overflow-x:auto}table{border-collapse:collapse;font-size:.82rem;white-space:nowrap}
th,td{padding:.18rem .5rem;text-align:left}.n{text-align:right;font-variant-numeric:tabular-nums}
thead th{border-top:2px solid #333;border-bottom:1px solid #333}tr.b td{border-top:1px solid #bbb}
tbody{border-bottom:2px solid #333}tbody tr:hover{background:#f4f4f0}
.c{font-size:.85rem;color:#444;max-width:60rem}img{max-width:100%}figure{margin:1rem 0}
pre{background:#f6f6f4;padding:.8rem;overflow-x:auto;font-size:.8rem}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}.c{color:#aaa}
tbody tr:hover,pre{background:#242424}img{background:#fff}a{color:#8ab4f8}
thead th{border-color:#999}}
""".replace("\n", "")
