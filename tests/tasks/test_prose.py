"""Generated prose has the shape, the variety and exactly the vocabulary it promises."""

import json
import random
import re

import pytest

from ratplus_exp.tasks.prose import VOCABULARY, essay_words, paragraph, sentence


@pytest.fixture(scope="module")
def sentences():
    rng = random.Random(0)
    return [sentence(rng) for _ in range(20_000)]


def test_sentences_are_7_to_20_plain_words(sentences):
    for text in sentences:
        assert re.fullmatch(r"[A-Z][a-z]*( [a-z]+){6,19}\.", text), text


def test_sentences_hardly_repeat(sentences):
    """n draws from N equally likely sentences repeat about n²/2N times: 500 repetitions of
    20 000 draws would mean 400 000 sentences, and unequal ones repeat more."""
    assert len(sentences) - len(set(sentences)) < 500


def test_vocabulary_is_exactly_what_sentences_use(sentences):
    words = {word for text in sentences for word in text[:-1].lower().split()}
    assert tuple(sorted(words)) == VOCABULARY
    assert len(VOCABULARY) <= 500


def test_no_word_looks_like_a_byte():
    assert not [word for word in VOCABULARY if re.fullmatch("[a-f]{2}", word)]


def test_article_a_stands_before_consonants(sentences):
    assert not [text for text in sentences if re.search(r"\b[Aa] [aeiou]", text)]


def test_no_noun_meets_itself(sentences):
    for noun in ("miller", "harbour", "lantern", "bread", "fox"):
        assert not [text for text in sentences if text.lower().count(f" {noun} ") > 1]


def test_paragraph_depends_on_the_generator_alone():
    text = paragraph(random.Random(3), 5)
    assert text == paragraph(random.Random(3), 5)
    assert len(re.findall(r"\.( |$)", text)) == 5


def test_essay_from_text_and_json(tmp_path):
    plain, wrapped = tmp_path / "essay.txt", tmp_path / "essay.json"
    plain.write_text("One  two.\n\nThree\tfour.")
    wrapped.write_text(json.dumps({"text": plain.read_text()}))
    expected = ("One", "two.", "Three", "four.")
    assert essay_words(str(plain)) == essay_words(str(wrapped)) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "cannot be read"),
        ("binary.txt", b"\xff\xfe\x00", "cannot be read"),
        ("broken.json", b"{", "malformed"),
        ("other.json", b'{"body": "x"}', "malformed"),
        ("list.json", b"[1]", "malformed"),
        ("empty.txt", b" \n", "empty"),
    ],
)
def test_bad_essay_is_one_clear_line(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        essay_words(str(path))
    assert name in str(error.value)
    assert "\n" not in str(error.value)
