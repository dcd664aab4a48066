"""The forms' defaults are RULER's, keys come from wonderwords, and bad fields name the remedy."""

import random
import re
import uuid
from dataclasses import replace

import pytest

from ratplus_exp.settings import build
from ratplus_exp.tasks import Forms
from ratplus_exp.tasks.forms import wordlist
from ratplus_exp.tasks.prose import VOCABULARY


def test_defaults_are_rulers_word_for_word():
    forms = Forms()
    assert forms.needle == "One of the special magic {type_needle_v} for {key} is: {value}."
    assert forms.template + forms.answer_prefix == (
        "Some special magic {type_needle_v} are hidden within the following text. Make sure to "
        "memorize it. I will quiz you about the {type_needle_v} afterwards.\n{context}\nWhat are "
        "all the special magic {type_needle_v} for {query} mentioned in the provided text? The "
        "special magic {type_needle_v} for {query} mentioned in the provided text are"
    )
    assert forms.noise == (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    )


def test_pocket_file_says_what_the_pocket_is(pocket_forms):
    assert pocket_forms == Forms(
        needle="{key} {value}.",
        template="{context} what are the {type_needle_v} of {query}?",
        answer_prefix=" {query}",
        noise=Forms().noise.lower(),
        separator=" ",
        query_joiner=", ",
        key_words="noun",
        key_count=400,
        number_digits=8,
        uuid="hex",
        lowercase=True,
        answer_order="question",
        reserve=32,
    )


def test_pair_is_a_wonderwords_adjective_and_noun():
    key = Forms().draw("word", random.Random(0))
    assert any(
        key == f"{adjective}-{noun}"
        for adjective in wordlist("adjective")
        if key.startswith(adjective)
        for noun in wordlist("noun")
    )


def test_key_nouns_are_a_fixed_spread_of_unambiguous_words(pocket_forms):
    nouns = pocket_forms.nouns
    assert len(nouns) == len(set(nouns)) == 400
    assert all(re.fullmatch("[a-z]{4,8}", noun) for noun in nouns)
    assert set(nouns) <= set(wordlist("noun"))
    assert not set(nouns) & {*VOCABULARY, *pocket_forms.words, *wordlist("profanity")}
    initials = {noun[0] for noun in nouns}
    assert len(initials) > 20  # not only the head of the list
    assert pocket_forms.draw("word", random.Random(0)) in nouns
    every = replace(pocket_forms, key_count=None).nouns
    assert len(every) > 4000 and set(nouns) < set(every)


def test_values_have_their_formats(pocket_forms):
    rng = random.Random(0)
    assert all(re.fullmatch("[1-9][0-9]{6}", Forms().draw("number", rng)) for _ in range(100))
    assert all(re.fullmatch("[1-9][0-9]{7}", pocket_forms.draw("number", rng)) for _ in range(100))
    assert uuid.UUID(Forms().draw("uuid", rng)).version == 4
    pocket_uuid = pocket_forms.draw("uuid", rng)
    assert re.fullmatch("[0-9a-f]{32}", pocket_uuid) and uuid.UUID(pocket_uuid).version == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template": "what is {query}?"}, "template lacks {context}: add"),
        ({"template": "{context} what?"}, "template lacks {query}: add"),
        ({"needle": "{key} is it."}, "needle lacks {value}: add"),
        ({"needle": "{key} is {value} or {other}."}, "unknown field {other}: use only"),
        ({"needle": "{key} is {value}. {"}, "not a format string"),
        ({"key_words": "verb"}, "'verb': use one of pair, noun"),
        ({"uuid": "long"}, "'long': use one of uuid4, hex"),
        ({"answer_order": "random"}, "use one of creation, document"),
        ({"noise": " "}, "give the sentence"),
        ({"number_digits": 1}, "at least 2"),
        ({"reserve": 0}, "at least 1"),
        ({"key_count": 5}, "set key_words to noun"),
        ({"key_words": "noun", "key_count": 10**6}, "use 1 to"),
    ],
)
def test_bad_field_names_the_remedy(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(Forms, change)
