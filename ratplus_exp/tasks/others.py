"""RULER's tasks beyond needles that need no files: variable tracking, common and frequent words.

Rules and texts are RULER's (NVIDIA/RULER, scripts/data/synthetic: variable_tracking.py,
common_words_extraction.py, freq_words_extraction.py, constants.py). Unlike RULER, which shuffles
with one fixed seed, so that answers stand at the same places of all prompts of a size, every sample
is shuffled by its own name. The pocket tiers' forms are in conf/data/pocket_words.yaml.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import pi
from typing import Annotated, NamedTuple

from pydantic import Field

from ratplus_exp.settings import Positive, Settings
from ratplus_exp.tasks.forms import Words, wordlist
from ratplus_exp.tasks.niah import Draw, in_list, most_units, seeded_random


class Draft(NamedTuple):
    """A sample before its haystack has a size."""

    prompt: Callable[[int], str]  # with n units of the haystack
    answers: Sequence[str]
    prefix: str
    least: int = 0  # units without which the task is none
    most: int | None = None  # units that there are
    one_of: bool = False  # any one of the answers will do


@dataclass(frozen=True)
class Texts(Settings):
    """What prompts of a task look like: `template` + `answer_prefix`, filled in.

    reserve: tokens kept free for the answer.
    """

    template: Words
    answer_prefix: Words
    reserve: Annotated[int, Field(ge=1, le=10**6)]

    def __post_init__(self) -> None:
        if "{context}" not in self.template:
            raise ValueError("template lacks {context}: add it to the text")

    def fill(self, context: str, query: str = "", count: int = 0) -> str:
        text = self.template.replace("{query}", query).replace("{context}", context)
        return text + self.prefix(query, count)

    def prefix(self, query: str, count: int = 0) -> str:
        return self.answer_prefix.replace("{query}", query).replace("{count}", str(count))


@dataclass(frozen=True)
class VT(Texts):
    """vt: a chain of `hops` assignments in noise; which variables have the value of the first?

    letters: of a variable, in capitals; 0: variables are words, as the forms' keys are.
    example: the tokens of a worked example in front, with letters less two; 0: none.
    """

    template: Words = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        "{context}\nQuestion: Find all variables that are assigned the value {query} in the text"
        " above."
    )
    answer_prefix: Words = (
        " Answer: According to the chain(s) of variable assignment in the text above, {count}"
        " variables are assigned the value {query}, they are: "
    )
    reserve: Annotated[int, Field(ge=1, le=10**6)] = 30
    start: Words = "VAR {name} = {value}"
    hop: Words = "VAR {name} = VAR {value} "
    hops: Annotated[int, Field(ge=1, le=1000)] = 4
    letters: Annotated[int, Field(ge=0, le=20)] = 5
    digits: Annotated[int, Field(ge=2, le=18)] = 5
    example: Annotated[int, Field(ge=0, le=10**6)] = 500

    def draft(self, draw: Draw, name: str, count: Callable[[str], int]) -> Draft:
        worked = ""
        if self.example:
            prompt, names, _ = self._chain(draw, f"{name}/example", max(self.letters - 2, 1))
            units = most_units(prompt, count, self.example, f"{name}, data.vt.example")
            worked = f"{prompt(units)} {' '.join(names)}\n\n"
        prompt, names, value = self._chain(draw, name, self.letters)
        prefix = self.prefix(value, len(names))
        return Draft(lambda n: worked + prompt(n), names, prefix, least=len(names))

    def _chain(
        self, draw: Draw, name: str, letters: int
    ) -> tuple[Callable[[int], str], list[str], str]:
        """The prompt by its units of noise, the variables in the order of the chain, the value."""

        def variable() -> str:
            if not self.letters:
                return draw("word")
            capitals = string.ascii_uppercase
            return draw.fresh("variable", lambda: "".join(draw.rng.choices(capitals, k=letters)))

        names = [variable() for _ in range(self.hops + 1)]
        low = 10 ** (self.digits - 1)
        value = draw.fresh("number", lambda: str(draw.rng.randrange(low, 10 * low)))
        chain = [self.start.format(name=names[0], value=value)]
        chain += [self.hop.format(name=new, value=old) for old, new in pairwise(names)]
        forms = draw.forms

        def prompt(n: int) -> str:
            noise = [forms.noise] * n
            lines = in_list(noise, chain[::-1], seeded_random(f"{name}/{n}"), forms.separator)
            return self.fill(lines, value, len(names))

        return prompt, names, value


@dataclass(frozen=True)
class CWE(Texts):
    """cwe: which words of a list stand in it more often than the others?

    repeats: how often the common words and the others stand there; null: RULER's 30 and 3, and 6
        and 1 below 4096 tokens. item: how a word of the list is written.
    example: whether a worked example stands in front: 40 words, 10 and 3 times; 20, 3 and 1 times
        below 4096 tokens.
    """

    template: Words = (
        "Below is a numbered list of words. In these words, some appear more often than others."
        " Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most"
        " common words in the above list?"
    )
    answer_prefix: Words = " Answer: The top 10 words that appear most often in the list are:"
    reserve: Annotated[int, Field(ge=1, le=10**6)] = 120
    item: Words = "{number}. {word}"
    common: Positive = 10
    repeats: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None
    example: bool = True

    def draft(self, draw: Draw, name: str, length: int) -> Draft:
        long = length >= 4096
        words = _words(draw)
        worked = ""
        if self.example:
            size, times = (40, (10, 3)) if long else (20, (3, 1))
            chosen = draw.rng.sample(words, size)
            worked = self.fill(self._list(chosen, times, f"{name}/example"))
            worked += " " + self._items(chosen[: self.common]) + "\n"
        repeats = tuple(self.repeats or ((30, 3) if long else (6, 1)))
        order = draw.rng.sample(words, len(words))

        def prompt(n: int) -> str:
            return worked + self.fill(self._list(order[: self.common + n], repeats, f"{name}/{n}"))

        answers, most = order[: self.common], len(order) - self.common
        return Draft(prompt, answers, self.prefix(""), most=most)

    def _list(self, words: Sequence[str], repeats: Sequence[int], name: str) -> str:
        often, seldom = repeats
        every = [*words[: self.common]] * often + [*words[self.common :]] * seldom
        seeded_random(name).shuffle(every)
        return self._items(every)

    def _items(self, words: Sequence[str]) -> str:
        return " ".join(self.item.format(number=i, word=w) for i, w in enumerate(words, start=1))


@dataclass(frozen=True)
class FWE(Texts):
    """fwe: which coded words are the most frequent? The word of rank r stands ⌊N · r⁻² / ζ(2)⌋
    times among N; the first one is written as `dots`, to be ignored.

    letters: of a coded word; 0: they are words, as the forms' keys are.
    """

    template: Words = (
        "Read the following coded text and track the frequency of each coded word. Find the three"
        " most frequently appeared coded words. {context}\nQuestion: Do not provide any"
        " explanation. Please ignore the dots '....'. What are the three most frequently appeared"
        " words in the above coded text?"
    )
    answer_prefix: Words = (
        " Answer: According to the coded text above, the three most frequently appeared words are:"
    )
    reserve: Annotated[int, Field(ge=1, le=10**6)] = 50
    dots: Words = " ..."
    letters: Annotated[int, Field(ge=0, le=20)] = 6

    def draft(self, draw: Draw, name: str, length: int) -> Draft:
        def coded() -> str:
            if not self.letters:
                return draw("word")
            small = string.ascii_lowercase
            return draw.fresh("word", lambda: "".join(draw.rng.choices(small, k=self.letters)))

        ranks = max(5, (length - self.reserve) // 50)
        words = [self.dots, *(f" {coded()}" for _ in range(ranks - 1))]

        def prompt(n: int) -> str:
            counts = (int(6 * n / (pi * rank) ** 2) for rank in range(1, ranks + 1))
            every = [word for word, times in zip(words, counts, strict=True) for _ in range(times)]
            seeded_random(f"{name}/{n}").shuffle(every)
            if set(every) - {self.dots} and not self.dots.startswith(
                " "
            ):  # a mark behind a word can't begin the text
                first = next(i for i, word in enumerate(every) if word != self.dots)
                every[0], every[first] = every[first], every[0]
            return self.fill("".join(every).lstrip())

        answers = [word.strip() for word in words[1:4]]
        # From 74 words on rank 4 stands there more often than rank 5.
        return Draft(prompt, answers, self.prefix(""), least=74, most=2 * length)


def _words(draw: Draw) -> Sequence[str]:
    """All words of a list task: RULER's, or the nouns of forms whose keys are nouns."""
    if draw.forms.key_words == "noun":
        return draw.forms.nouns
    parts = (wordlist(part) for part in ("noun", "adjective", "verb"))
    return sorted({word for words in parts for word in words})
