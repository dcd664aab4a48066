"""RULER's tasks beyond needles that need no files: variable tracking, common and frequent words.

Rules and texts are RULER's (NVIDIA/RULER, scripts/data/synthetic: variable_tracking.py,
common_words_extraction.py, freq_words_extraction.py, constants.py). RULER shuffles with one fixed
seed, so answers have the same places in all prompts of a size. This module seeds by sample.
The pocket tier's forms are in conf/data/pocket.yaml.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import pi
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from ratplus_exp.settings import Positive, Settings
from ratplus_exp.tasks.forms import Fields, Reserve, Words, check_fields, fields_of, wordlist
from ratplus_exp.tasks.niah import Draft, Draw, in_list, seeded_random

if TYPE_CHECKING:
    from ratplus_exp.tasks.ruler import Ruler

NOTHING: Fields = (set(), set())


@dataclass(frozen=True)
class Texts(Settings):
    """Texts of a task; a prompt is `template` + `answer_prefix`, filled in.

    asked, formats: fields of `template` and `answer_prefix`, and of the other texts, which are
    format strings. Raises ValueError, with the remedy, for a text without a required field or with
    an unknown one.
    """

    asked: ClassVar[dict[str, Fields]] = {"template": ({"context"}, set())}
    formats: ClassVar[dict[str, Fields]] = {}
    template: Words
    answer_prefix: Words
    reserve: Reserve

    def __post_init__(self) -> None:
        for name, fields in ({"answer_prefix": NOTHING} | self.asked).items():
            check_fields(name, set(re.findall(r"\{(\w+)\}", getattr(self, name))), fields)
        for name, fields in self.formats.items():
            check_fields(name, fields_of(name, getattr(self, name)), fields)

    def draft(self, draw: Draw, name: str, source: Ruler) -> Draft:
        raise NotImplementedError

    def ask(self, query: str = "", count: int = 0) -> str:
        """The template of a draft."""
        text = self.template + self.answer_prefix
        return text.replace("{query}", query).replace("{count}", str(count))


@dataclass(frozen=True)
class VT(Texts):
    """vt: a chain of `hops` assignments in noise; which variables have the value of the first?

    letters: of a variable, in capitals; 0: variables are words, as the forms' keys are.
    example: tokens of a worked example in front, whose variables have two letters less; 0: none.
    """

    asked = {
        "template": ({"context", "query"}, set()),
        "answer_prefix": (set(), {"query", "count"}),
    }
    formats = {"start": ({"name", "value"}, set()), "hop": ({"name", "value"}, set())}
    template: Words = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        "{context}\nQuestion: Find all variables that are assigned the value {query} in the text"
        " above."
    )
    answer_prefix: Words = (
        " Answer: According to the chain(s) of variable assignment in the text above, {count}"
        " variables are assigned the value {query}, they are: "
    )
    reserve: Reserve = 30
    start: Words = "VAR {name} = {value}"
    hop: Words = "VAR {name} = VAR {value} "
    hops: Annotated[int, Field(ge=1, le=1000)] = 4
    letters: Annotated[int, Field(ge=0, le=20)] = 5
    digits: Annotated[int, Field(ge=2, le=18)] = 5
    example: Annotated[int, Field(ge=0, le=10**6)] = 500

    def draft(self, draw: Draw, name: str, source: Ruler) -> Draft:
        worked = ""
        if self.example:
            letters = self.letters and max(self.letters - 2, 1)
            example = self._chain(draw, f"{name}/example", letters)
            units = source.fit(example.prompt, self.example, f"{name}, data.vt.example")
            worked = f"{example.prompt(units)} {' '.join(example.answers)}\n\n"
        draft = self._chain(draw, name, self.letters)
        return draft._replace(template=worked + draft.template)

    def _chain(self, draw: Draw, name: str, letters: int) -> Draft:
        """One chain in units of noise; the answers are its variables in their order."""
        names = [
            _code(draw, "variable", string.ascii_uppercase, letters) for _ in range(self.hops + 1)
        ]
        low = 10 ** (self.digits - 1)
        value = draw.fresh("number", lambda: str(draw.rng.randrange(low, 10 * low)))
        chain = [self.start.format(name=names[0], value=value)]
        chain += [self.hop.format(name=new, value=old) for old, new in pairwise(names)]

        def context(n: int) -> str:
            noise, places = [draw.forms.noise] * n, seeded_random(f"{name}/{n}")
            return in_list(noise, chain[::-1], places, draw.forms.separator)

        return Draft(self.ask(value, len(names)), context, names, least=len(names))


@dataclass(frozen=True)
class CWE(Texts):
    """cwe: which words of a list are more frequent than the others?

    repeats: how often the common words and the others occur; null: RULER's 30 and 3, and 6 and 1
        below 4096 tokens. item: the format of a word of the list.
    example: whether a worked example is in front: 40 words, 10 and 3 times; 20 words, 3 and 1 times
        below 4096 tokens.
    """

    formats = {"item": ({"word"}, {"number"})}
    template: Words = (
        "Below is a numbered list of words. In these words, some appear more often than others."
        " Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most"
        " common words in the above list?"
    )
    answer_prefix: Words = " Answer: The top 10 words that appear most often in the list are:"
    reserve: Reserve = 120
    item: Words = "{number}. {word}"
    common: Positive = 10
    repeats: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None
    example: bool = True

    def draft(self, draw: Draw, name: str, source: Ruler) -> Draft:
        long = source.length >= 4096
        words: Sequence[str] = draw.forms.nouns
        if draw.forms.key_words == "pair":  # RULER's lists
            words = sorted({*wordlist("noun"), *wordlist("adjective"), *wordlist("verb")})
        template = self.ask()
        if self.example:
            size, times = (40, (10, 3)) if long else (20, (3, 1))
            chosen = draw.rng.sample(words, size)
            items = self._list(chosen, times, f"{name}/example")
            worked = template.replace("{context}", items)
            template = f"{worked} {self._items(chosen[: self.common])}\n{template}"
        repeats = tuple(self.repeats or ((30, 3) if long else (6, 1)))
        order = draw.rng.sample(words, len(words))

        def context(n: int) -> str:
            return self._list(order[: self.common + n], repeats, f"{name}/{n}")

        answers, most = order[: self.common], len(order) - self.common
        return Draft(template, context, answers, most=most)

    def _list(self, words: Sequence[str], repeats: Sequence[int], name: str) -> str:
        often, seldom = repeats
        items = [*words[: self.common]] * often + [*words[self.common :]] * seldom
        seeded_random(name).shuffle(items)
        return self._items(items)

    def _items(self, words: Sequence[str]) -> str:
        return " ".join(self.item.format(number=i, word=w) for i, w in enumerate(words, start=1))


@dataclass(frozen=True)
class FWE(Texts):
    """fwe: which coded words are the most frequent? Of N words, ⌊N · r⁻² / ζ(2)⌋ are the word of
    rank r; the first is `dots`, to be ignored.

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
    reserve: Reserve = 50
    dots: Words = " ..."
    letters: Annotated[int, Field(ge=0, le=20)] = 6

    def draft(self, draw: Draw, name: str, source: Ruler) -> Draft:
        ranks = max(5, (source.length - self.reserve) // 50)
        letters = string.ascii_lowercase
        coded = (_code(draw, "word", letters, self.letters) for _ in range(ranks - 1))
        words = [self.dots, *(f" {word}" for word in coded)]

        def context(n: int) -> str:
            counts = (int(6 * n / (pi * rank) ** 2) for rank in range(1, ranks + 1))
            text = [word for word, times in zip(words, counts, strict=True) for _ in range(times)]
            seeded_random(f"{name}/{n}").shuffle(text)
            first = next((i for i, word in enumerate(text) if word != self.dots), 0)
            if first and not self.dots.startswith(" "):  # a text must not start with punctuation
                text[0], text[first] = text[first], text[0]
            return "".join(text).lstrip()

        answers = [word.strip() for word in words[1:4]]
        # From 74 words on, rank 4 is more frequent than rank 5.
        return Draft(self.ask(), context, answers, least=74, most=2 * source.length)


def _code(draw: Draw, kind: str, alphabet: str, letters: int) -> str:
    """A new random word of `letters` letters of the alphabet; 0: one of the forms' keys."""
    if not letters:
        return draw("word")
    return draw.fresh(kind, lambda: "".join(draw.rng.choices(alphabet, k=letters)))
