"""Words: the papers' names, numbers as people read them, and the templates of all prose."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from ratplus_exp.analysis.bootstrap import Estimate

MISSING = "—"
METHODS = {"quest": "Quest", "moba": "MoBA", "snapkv": "SnapKV"}
"""The papers' names of the methods, in the paper's order."""
SELECTORS = {"random": "random", "topk": "top-k", "oracle": "oracle", "dense": "dense"}


def number(value: float | None, digits: int = 1, sign: str = "-") -> str:
    """A number as tables print it; sign "+" shows that of positive ones, too."""
    return MISSING if pd.isna(value) else f"{value:{sign}.{digits}f}".replace("-", "−")


def bounds(x: Estimate | Mapping[str, Any], digits: int = 1) -> str:
    """The interval of an estimate, or of a row with low and high."""
    low, high = (x.low, x.high) if isinstance(x, Estimate) else (x["low"], x["high"])
    return f"[{number(low, digits)}, {number(high, digits)}]"


def interval(x: Estimate, digits: int = 1, sign: str = "+") -> str:
    """A number with its interval."""
    if pd.isna(x.value):
        return MISSING
    return f"{number(x.value, digits, sign)} {bounds(x, digits)}"


def plus_minus(mean: float, std: float, digits: int = 1) -> str:
    """A mean with its deviation, where there is one."""
    return number(mean, digits) + ("" if pd.isna(std) else f"±{number(std, digits)}")


def span(values: pd.Series) -> str:
    """The one value of a column, or its smallest and largest."""
    if values.empty:
        return MISSING
    low, high = values.min(), values.max()
    return str(low) if low == high else f"{low}–{high}"


def setting_name(method: str, block: int, budget: str) -> str:
    """A setting in a sentence."""
    blocks = f" with block size {block}" if block > 1 else ""
    return f"{METHODS.get(method, method)} at {budget}{blocks}"


def trainings_of(frame: pd.DataFrame) -> list[int]:
    """The trainings of a frame, in order; templates say what they mean for its numbers."""
    return sorted(map(int, frame["training"].unique()))


def say(macro: str, /, **values: Any) -> str:
    """The text of a macro of prose.j2 in one line."""
    return " ".join(paragraphs(macro, **values))


def paragraphs(macro: str, /, **values: Any) -> tuple[str, ...]:
    """The same by paragraphs, which empty lines part."""
    text = str(getattr(_environment().get_template("prose.j2").module, macro)(**values))
    lines = (" ".join(part.split()) for part in text.split("\n\n"))
    return tuple(line for line in lines if line)


def render(template: str, **values: Any) -> str:
    """A template's text."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    """Where all templates are; those of HTML escape what is put into them."""
    found = Environment(
        loader=PackageLoader("ratplus_exp.report"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    latex = str.maketrans(_LATEX)
    found.filters |= {"number": number, "interval": interval, "bounds": bounds}
    found.filters["latex"] = lambda text: text.translate(latex)
    found.globals |= {"METHODS": METHODS, "MISSING": MISSING, "setting_name": setting_name}
    return found


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
