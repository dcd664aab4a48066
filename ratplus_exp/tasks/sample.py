"""A task sample: prompt, gold values, their token positions, and the text to be answered."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ratplus_exp.tasks.forms import singular

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sample:
    """A prompt, its gold values and where they stand; positions are token indices."""

    id: str  # 'MK-2/validation/0/17': task, split, seed, index
    task: str
    prompt: str  # ends with `answer_prefix`
    input_ids: tuple[int, ...]  # of the prompt; no BOS or other special token
    answers: tuple[str, ...]  # gold values, in the order in which they are to be answered
    gold_spans: dict[str, tuple[tuple[int, int], ...]]  # value -> all its spans [start, end)
    length: int  # len(input_ids)
    answer_prefix: str = ""
    one_of: bool = False  # whether any one of the gold values will do (qa)


def target(sample: Sample) -> str:
    """The text to learn straight after the prompt: ' 4815, 2231'.

    P2 joins the answers by commas and ends them with EOS; of several that will do, the shortest is
    taken. Prompts end without a space, so that the answer brings its own. Tokenise it with
    `target_ids`: by itself it may come out differently (Llama-2's tokenizer would add a second
    space).
    """
    values = [min(sample.answers, key=len)] if sample.one_of else sample.answers
    return " " + ", ".join(values)


def target_ids(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids of `target(sample)` as it stands behind the prompt, and EOS.

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
    """How many of a prompt's last tokens are its question, which follows `template`, the texts'
    own behind "{context}"; a token that the context shares with it is the question's.

    ValueError if the prompt has no such question, as in files of other texts.
    """
    words = template.split("{")[0]
    words = words.lower() if sample.prompt.islower() else words
    place = max(sample.prompt.rfind(text) for text in (words, singular(words)))
    if not words.strip() or place < 0:
        raise ValueError(
            f"{sample.id}: its prompt has no {words!r} behind the context, so that the question"
            " can't be told from it: set stage.protocol=whole, or the template to the file's"
        )
    encoded = tokenizer(
        sample.prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    return sum(end > place for _, end in encoded.offset_mapping)


def make_sample(
    name: str,
    task: str,
    prompt: str,
    answers: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    answer_prefix: str = "",
    golden: bool = True,
    one_of: bool = False,
) -> Sample:
    """Tokenise a prompt, without special tokens, and find every occurrence of its gold values.

    A span has the tokens that share a character with the value. ValueError if one is not there.
    golden: whether the values have such places at all.
    """
    encoded = tokenizer(
        prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    starts = [start for start, _ in encoded.offset_mapping]
    ends = [end for _, end in encoded.offset_mapping]
    spans = {}
    for value in answers if golden else ():
        found = re.finditer(rf"(?<!\w){re.escape(value)}(?!\w)", prompt)
        spans[value] = tuple(
            (bisect_right(ends, match.start()), bisect_left(starts, match.end())) for match in found
        )
        if not spans[value]:
            raise ValueError(f"{name}: the prompt does not contain the answer {value!r}")
    ids = tuple(encoded.input_ids)
    return Sample(name, task, prompt, ids, tuple(answers), spans, len(ids), answer_prefix, one_of)
