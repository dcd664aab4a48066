"""Sentences are Punkt's, by the examples of nltk's own documentation and by its rules."""

import random
import re

import pytest

from ratplus_exp.tasks.prose import paragraph, sentences

# A bar is where nltk's English model splits; the first four are from its documentation.
TEXTS = """
The periods in Mr. Smith and Johann S. Bach do not mark sentence boundaries. |And sometimes
Sentences can start with non-capitalized words. |i is a good variable name.
(How does it deal with this parenthesis?) |"It should be part of the previous sentence." |"(And so
"(And the same with this one.)" |('And this one!')
They moved to Washington, D.C. in 1965. |Few did.
It sells in the U.S. and abroad. |The U.S. |The rest followed.
He met Dr. Watson at 5 p.m. on Friday. |Then he left!
It was late. |Was it? |Yes! |so it was
We waited... and waited.
"Go." |He said "no." |They left.
"""


@pytest.mark.parametrize("line", TEXTS.strip().splitlines())
def test_sentences_are_punkts(line):
    expected = [part.strip() for part in line.split("|")]
    assert sentences(line.replace("|", "")) == expected


def test_generated_prose_is_split_at_every_period():
    text = paragraph(random.Random(0), 200)
    assert sentences(text) == re.split(r"(?<=[.!?])\s+", text)
    assert sentences("") == []
