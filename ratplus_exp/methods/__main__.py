"""`python -m ratplus_exp.methods` prints docs/methods.md from the classes of conf/method."""

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
CONF = ROOT / "conf" / "method"
AGREEMENT = list(csv.DictReader((ROOT / "docs/kvpress.csv").open()))
KVPRESS = re.findall("^kvpress==(.*)", (ROOT / "constraints-kvpress.txt").read_text(), re.M)[0]
BUDGETS = {  # by phase
    "decode": "read at a decoding step",
    "prefill": "read by a query of the prompt",
    "once": "stored after the prompt",
    "step": "stored at every step",
}
TEXT = """# Methods

Made from the classes by `python -m ratplus_exp.methods > docs/methods.md`. Each runs as
`method=NAME`, on any backbone, at any budget. The common terms: the budget is the fraction of the
context that is read or stored; there are no dense first layers and no floors beside it; methods
that read choose for each query head, methods that evict for each KV head.

    python run.py method=tova budget=1/8
    make methods      # all of them on both backbones, one table and one figure

The pocket pair, 10 examples a task: [table](../outputs/reference/pocket/methods/methods.md),
[figure](../outputs/reference/pocket/methods/methods.png).

A cell's metrics have three fractions. `budget_measured` is what was read or stored;
`choosing_measured` is what choosing read beside that, in bytes of all keys and values: the
representatives of all candidates and the indices of the chosen ones; `slots_measured` is what the
cache allocates, where heads that keep fewer tokens have as many slots as the head that keeps most.

"""
DETAILS = "\n\n## Details, and where an original differs\n\n"
WITH_KVPRESS = f"""
## Agreement with kvpress {KVPRESS}

Both keep 64 of the same 256 random tokens, with a window of 16, in four layers of 8 query heads on
2 and on 8 KV heads (tests/methods/test_kvpress.py, after `make kvpress`). A set is what a KV head
keeps right after the prompt; the common tokens are a share of ours. kvpress has no other method of
this page.

"""


def page() -> str:
    """The table of methods, and notes on where each differs from its original."""
    names = ("Name", "Rule", "Unit", "Phase", "Budget", "Choosing reads", "Paper")
    rows, notes = [names, ("---",) * len(names)], []
    files: Any = (OmegaConf.load(file) for file in CONF.glob("*.yaml"))
    classes: list[tuple[str, Any]] = [(file.name, resolve_name(file.target)) for file in files]
    for name, cls in sorted(classes, key=lambda pair: pair[0]):
        rule, _, note = inspect.cleandoc(cls.__doc__).partition("\n\n")
        budget = BUDGETS.get(cls.phase, "–" if cls.pattern is Method.pattern else "seen throughout")
        unit = cls.unit if cls.phase else "pattern" if cls.pattern is not Method.pattern else "–"
        rows.append((name, rule, unit, cls.phase or "–", budget, cls.reads, cls.paper))
        notes.append(f"**{name}**: " + note)
    details = "\n\n".join(" ".join(note.split()) for note in notes if not note.endswith(": "))
    titles = ("Method", "Fields", "kvpress", "Equal sets, %", "Common tokens, %", "Difference")
    agreement = [titles, ("---",) * 6, *(tuple(row.values()) for row in AGREEMENT)]
    return TEXT + _table(rows) + DETAILS + details + "\n" + WITH_KVPRESS + _table(agreement) + "\n"


def _table(rows: Iterable[Iterable[str]]) -> str:
    cells = ((" ".join(cell.split()).replace("|", "\\|") for cell in row) for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


if __name__ == "__main__":
    print(page(), end="")
