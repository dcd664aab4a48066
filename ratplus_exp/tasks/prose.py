"""Essays as haystacks: generated from a small closed vocabulary, or read from a file; sentences.

RULER hides its needles in Paul Graham's essays, which need a download and are too rich for a model
of a million parameters. Generated sentences fill patterns with words grouped by meaning: plausible
prose, hardly ever repeated, of at most 500 distinct words, all in a word-level tokenizer.

RULER puts needles between the sentences of nltk's Punkt (Kiss and Strunk, 2006), which learns
abbreviations and sentence openers from text, and needs a download. prose.toml lists those of
essays; the rules are Punkt's: '?' and '!' end a sentence, and so does a period, unless it belongs
to an abbreviation, an initial or an ellipsis and no opener follows; closing quotes and brackets
belong to the sentence before.
"""

import json
import random
import re
import tomllib
from functools import lru_cache
from importlib import resources
from itertools import chain
from pathlib import Path

_DATA = tomllib.loads((resources.files("ratplus_exp.tasks") / "prose.toml").read_text("utf-8"))
_PATTERNS: list[str] = _DATA["patterns"]
_WORDS: dict[str, list[str]] = {
    group: words.split() if isinstance(words, str) else words
    for group, words in _DATA["words"].items()
}
_ABBREVIATIONS, _OPENERS = (frozenset(_DATA[x].split()) for x in ("abbreviations", "openers"))
_SLOT = re.compile(r"\{(\w+)\}")
_END = re.compile(r"(\S*[.!?])([\"'”’)\]}]*)\s+(?=(\S+))")

_TEXT = " ".join(chain(_PATTERNS, *_WORDS.values()))
VOCABULARY = tuple(sorted(set(_SLOT.sub(" ", _TEXT).split())))
"""Every word of `sentence`, lower-cased and sorted."""


def sentence(rng: random.Random) -> str:
    """One sentence of 7 to 20 words: letters and single spaces, ending in '.'."""
    used: set[str] = set()

    def fill(slot: re.Match[str]) -> str:
        # A word occurs once per sentence: not "from the mill to the mill".
        choice = rng.choice([word for word in _WORDS[slot[1]] if word not in used])
        used.add(choice)
        return choice

    text = _SLOT.sub(fill, rng.choice(_PATTERNS))
    return text[0].upper() + text[1:] + "."


def paragraph(rng: random.Random, n: int) -> str:
    """`n` sentences joined by single spaces."""
    return " ".join(sentence(rng) for _ in range(n))


@lru_cache(maxsize=4)
def essay_words(path: str) -> tuple[str, ...]:
    """All words of a text file, or of RULER's PaulGrahamEssays.json ({"text": ...}); read once.

    ValueError, naming the file, if it cannot be read, is malformed, or has no word.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise OSError("it is not a file")
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"essay {path} cannot be read ({error}): give a UTF-8 file, or null for prose"
        ) from error
    try:
        words = (json.loads(text)["text"] if path.endswith(".json") else text).split()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f'essay {path} is malformed: its JSON must be {{"text": "..."}}') from None
    if not words:
        raise ValueError(f"essay {path} is empty: give a file with text, or null for prose")
    return tuple(words)


def sentences(text: str) -> list[str]:
    """The sentences of a text, without the white space between them; [] of an empty one."""
    parts, start = [], 0
    for end in _END.finditer(text):
        word, closing, following = end.groups()
        if word[-1] in "!?" or closing or _ends(word, following):
            parts.append(text[start : end.end(2)])
            start = end.end()
    return [*parts, text[start:]] if text[start:] else parts


def _ends(word: str, following: str) -> bool:
    """Whether a word's last period ends a sentence, given the word that follows."""
    bare = re.sub(r"^\W+", "", word[:-1].lower())
    initial = len(bare) == 1 and bare.isalpha()
    abbreviated = initial or bare in _ABBREVIATIONS or bare.rpartition("-")[2] in _ABBREVIATIONS
    if not abbreviated and not word.endswith(".."):
        return True
    opener = re.sub(r"\W", "", following)
    return opener[:1].isupper() and opener.lower() in _OPENERS
