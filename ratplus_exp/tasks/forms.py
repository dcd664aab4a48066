"""What needles, questions and prompts look like, so that one generator serves RULER and the pocket.

The defaults are RULER's, word for word (NVIDIA/RULER, scripts/data/synthetic/niah.py and
constants.py). The pocket tier's forms are in conf/data/pocket.yaml.
"""

import random
import re
import string
import uuid
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from typing import Annotated, Literal

from pydantic import Field

from ratplus_exp.settings import Positive, Settings, matching
from ratplus_exp.tasks import prose

_FIELDS = {
    "needle": ({"key", "value"}, {"type_needle_v"}),
    "template": ({"context", "query"}, {"type_needle_v"}),
    "answer_prefix": (set(), {"type_needle_v", "query"}),
}

Words = Annotated[str, Field(max_length=100_000)]
Sentence = Annotated[
    Words,
    matching(r"\s*[^\0-\x1f\x7f\s][^\0-\x1f\x7f]*", "give the sentence that fills task S-1"),
]


@dataclass(frozen=True)
class Forms(Settings):
    """Texts and value formats of the NIAH tasks; `Forms()` is RULER.

    A prompt is `template` + `answer_prefix`, filled in. Where a sample has a single answer, both
    are put into the singular as RULER does. Raises ValueError, with the remedy, on a bad field.
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
    noise: Annotated[
        Words,
        matching(r"\s*[^\0-\x1f\x7f\s][^\0-\x1f\x7f]*", "give the sentence that fills task S-1"),
    ] = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    separator: Words = "\n"  # between the units of a noise or needle haystack
    query_joiner: Words = ", and "  # before the last queried key; ', ' before the others
    key_words: Literal["pair", "noun"] = "pair"  # adjective-noun; or one noun of 4 to 8 letters
    key_count: Positive | None = None  # size of a fixed subset of the nouns; None: all of them
    number_digits: Annotated[int, Field(ge=2, le=18)] = 7
    uuid: Literal["uuid4", "hex"] = "uuid4"  # 'hex': its 32 digits without the dashes
    lowercase: bool = False  # the whole prompt
    # 'creation': RULER's, with its one permutation of needles; 'document': as the values stand in
    # the prompt; 'question': as their keys are asked for, one key's as they stand in the prompt.
    answer_order: Literal["creation", "document", "question"] = "creation"
    reserve: Annotated[int, Field(ge=1, le=10**6)] = 128  # tokens kept free for the answer

    def __post_init__(self) -> None:
        for name, (needed, optional) in _FIELDS.items():
            found = _fields(name, getattr(self, name))
            if missing := needed - found:
                raise ValueError(f"{name} lacks {{{min(missing)}}}: add it to the text")
            if unknown := found - needed - optional:
                raise ValueError(
                    f"{name} has the unknown field {{{min(unknown)}}}: use only"
                    f" {', '.join(f'{{{field}}}' for field in sorted(needed | optional))}"
                )
        if self.key_count is not None:
            if self.key_words != "noun":
                raise ValueError("key_count counts nouns: set key_words to noun or drop it")
            available = len(_nouns(self.words))
            if self.key_count > available:
                raise ValueError(f"key_count is {self.key_count}: use 1 to {available}")

    @cached_property
    def words(self) -> frozenset[str]:
        """The lower-cased words of needle, template, prefix and noise, and those that stand for a
        kind of value ("number", "uuids")."""
        text = " ".join(
            (self.needle, self.template, self.answer_prefix, self.noise, self.query_joiner)
        )
        kinds = "number numbers uuid uuids" if "{type_needle_v}" in text else ""
        text = re.sub(r"\{\w+\}", " ", text)
        return frozenset(re.findall("[a-z]+", f"{text} {singular(text)} {kinds}".lower()))

    @cached_property
    def nouns(self) -> tuple[str, ...]:
        """Nouns that serve as keys when `key_words` is 'noun', alphabetically.

        None is profane, or a word of the prose or the texts above: a key means one thing only.
        """
        nouns = _nouns(self.words)
        count = self.key_count or len(nouns)
        return tuple(nouns[i * len(nouns) // count] for i in range(count))  # evenly spread

    def random_word(self, rng: random.Random) -> str:
        """A key in words."""
        if self.key_words == "noun":
            return rng.choice(self.nouns)
        return f"{rng.choice(wordlist('adjective'))}-{rng.choice(wordlist('noun'))}"

    def random_number(self, rng: random.Random) -> str:
        """A number of exactly `number_digits` digits."""
        return str(rng.randrange(10 ** (self.number_digits - 1), 10**self.number_digits))

    def random_uuid(self, rng: random.Random) -> str:
        """A version 4 uuid, or its digits alone."""
        random_uuid = uuid.UUID(int=rng.getrandbits(128), version=4)
        return str(random_uuid) if self.uuid == "uuid4" else random_uuid.hex

    def draw(self, kind: str, rng: random.Random) -> str:
        """A random 'word', 'number' or 'uuid'."""
        draws = {"word": self.random_word, "number": self.random_number, "uuid": self.random_uuid}
        return draws[kind](rng)


@cache
def wordlist(part: str) -> tuple[str, ...]:
    """wonderwords' 'noun', 'adjective' or 'profanity' list, sorted and without repetitions."""
    text = (resources.files("wonderwords") / "assets" / f"{part}list.txt").read_text("utf-8")
    return tuple(sorted({line.strip() for line in text.splitlines() if line.strip()}))


@cache
def _nouns(taken: frozenset[str]) -> tuple[str, ...]:
    taken = taken.union(prose.VOCABULARY, wordlist("profanity"))
    short = (noun for noun in wordlist("noun") if re.fullmatch("[a-z]{4,8}", noun))
    return tuple(noun for noun in short if noun not in taken)


def singular(text: str) -> str:
    """RULER's singular of a template whose sample has one answer."""
    for plural, single in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
        text = text.replace(plural, single)
    return text


def _fields(name: str, text: str) -> set[str]:
    try:
        return {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}
    except ValueError as error:
        raise ValueError(f"{name} is no format string ({error}): double literal braces") from error
