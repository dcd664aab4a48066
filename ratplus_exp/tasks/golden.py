"""The golden positions of H1: where each token of the answer stands in the prompt."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ratplus_exp.tasks.sample import Sample, encode, target, target_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class GoldenAnswer:
    """The gold answer, teacher-forced, and the place of each of its tokens.

    ids: answer tokens, EOS last.
    positions: for each token of `ids`, the prompt positions of this part of its value, one an
        occurrence of the value; empty for commas, spaces and EOS.
    values: for each token of `ids`, the index of its gold value, or −1.
    """

    ids: tuple[int, ...]
    positions: tuple[frozenset[int], ...]
    values: tuple[int, ...]


def golden_answer(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> GoldenAnswer:
    """Aligns the answer with every occurrence of its values, by characters.

    Prompt and answer may cut a value into different tokens, so a token of the answer is matched by
    its first character of the value.
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
