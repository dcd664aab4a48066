"""A task sample: prompt, gold values, their token positions, and the answer to learn."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ratplus_exp.tasks.forms import singular
from ratplus_exp.tasks.niah import GOLDEN, QA_FILES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sample:
    """A prompt, its gold values and their places; positions are token indices."""

    id: str  # 'MK-2/validation/0/17': task, split, seed, index
    task: str
    prompt: str  # ends with `answer_prefix`
    input_ids: tuple[int, ...]  # of the prompt; no BOS or other special token
    answers: tuple[str, ...]  # gold values, in the order of the answer
    gold_spans: dict[str, tuple[tuple[int, int], ...]]  # value -> all its spans [start, end)
    length: int  # len(input_ids)
    answer_prefix: str = ""

    @property
    def one_of(self) -> bool:
        """Whether any one of the gold values is a full answer."""
        return self.task in QA_FILES


def target(sample: Sample) -> str:
    """The text to learn after the prompt: ' 4815, 2231'.

    P2 joins the answers by commas and ends them with EOS; of alternatives, the shortest is used.
    Prompts end without a space, so the answer begins with one. Tokenise it with `target_ids`:
    Llama-2's tokenizer, for one, adds a second space to a text by itself.
    """
    values = [min(sample.answers, key=len)] if sample.one_of else sample.answers
    return " " + ", ".join(values)


def target_ids(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids of `target(sample)` behind the prompt, and EOS.

    ValueError if the tokenizer merges the prompt's end with the answer's beginning.
    """
    text = sample.prompt + target(sample)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if tuple(ids[: sample.length]) != sample.input_ids:
        raise ValueError(
            f"{sample.id}: the tokenizer merges prompt and answer: end forms.answer_prefix, or else"
            " forms.template, with a character that it keeps apart from a space"
        )
    return (*ids[sample.length :], tokenizer.eos_token_id)


def question_tokens(sample: Sample, template: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of tokens of a prompt's question, which follows `template`, the part of the
    texts' template behind "{context}". A token shared with the context counts.

    ValueError if the prompt has no such question, as in files with other texts.
    """
    words = template.split("{")[0]
    words = words.lower() if sample.prompt.islower() else words
    place = max(sample.prompt.rfind(text) for text in (words, singular(words)))
    if not words.strip() or place < 0:
        raise ValueError(
            f"{sample.id}: the prompt has no {words!r} behind the context, so its question cannot"
            " be found: set stage.protocol=whole, or the template to the file's"
        )
    return sum(end > place for _, end in encode(sample.prompt, tokenizer).offset_mapping)


def encode(text: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    """input_ids and offset_mapping of a text, without special tokens."""
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)


def make_sample(
    name: str,
    task: str,
    prompt: str,
    answers: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    answer_prefix: str = "",
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
    ids = tuple(encoded.input_ids)
    return Sample(name, task, prompt, ids, tuple(answers), spans, len(ids), answer_prefix)
