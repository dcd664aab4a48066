"""The texts of needles, questions and prompts: one generator for RULER and the pocket tier.

The defaults are RULER's, word for word (NVIDIA/RULER, scripts/data/synthetic/niah.py and
constants.py). The pocket tier's forms are in conf/data/pocket.yaml.
"""

import random
import re
import string
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from typing import Annotated, Literal

from pydantic import Field

from ratplus_exp.settings import Positive, Settings, matching
from ratplus_exp.tasks import prose

Fields = tuple[set[str], set[str]]  # of a text: the required and the optional ones
_FIELDS: dict[str, Fields] = {
    "needle": ({"key", "value"}, {"type_needle_v"}),
    "template": ({"context", "query"}, {"type_needle_v"}),
    "answer_prefix": (set(), {"type_needle_v", "query"}),
}

Words = Annotated[str, Field(max_length=100_000)]
Sentence = Annotated[
    Words, matching(r"\s*[^\0-\x1f\x7f\s][^\0-\x1f\x7f]*", "give the sentence that fills task S-1")
]
Reserve = Annotated[int, Field(ge=1, le=10**6)]  # tokens that a prompt leaves for the answer


def fields_of(name: str, text: str) -> set[str]:
    """The fields of a format string; ValueError if it is none."""
    try:
        parts = [*string.Formatter().parse(text)]
    except ValueError as error:
        raise ValueError(
            f"{name} is not a format string ({error}): double literal braces"
        ) from error
    return {field for _, field, _, _ in parts if field is not None}


def check_fields(name: str, found: set[str], fields: Fields) -> None:
    """ValueError, with the remedy, if a text lacks a required field or has an unknown one."""
    required, optional = fields
    if missing := required - found:
        raise ValueError(f"{name} lacks {{{min(missing)}}}: add it to the text")
    if unknown := found - required - optional:
        known = ", ".join(f"{{{field}}}" for field in sorted(required | optional))
        remedy = f"use only {known}" if known else "leave it out"
        raise ValueError(f"{name} has the unknown field {{{min(unknown)}}}: {remedy}")


@dataclass(frozen=True)
class Forms(Settings):
    """Texts and value formats of the NIAH tasks; `Forms()` is RULER.

    A prompt is `template` + `answer_prefix`, filled in; both in the singular, as RULER's, where a
    sample has one answer. Raises ValueError, with the remedy, on a bad field.
    """

    needle: Words = "One of the special magic {type_needle_v} for {key} is: {value}."
    template: Words = (
        "Some special magic {type_needle_v} are hidden within the following text. Make sure to"
        " memorize it. I will quiz you about the {type_needle_v} afterwards.\n{context}\nWhat are"
        " all the special magic {type_needle_v} for {query} mentioned in the provided text?"
    )
    answer_prefix: Words = (
        " The special magic {type_needle_v} for {query} mentioned in the provided text are"
    )
    noise: Sentence = (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    )
    separator: Words = "\n"  # between the units of a noise or needle haystack
    query_joiner: Words = ", and "  # before the last queried key; ', ' before the others
    key_words: Literal["pair", "noun"] = "pair"  # adjective-noun; or one noun of 4 to 8 letters
    key_count: Positive | None = None  # size of a fixed subset of the nouns; None: all of them
    number_digits: Annotated[int, Field(ge=2, le=18)] = 7
    uuid: Literal["uuid4", "hex"] = "uuid4"  # 'hex': its 32 digits without the dashes
    lowercase: bool = False  # the whole prompt
    # 'creation': RULER's, with its one permutation of needles; 'document': by their places in the
    # prompt; 'question': by their keys in the question, then by their places in the prompt.
    answer_order: Literal["creation", "document", "question"] = "creation"
    reserve: Reserve = 128

    def __post_init__(self) -> None:
        for name, fields in _FIELDS.items():
            check_fields(name, fields_of(name, getattr(self, name)), fields)
        if self.key_count is not None:
            if self.key_words != "noun":
                raise ValueError("key_count counts nouns: set key_words to noun or drop it")
            available = len(_nouns(self.words))
            if self.key_count > available:
                raise ValueError(f"key_count is {self.key_count}: use 1 to {available}")

    @cached_property
    def words(self) -> frozenset[str]:
        """The lower-cased words of all texts, and the names of kinds ("number", "uuids") if a text
        has them."""
        text = " ".join(
            (self.needle, self.template, self.answer_prefix, self.noise, self.query_joiner)
        )
        kinds = "number numbers uuid uuids" if "{type_needle_v}" in text else ""
        text = re.sub(r"\{\w+\}", " ", text)
        return frozenset(re.findall("[a-z]+", f"{text} {singular(text)} {kinds}".lower()))

    @cached_property
    def nouns(self) -> tuple[str, ...]:
        """The keys if `key_words` is 'noun', alphabetically.

        None is profane, or a word of the prose or of the texts, so each key is unambiguous.
        """
        nouns = _nouns(self.words)
        count = self.key_count or len(nouns)
        return tuple(nouns[i * len(nouns) // count] for i in range(count))  # evenly spread

    def draw(self, kind: str, rng: random.Random) -> str:
        """A random 'word', 'number' (of exactly `number_digits` digits) or 'uuid'."""
        if kind == "number":
            return str(rng.randrange(10 ** (self.number_digits - 1), 10**self.number_digits))
        if kind == "uuid":
            value = uuid.UUID(int=rng.getrandbits(128), version=4)
            return str(value) if self.uuid == "uuid4" else value.hex
        if self.key_words == "noun":
            return rng.choice(self.nouns)
        return f"{rng.choice(wordlist('adjective'))}-{rng.choice(wordlist('noun'))}"

    def state(self, key: str, value: str, kind: str) -> str:
        """The needle of a key and a value of this kind."""
        return self.needle.format(key=key, value=value, type_needle_v=f"{kind}s")

    def ask(self, text: str, keys: Sequence[str], kind: str, answers: int) -> str:
        """A text that asks for the values of this kind of some keys, in the
        singular for one answer; `{context}` stays."""
        *others, last = keys
        query = ", ".join(others) + self.query_joiner + last if others else last
        text, kind = (singular(text), kind) if answers == 1 else (text, f"{kind}s")
        return text.format(context="{context}", query=query, type_needle_v=kind)


@cache
def wordlist(part: str) -> tuple[str, ...]:
    """wonderwords' 'noun', 'adjective', 'verb' or 'profanity' list, sorted, without repetitions."""
    text = (resources.files("wonderwords") / "assets" / f"{part}list.txt").read_text("utf-8")
    return tuple(sorted({line.strip() for line in text.splitlines() if line.strip()}))


@cache
def _nouns(excluded: frozenset[str]) -> tuple[str, ...]:
    excluded = excluded.union(prose.VOCABULARY, wordlist("profanity"))
    short = (noun for noun in wordlist("noun") if re.fullmatch("[a-z]{4,8}", noun))
    return tuple(noun for noun in short if noun not in excluded)


def singular(text: str) -> str:
    """RULER's singular of a template whose sample has one answer."""
    for plural, single in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
        text = text.replace(plural, single)
    return text
