"""RULER's JSONL files, read as samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, Field, ValidationError

from ratplus_exp.tasks.sample import Sample, make_sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


LONGEST = 64
"""Characters a token on average, above which a prompt is too long without being tokenised."""


class _Record(BaseModel, strict=True):
    """A line of RULER's files; further fields are ignored."""

    index: int
    input: str
    outputs: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    length: int
    length_w_model_temp: int
    answer_prefix: str


def read_jsonl(
    path: Path, tokenizer: PreTrainedTokenizerBase, length: int, task: str
) -> list[Sample]:
    """The samples of a RULER file, e.g. niah_multikey_2/validation.jsonl, for one task's name.

    The prompt is `input` + `answer_prefix`, tokenised again: RULER's lengths are not used. Ids
    count lines from 0 ('MK-2/validation/ruler/17'), since RULER overwrites its `index` with a text
    position. ValueError, with file and line (from 1), if a line is malformed or its prompt has more
    than `length` tokens.
    """
    try:
        lines = path.read_text("utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"RULER file {path} cannot be read: {error}") from None
    samples = []
    for i, line in enumerate(lines):
        try:
            record = _Record.model_validate_json(line)
            if (size := len(record.input)) > LONGEST * length:
                raise ValueError(
                    f"the prompt has {size} characters, too many for the model's length {length}: "
                    "generate the file for at most that length"
                )
            name, prefix = f"{task}/{path.stem}/ruler/{i}", record.answer_prefix
            prompt = record.input + prefix
            sample = make_sample(name, task, prompt, record.outputs, tokenizer, prefix)
            if sample.length > length:
                raise ValueError(
                    f"{sample.id}: the prompt has {sample.length} tokens, more than the model's"
                    f" length {length}: generate the file for at most that length"
                )
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = "".join(f"field {name!r}: " for name in first["loc"][:1])
            raise ValueError(
                f"{path}, line {i + 1}: {field}{first['msg']}: is this a RULER file?"
            ) from None
        except ValueError as error:
            raise ValueError(f"{path}, line {i + 1}: {error}") from None
        samples.append(sample)
    return samples
