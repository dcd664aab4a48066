"""Sentences of English text, like those of nltk's Punkt, which RULER puts needles between.

Punkt (Kiss and Strunk, 2006) learns abbreviations and sentence openers from text, and needs a
download. These lists have those of essays; the rules are Punkt's: '?' and '!' end a sentence, and
so does a period, unless it belongs to an abbreviation, an initial or an ellipsis and no opener
follows; closing quotes and brackets belong to the sentence before.
"""

import re

_ABBREVIATED = (
    "mr mrs ms messrs dr prof rev gen col maj lt sen rep gov jr sr st mt ph.d m.d b.a m.a u.s u.k"
    " u.s.a u.n d.c l.a n.y n.j a.m p.m a.d b.c e.g i.e cf al ed eds vs etc viz approx dept est"
    " inc co corp ltd bros jan feb aug sept oct nov dec fig figs vol pp"
)
_OPENING = (
    "a after all also although an and as at because before both but by despite each even every for"
    " from he her here his how however i if in it its many meanwhile most my no now on once one"
    " others our she since so some still that the their then there these they this those though to"
    " until we what when where while who why with yes yet you your"
)
_ABBREVIATIONS, _OPENERS = (frozenset(words.split()) for words in (_ABBREVIATED, _OPENING))
_END = re.compile(r"(\S*[.!?])([\"'”’)\]}]*)\s+(?=(\S+))")


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
