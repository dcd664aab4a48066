"""`python -m ratplus_exp.methods` makes the tables and notes of docs/methods.md from the classes of
conf/method, and does not change its other text."""

import csv
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from omegaconf import OmegaConf

from ratplus_exp.methods import Method

ROOT = Path(__file__).parents[2]
CONF, PAGE = ROOT / "conf" / "method", ROOT / "docs" / "methods.md"
AGREEMENT = list(csv.DictReader((ROOT / "docs/kvpress.csv").open()))
KVPRESS = re.findall("^kvpress==(.*)", (ROOT / "constraints-kvpress.txt").read_text(), re.M)[0]
BUDGETS = {  # by phase
    "decode": "read at a decoding step",
    "prefill": "read by a query of the prompt",
    "once": "stored after the prompt",
    "step": "stored at every step",
}


def page() -> str:
    """The page, up to date."""
    names = ("Name", "Rule", "Unit", "Phase", "Budget", "Choosing reads", "Paper")
    rows, notes = [names, ("---",) * len(names)], []
    files: Any = (OmegaConf.load(file) for file in CONF.glob("*.yaml"))
    classes: list[tuple[str, Any]] = [(file.name, resolve_name(file.target)) for file in files]
    for name, cls in sorted(classes, key=lambda pair: pair[0]):
        rule, _, note = inspect.cleandoc(cls.__doc__).partition("\n\n")
        budget = BUDGETS.get(cls.phase, "–" if cls.pattern is Method.pattern else "seen throughout")
        unit = cls.unit if cls.phase else "pattern" if cls.pattern is not Method.pattern else "–"
        rows.append((name, rule, unit, cls.phase or "–", budget, cls.reads, cls.paper))
        notes += [f"**{name}**: {' '.join(note.split())}"] if note else []
    titles = ("Method", "Fields", "kvpress", "Equal sets, %", "Common tokens, %", "Difference")
    agreement = [titles, ("---",) * 6, *(tuple(row.values()) for row in AGREEMENT)]
    # A table follows the text of its section, notes are the whole of theirs.
    top, details, kvpress = PAGE.read_text().split("\n## ")
    top = top[: top.index("\n| ") + 1] + _table(rows)
    details = "\n\n".join((details.split("\n")[0], *notes))
    kvpress = re.sub(r"kvpress [\d.]+", f"kvpress {KVPRESS}", kvpress[: kvpress.index("\n| ") + 1])
    return "\n\n## ".join((top, details, kvpress + _table(agreement))) + "\n"


def _table(rows: Iterable[Iterable[str]]) -> str:
    cells = ((" ".join(cell.split()).replace("|", "\\|") for cell in row) for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


if __name__ == "__main__":
    PAGE.write_text(page())
