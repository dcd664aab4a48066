"""Text: the papers' names, formatted numbers, and the templates of all prose."""

from functools import cache
from numbers import Integral
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from ratplus_exp.analysis.bootstrap import Estimate

MISSING = "—"
METHODS = {"quest": "Quest", "moba": "MoBA", "snapkv": "SnapKV"}
"""The papers' names of the methods, in the paper's order."""
SELECTORS = {"random": "random", "topk": "top-k", "oracle": "oracle", "dense": "dense"}


def number(value: float | None, digits: int = 1, sign: str = "-") -> str:
    """A number as tables print it; sign "+" also marks positive ones."""
    return MISSING if pd.isna(value) else f"{value:{sign}.{digits}f}".replace("-", "−")


def bounds(x: Estimate, digits: int = 1) -> str:
    """The interval of an estimate."""
    return MISSING if pd.isna(x.value) else f"[{number(x.low, digits)}, {number(x.high, digits)}]"


def interval(x: Estimate, digits: int = 1, sign: str = "+") -> str:
    """A number with its interval."""
    return MISSING if pd.isna(x.value) else f"{number(x.value, digits, sign)} {bounds(x, digits)}"


def plus_minus(mean: float, std: float) -> str:
    """A mean with its deviation, if there is one."""
    return number(mean) + ("" if pd.isna(std) else f"±{number(std)}")


def span(values: pd.Series) -> str:
    """The smallest and largest value of a column."""
    low, high = (MISSING, MISSING) if values.empty else (values.min(), values.max())
    return str(low) if low == high else f"{low}–{high}"


def cell_text(value: str | float | Estimate | None) -> str:
    """A table's cell: text, a number or an estimate with its interval."""
    if isinstance(value, Estimate):
        return interval(value)
    return str(value) if isinstance(value, str | Integral) else number(value)


def setting_name(method: str, block: int, budget: str, selector: str = "topk") -> str:
    """A setting in a sentence."""
    if method == "dense":
        return "dense attention"
    blocks = f" with block size {block}" if block > 1 else ""
    chosen = "" if selector == "topk" else f", {SELECTORS.get(selector, selector)} selection"
    return f"{METHODS.get(method, method)} at {budget}{blocks}{chosen}"


def sentence(macro: str, /, *args: Any, **values: Any) -> str:
    """The text of a macro of prose.j2 in one line."""
    return " ".join(paragraphs(macro, *args, **values))


def paragraphs(macro: str, /, *args: Any, **values: Any) -> tuple[str, ...]:
    """The paragraphs of a macro of prose.j2, which empty lines separate."""
    text = str(getattr(_environment().get_template("prose.j2").module, macro)(*args, **values))
    lines = (" ".join(part.split()) for part in text.split("\n\n"))
    return tuple(line for line in lines if line)


def render(template: str, **values: Any) -> str:
    """A template's text."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    """All templates; HTML templates escape their values."""
    environment = Environment(
        loader=PackageLoader("ratplus_exp.report"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.globals |= {"METHODS": METHODS, "MISSING": MISSING, "setting_name": setting_name}
    return environment
