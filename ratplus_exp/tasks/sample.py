"""A task's sample: prompt, gold values and their positions, the answer to learn; RULER's files."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from ratplus_exp.tasks.forms import singular
from ratplus_exp.tasks.niah import GOLDEN, QA_FILES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sample:
    """A prompt, its gold values and their places; positions are token indices."""

    id: str  # 'MK-2/validation/0/17': task, split, seed, index
    task: str
    prompt: str
    input_ids: tuple[int, ...]  # of the prompt; no BOS or other special token
    answers: tuple[str, ...]  # gold values, in the order of the answer
    gold_spans: dict[str, tuple[tuple[int, int], ...]]  # value -> all its spans [start, end)

    @property
    def length(self) -> int:
        return len(self.input_ids)

    @property
    def one_of(self) -> bool:
        """Whether any one of the gold values is a full answer."""
        return self.task in QA_FILES


def target(sample: Sample) -> str:
    """The text to learn after the prompt: ' 4815, 2231'.

    P2 joins the answers by commas and ends them with EOS; of alternatives, the shortest is used.
    Prompts end without a space, so the answer begins with one. Tokenise it with `target_ids`:
    Some tokenizers, such as Llama-2's, would add a second space to the text alone.
    """
    values = [min(sample.answers, key=len)] if sample.one_of else sample.answers
    return " " + ", ".join(values)


def target_ids(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids of `target(sample)` after the prompt, and EOS.

    ValueError if the tokenizer merges the prompt's end with the answer's beginning.
    """
    text = sample.prompt + target(sample)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if tuple(ids[: sample.length]) != sample.input_ids:
        raise ValueError(
            f"{sample.id}: the tokenizer merges prompt and answer: end forms.answer_prefix, or else"
            " forms.template, with a character that it does not merge with a space"
        )
    return (*ids[sample.length :], tokenizer.eos_token_id)


def check_known(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError if more than 5 % of a prompt are unknown to the tokenizer."""
    unknown = sample.input_ids.count(tokenizer.unk_token_id)
    if unknown > 0.05 * sample.length:
        raise ValueError(
            f"{sample.id}: {unknown} of {sample.length} tokens are unknown to the model's "
            "tokenizer: choose the data of the model's tier, for instance data=pocket"
        )


def question_tokens(sample: Sample, template: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of tokens of a prompt's question, which follows `template`, the part of the
    texts' template after "{context}". A token shared with the context counts.

    ValueError if the prompt has no such question, as in files with other texts.
    """
    words = template.split("{")[0]
    words = words.lower() if sample.prompt.islower() else words
    place = max(sample.prompt.rfind(text) for text in (words, singular(words)))
    if not words.strip() or place < 0:
        raise ValueError(
            f"{sample.id}: the prompt has no {words!r} after the context, so its question cannot"
            " be found: set data.protocol=whole, or the template to the file's"
        )
    return sum(end > place for _, end in encode(sample.prompt, tokenizer).offset_mapping)


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    """input_ids and offset_mapping of a text, without special tokens."""
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)


def make_sample(
    name: str, task: str, prompt: str, answers: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> Sample:
    """Tokenise a prompt and find every occurrence of its gold values, if the task has `GOLDEN`
    places.

    A span has the tokens that share a character with the value. ValueError if one is missing.
    """
    encoded = encode(prompt, tokenizer)
    starts = [start for start, _ in encoded.offset_mapping]
    ends = [end for _, end in encoded.offset_mapping]
    spans = {}
    for value in answers if task in GOLDEN else ():
        spans[value] = tuple(
            (bisect_right(ends, match.start()), bisect_left(starts, match.end()))
            for match in re.finditer(rf"(?<!\w){re.escape(value)}(?!\w)", prompt)
        )
        if not spans[value]:
            raise ValueError(f"{name}: the prompt does not contain the answer {value!r}")
    return Sample(name, task, prompt, tuple(encoded.input_ids), tuple(answers), spans)


@dataclass(frozen=True)
class GoldenAnswer:
    """The gold answer, teacher-forced, and the place of each of its tokens.

    ids: answer tokens, EOS last.
    positions: for each token of `ids`, the prompt positions of this part of its value, one per
        occurrence of the value; empty for commas, spaces and EOS.
    values: for each token of `ids`, the index of its gold value, or −1.
    """

    ids: tuple[int, ...]
    positions: tuple[frozenset[int], ...]
    values: tuple[int, ...]

    def steps(self, fed: int) -> Iterator[tuple[int, list[int], int]]:
        """Each token a of the answer that a decoding step predicts, with its positions and value:
        all but EOS and, if no token of the prompt is `fed` to such a step, the first.

        The query that predicts it is the prompt's last token (a = 0) or token a − 1 of the answer.
        """
        for token in range(0 if fed else 1, len(self.ids) - 1):
            yield token, sorted(self.positions[token]), self.values[token]


def golden_answer(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> GoldenAnswer:
    """Align the answer with every occurrence of its values, by characters.

    The tokens of a value may differ between prompt and answer, so a token of the answer is matched
    by its first character of the value.
    """
    ids = target_ids(sample, tokenizer)
    text = sample.prompt + target(sample)
    starts, ends = zip(*encode(text, tokenizer).offset_mapping, strict=True)
    positions: list[frozenset[int]] = [frozenset()] * len(ids)
    values = [-1] * len(ids)
    begin = len(sample.prompt)
    for number, value in enumerate(sample.answers):
        begin = text.index(value, begin)
        occurrences = [
            sample.prompt.index(value, starts[first]) for first, _ in sample.gold_spans[value]
        ]
        for token in range(sample.length, len(starts)):
            offset = max(starts[token] - begin, 0)
            if ends[token] > begin and offset < len(value):
                places = (bisect_right(ends, place + offset) for place in occurrences)
                positions[token - sample.length] = frozenset(places)
                values[token - sample.length] = number
        begin += len(value)
    return GoldenAnswer(ids, tuple(positions), tuple(values))


# A prompt with more characters per token of the model's length is refused without tokenising it.
MAX_CHARACTERS_PER_TOKEN = 64


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
            if (size := len(record.input)) > MAX_CHARACTERS_PER_TOKEN * length:
                raise ValueError(
                    f"the prompt has {size} characters, too many for the model's length {length}: "
                    "generate the file for at most that length"
                )
            name, prompt = f"{task}/{path.stem}/ruler/{i}", record.input + record.answer_prefix
            sample = make_sample(name, task, prompt, record.outputs, tokenizer)
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
