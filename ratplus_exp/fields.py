"""Types of fields that several settings share, with their bounds."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field

from ratplus_exp.budget import Budget
from ratplus_exp.settings import OF_LIST, Amount, matching
from ratplus_exp.tasks import GOLDEN, RULER_NAMES

if TYPE_CHECKING:
    Task = str
    Golden = str
else:
    Task = Literal[tuple(RULER_NAMES)]
    Golden = Literal[tuple(GOLDEN)]


T = TypeVar("T")


def _distinct(values: list[T]) -> list[T]:
    if len({str(value) for value in values}) < len(values):
        raise ValueError("use each of them once")
    return values


def _fraction(value: Any) -> str:
    if not re.fullmatch(r"\d{1,9}(/\d{1,9})?|\d?\.\d{1,12}", str(value)):
        raise ValueError("write it as 1/16")
    return str(Budget.parse(str(value)))


Name = Annotated[
    str,
    # Names appear unescaped in tables, CSV files, folders and pages.
    matching(r"[^\W_][\w./-]{0,99}", "use letters, digits and ._/- behind a first letter or digit"),
]
Distinct = AfterValidator(_distinct)
Length = Annotated[int, Field(ge=2, le=10**8)]  # of a context, in tokens
Tokens = Annotated[int, Field(ge=1, le=10**15)]
Processes = Annotated[int, Field(ge=0, le=1024)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Selector = Literal["topk", "random", "oracle"]
FirstToken = Literal["prefill", "decode"]
Protocol = Literal["whole", "split"]
Dtype = Literal["bfloat16", "float16", "float32"]
Scorer = Literal["exact", "substring"]
Figure = Literal["fig1", "fig2", "fig3", "fig4", "lengths"]
Output = Literal["table2", "table3", "table4", "table5", Figure, "tasks", "report"]
Digest = Annotated[str, matching("[0-9a-f]{64}", "use a sha256, 64 hexadecimal digits, or null")]
Fraction = Annotated[str, BeforeValidator(_fraction)]
Head = Annotated[str, matching(r"\d{1,6}-\d{1,6}", "write layer-head, as in [1-0,1-3]")]
Batch = Annotated[int, Field(ge=1, le=100_000)]
Examples = Annotated[int, Field(ge=1, le=10**6)]
Device = Annotated[str, matching(r"auto|cpu|cuda(:\d\d?)?", "use auto, cpu or cuda")]
Names = Annotated[list[Name], Distinct]
Seeds = Annotated[list[Seed], Field(min_length=1), Distinct]
Lengths = Annotated[tuple[Amount, Amount], OF_LIST]
