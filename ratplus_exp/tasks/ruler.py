"""RULER's own JSONL files: read as samples, and written in the same format."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ratplus_exp.tasks.niah import TASKS
from ratplus_exp.tasks.sample import Sample, make_sample
from ratplus_exp.tasks.source import GOLDEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIELDS = {
    "index": int,
    "input": str,
    "outputs": list,
    "length": int,
    "length_w_model_temp": int,
    "answer_prefix": str,
}


def read_jsonl(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, length: int, task: str
) -> list[Sample]:
    """The samples of a RULER file, e.g. niah_multikey_2/validation.jsonl, for one task's name.

    The prompt is `input` + `answer_prefix`, tokenised anew, so RULER's own lengths are not used.
    Ids count lines ('MK-2/validation/ruler/17', from 0) because RULER's `index` is overwritten by
    a text position and repeats. ValueError, naming file and line (from 1), if a line is malformed
    or its prompt has more than `length` tokens.
    """
    path = Path(path)
    try:
        lines = path.read_text("utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"RULER file {path} cannot be read: {error}") from None
    samples = []
    for i, line in enumerate(lines):
        try:
            record = _record(line)
            prompt = record["input"] + record["answer_prefix"]
            name, answers = f"{task}/{path.stem}/ruler/{i}", record["outputs"]
            sample = make_sample(
                name,
                task,
                prompt,
                answers,
                tokenizer,
                record["answer_prefix"],
                golden=task in GOLDEN,
                one_of=task.startswith("qa"),
            )
            if sample.length > length:
                raise ValueError(
                    f"{sample.id}: the prompt has {sample.length} tokens, more than the model's"
                    f" length {length}: generate the file for at most that length"
                )
        except ValueError as error:
            raise ValueError(f"{path}, line {i + 1}: {error}") from None
        samples.append(sample)
    return samples


def write_jsonl(samples: Iterable[Sample], path: str | Path, reserve: int = 128) -> None:
    """Write samples in RULER's format; `reserve` is its tokens_to_generate, part of `length`.

    `index` is the running number that RULER means (see `read_jsonl`).
    """
    with open(path, "w", encoding="utf-8") as file:
        for index, sample in enumerate(samples):
            record = {
                "index": index,
                "input": sample.prompt.removesuffix(sample.answer_prefix),
                "outputs": list(sample.answers),
                "length": sample.length + reserve,
                "length_w_model_temp": sample.length + reserve,
                "answer_prefix": sample.answer_prefix,
            }
            if sample.task in TASKS:
                record["token_position_answer"] = sample.gold_spans[sample.answers[0]][0][0]
            file.write(json.dumps(record) + "\n")


def _record(line: str) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError("no JSON object")
    for name, kind in _FIELDS.items():
        if name not in record:
            raise ValueError(f"field {name!r} is missing: is this a RULER file?")
        if not isinstance(record[name], kind):
            raise ValueError(f"field {name!r} must be of type {kind.__name__}")
    outputs = record["outputs"]
    if not outputs or not all(isinstance(value, str) and value for value in outputs):
        raise ValueError("field 'outputs' must list one gold value or more, as strings")
    return record
