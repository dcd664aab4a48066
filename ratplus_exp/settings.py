"""Validation of settings: types with bounds, and one-line errors.

A settings class is a frozen dataclass whose annotations give each field's type and bounds; `build`
makes one from a plain mapping. This module imports neither torch nor transformers, so that errors
appear without delay.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from ratplus_exp.budget import Budget

T = TypeVar("T")


class Settings:
    """Base of all settings: values are not converted, and unknown fields are errors.

    not_set: fields that no configuration can set.
    """

    not_set: ClassVar[frozenset[str]] = frozenset()
    __pydantic_config__ = ConfigDict(strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        every = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        known = [name for name in every if name not in cls.not_set]
        for name in values if isinstance(values, Mapping) else ():
            if name not in known:
                remedy = f"use one of {', '.join(known)}" if known else "it has none"
                raise ValueError(f"there is no field {name!r}: {remedy}")
        return values


def matching(pattern: str, hint: str) -> AfterValidator:
    """Text that fully matches a pattern; hint: the remedy in the error."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(hint)
        return text

    return AfterValidator(check)


def _odd(number: int) -> int:
    if number % 2 == 0:
        raise ValueError("use an odd number")
    return number


def _distinct(values: list[T]) -> list[T]:
    if len({str(value) for value in values}) < len(values):
        raise ValueError("use each of them once")
    return values


def _fraction(value: Any) -> str:
    if not re.fullmatch(r"\d{1,9}(/\d{1,9})?|\d?\.\d{1,12}", str(value)):
        raise ValueError("write it as 1/16")
    return str(Budget.parse(str(value)))


OF_LIST = Field(strict=False)  # a tuple, given as a list
Positive = Annotated[int, Field(ge=1, le=10**15)]
Whole = Annotated[int, Field(ge=0, le=10**15)]
Length = Annotated[int, Field(ge=2, le=10**8)]  # of a context, in tokens
Examples = Annotated[int, Field(ge=1, le=10**6)]
Threads = Annotated[int, Field(ge=0, le=1024)]  # or processes
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Odd = Annotated[int, Field(ge=1, lt=10**6), AfterValidator(_odd)]
Share = Annotated[float, Field(ge=0, le=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Amount = Annotated[float, Field(gt=0, le=1e9)]
Rate = Annotated[float, Field(ge=0, le=1e3)]
Fraction = Annotated[str, BeforeValidator(_fraction)]
Text = Annotated[str, matching(r"(?!\s)[^\0-\x1f\x7f]{1,4096}", "use some text in one line")]
Name = Annotated[
    str,
    # Names appear unescaped in tables, CSV files, folders and pages.
    matching(r"[^\W_][\w./-]{0,99}", "use letters, digits and ._/- after a first letter or digit"),
]
Distinct = AfterValidator(_distinct)
Names = Annotated[list[Name], Distinct]
Seeds = Annotated[list[Seed], Field(min_length=1), Distinct]
Selector = Literal["topk", "random", "oracle"]
FirstToken = Literal["prefill", "decode"]
Protocol = Literal["whole", "split"]
Dtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True, kw_only=True)
class DilatedSettings(Settings):
    """dilation: D; 0 for the local window and the initial positions alone, as in P2's attention
        baseline of joint training.
    local: W, the length of the local window before the query.
    initial: I, the number of initial positions that every query sees.
    """

    dilation: Whole = 64
    local: Whole = 0
    initial: Whole = 0


@dataclass(frozen=True)
class Source(Settings):
    """Text to train on.

    path: a data set of the Hugging Face hub, or a folder of .parquet, .jsonl or .txt files (one
        kind; a .txt file is one document).
    subset, split: of a hub data set.
    field: the column with the text.
    tokens: how many to keep, from the start; None: all.
    """

    path: Text
    subset: Name | None = None
    split: Text = "train"
    field: Name = "text"
    tokens: Positive | None = None


def build(cls: type[T], settings: Mapping[str, Any], where: str = "") -> T:
    """A settings class from the mapping at `where` in the configuration; ValueError, in one line
    with the remedy, for the first field of a wrong type or out of bounds."""
    try:
        # As JSON: in strict mode pydantic builds dataclasses from JSON objects, not from dicts.
        return _adapter(cls).validate_json(json.dumps(settings))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(_line(first, settings, where)) from None


_adapter: Any = cache(TypeAdapter)


_REMEDIES = {  # by pydantic's type of error, formatted with its context
    "model_attributes_type": "use fields, as in {{name: value}}",
    "missing": "write what is missing at its end",
    "bool_type": "use true or false",
    "dataclass_type": "use fields, as in {{name: value}}",
    "dict_type": "use fields, as in {{name: value}}",
    "finite_number": "use a finite number",
    "float_type": "use a number",
    "greater_than": "use more than {gt:g}",
    "greater_than_equal": "use at least {ge:.10g}",
    "int_type": "use a whole number",
    "less_than": "use less than {lt:.10g}",
    "less_than_equal": "use at most {le:.10g}",
    "list_type": "use a list, as in [a,b]",
    "literal_error": "use one of {expected}",
    "string_type": "use text, in quotes where it looks like something else",
    "too_long": "use a list of {max_length}",
    "too_short": "use a list of at least {min_length}",
    "tuple_type": "use a list, as in [a,b]",
    "union_tag_invalid": "use one of {expected_tags}",
    "union_tag_not_found": "it has no name",
    "value_error": "{error}",
}


def _line(error: Any, value: Any, where: str) -> str:
    """One of pydantic's errors in one line: the field, its value, and what to use instead."""
    path = where
    for part in error["loc"]:  # fields, and names of a union's alternatives
        if isinstance(value, Mapping) and part in value:
            path, value = f"{path}.{part}" if path else str(part), value[part]
        elif isinstance(value, list | tuple) and isinstance(part, int) and part < len(value):
            path, value = f"{path}[{part}]", value[part]
    if error["type"] == "missing" and isinstance(value, Mapping):
        return f"{path}.{error['loc'][-1]}".lstrip(".") + " is missing: set it"
    context = {
        name: re.sub(r" or (?=[^,]*$)", ", ", str(x)).replace("'", "") if "expected" in name else x
        for name, x in error.get("ctx", {}).items()
    }
    template = _REMEDIES.get(error["type"])
    remedy = template.format(**context) if template else error["msg"]
    if error["type"] == "value_error" and isinstance(value, Mapping):
        return f"{path}: {remedy}".lstrip(": ")
    text = repr(value)
    return f"{path} is {text if len(text) < 60 else text[:60] + '…'}: {remedy}"
