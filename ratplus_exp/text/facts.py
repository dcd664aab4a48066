"""Generated pretraining text, dense in repeated facts, from which a model learns retrieval.

A document states facts ("otter is 4815."), alone or spread through prose or noise, restates some,
and then asks for many of them in the form of the NIAH tasks. A document has as many recallable
values as dozens of NIAH prompts, so retrieval forms within millions of tokens instead of billions.
Facts and questions are at all distances up to the length of the document. All values belong to the
training split (`split_of`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ratplus_exp.tasks import prose
from ratplus_exp.tasks.forms import Forms
from ratplus_exp.tasks.niah import Draw, seeded_random
from ratplus_exp.training.settings import IGNORE, Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# (key, value, weight) of the facts of a document; pairs of uuids are learnt last (MK-3).
_KINDS = (("word", "number", 5), ("word", "uuid", 2), ("uuid", "uuid", 3))
_HAYSTACKS = (("needle", 5), ("essay", 4), ("noise", 1))
CHARACTERS = 5  # of a token, rather too many, so that one call mostly suffices
Piece = tuple[str, str]  # a text, and "fact" or "answer" if it can be recalled, else ""


@dataclass(frozen=True, eq=False)
class Facts:
    """Batches of documents as a pure function of (seed, step).

    other_rate: the share of tokens that cannot be recalled (prose, first mentions, questions)
        which is in the loss as well; recallable tokens always are.
    several_rate: the share of documents in which half of the keys have 2 to 4 values, as in MV.
    drill_steps: the first steps have drills alone: repeated sequences of random tokens, and
        repeated lists of a few facts. Early in training (millions of tokens) on documents, models
        predict any value of the document; drills require matching the preceding context.
    list_rate: the share of lists among the documents afterwards.
    styles: forms of documents instead of `forms`, drawn for each; keys and values are alike in
        all. RULER's needles and questions have three times as many words as values: key-value
        lists and short sentences have more questions in the same number of tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    forms: Forms
    other_rate: float = 0.1
    several_rate: float = 0.25
    drill_steps: int = 0
    list_rate: float = 0.0
    styles: tuple[Forms, ...] = ()

    @cached_property
    def _fact_sizes(self) -> dict[tuple[Forms, str, str], int]:
        """Tokens of a fact in each style, and 2 for its share of the separators."""
        sizes = {}
        for forms in (self.forms, *self.styles):
            draw = Draw(forms, "train", random.Random(0))
            for key, value, _ in _KINDS:
                text = " " + forms.state(draw(key), draw(value), value)
                tokens = self.tokenizer(text, add_special_tokens=False).input_ids
                sizes[forms, key, value] = len(tokens) + 2
        return sizes

    @cached_property
    def _drill_ids(self) -> np.ndarray:
        """The tokens of keys and values."""
        rng = random.Random(0)
        texts = [self.forms.draw(kind, rng) for kind in ("word", "number", "uuid") * 1000]
        ids = self.tokenizer([f" {x}" for x in texts], add_special_tokens=False).input_ids
        return np.unique(np.concatenate(ids))

    def batch(self, seed: int | str, step: int, batch: int, length: int) -> Batch:
        """Token ids and next-token labels, both (batch, length) int64. Another seed gives other
        documents."""
        rng = seeded_random(f"facts/{seed}/{step}")
        ids = np.empty((batch, length + 1), np.int64)
        recallable = np.empty((batch, length + 1), bool)
        for row in range(batch):
            if step < self.drill_steps and row % 2:
                ids[row], recallable[row] = self._sequence(rng, length + 1)
                continue
            listed = step < self.drill_steps or rng.random() < self.list_rate
            pieces = self._list(rng, length + 1) if listed else self._document(rng, length + 1)
            ids[row], recallable[row] = self._tokens(pieces, length + 1)
        noise = np.random.default_rng(rng.getrandbits(64)).random(ids.shape)
        labels = np.where(recallable | (noise < self.other_rate), ids, IGNORE)
        return ids[:, :-1], labels[:, 1:]

    def _tokens(self, pieces: list[Piece], count: int) -> tuple[list[int], list[bool]]:
        """The first `count` tokens of a document, with an EOS after each answer, and whether each
        token can be recalled."""
        tokens: list[int] = []
        marks: list[bool] = []
        while len(tokens) < count:
            assert pieces
            sizes = np.cumsum([len(text) for text, _ in pieces])
            enough = int(np.searchsorted(sizes, CHARACTERS * (count - len(tokens)))) + 1
            segments: list[list[Piece]] = [[]]  # each up to an answer
            for piece in pieces[:enough]:
                if segments[-1] and segments[-1][-1][1] == "answer":
                    segments.append([])
                segments[-1].append(piece)
            pieces = pieces[enough:]
            # Not piece by piece, since some tokenizers begin every text with a space.
            joined = ["".join(text for text, _ in segment) for segment in segments]
            encoded = self.tokenizer(joined, add_special_tokens=False, return_offsets_mapping=True)
            every = zip(segments, encoded.input_ids, encoded.offset_mapping, strict=True)
            for segment, ids, offsets in every:
                ends = np.cumsum([len(text) for text, _ in segment])
                last = np.maximum(np.array(offsets)[:, 1] - 1, 0)  # characters of the tokens
                recallable = np.array([bool(kind) for _, kind in segment])
                answered = segment[-1][1] == "answer"
                tokens += ids + [self.tokenizer.eos_token_id] * answered
                marks += [*recallable[np.searchsorted(ends, last, "right")], *[True] * answered]
        return tokens[:count], marks[:count]

    def _sequence(self, rng: random.Random, length: int) -> tuple[np.ndarray, np.ndarray]:
        """A drill: random tokens, repeated."""
        period = rng.randint(4, length // 2)
        tokens = np.resize(rng.choices(self._drill_ids, k=period), length)
        return tokens, np.arange(length) > period

    def _list(self, rng: random.Random, length: int) -> list[Piece]:
        """A drill: a few facts, repeated, each time in another order."""
        forms, draw = self.forms, Draw(self.forms, "train", rng)
        fitting = [kind for kind in _KINDS if 4 * self._fact_sizes[forms, *kind[:2]] <= length]
        key_kind, value_kind = _weighted(rng, fitting or _KINDS[:1])
        size = self._fact_sizes[forms, key_kind, value_kind]
        count = rng.randint(2, max(2, length // size // 2))
        facts = [(draw(key_kind), draw(value_kind)) for _ in range(count)]
        pieces = [(forms.state(*fact, value_kind), "") for fact in facts]
        for _ in range(length // count):  # certainly enough
            for key, value in rng.sample(facts, count):
                before, after = forms.state(key, value, value_kind).split(value)
                pieces += [(before.rstrip(), ""), (" " + value + after, "fact")]
        return [(forms.separator * (not mark) + text, mark) for text, mark in pieces]

    def _document(self, rng: random.Random, length: int) -> list[Piece]:
        """Facts in their haystack, then questions and answers, for at least `length` tokens.

        Sizes are estimated from words and digits; the last question is cut off where the document
        ends.
        """
        # The drawn numbers, and so the shipped trainings, depend on drawing only from several.
        forms = rng.choice(self.styles) if self.styles[1:] else (*self.styles, self.forms)[0]
        draw = Draw(forms, "train", rng)
        key_kind, value_kind = _weighted(rng, _KINDS)
        (haystack,) = _weighted(rng, _HAYSTACKS)
        context = int(length * rng.uniform(0.3, 0.9))
        several = rng.random() < self.several_rate

        share = 1.0 if haystack == "needle" else rng.uniform(0.1, 0.6)
        count = max(1, int(context * share / self._fact_sizes[forms, key_kind, value_kind]))
        facts: list[tuple[str, str]] = []
        while len(facts) < count:
            key = draw(key_kind)
            for _ in range(rng.randint(2, 4) if several and rng.random() < 0.5 else 1):
                facts.append((key, draw(value_kind)))
        rng.shuffle(facts)

        pieces: list[Piece] = [(forms.state(*fact, value_kind), "") for fact in facts]
        filler = int(context * (1 - share))
        while filler > 0:
            text = prose.sentence(rng) if haystack == "essay" else forms.noise
            text = text.lower() if forms.lowercase else text
            filler -= len(text.split()) + 1
            pieces.insert(rng.randint(0, len(pieces)), (text, ""))
        values: dict[str, list[str]] = {}  # in the order of the document, as answers list them
        for key, value in facts:
            values.setdefault(key, []).append(value)
        for key, value in facts:
            if len(values[key]) == 1 and rng.random() <= 0.15:
                _restate(rng, pieces, forms.state(key, value, value_kind), value)

        preamble, _, question = forms.template.partition("{context}")
        question += forms.answer_prefix
        if preamble:
            text = preamble.format(query="", type_needle_v=f"{value_kind}s")
            pieces.insert(0, (text.strip(), ""))
        size = sum(len(text.split()) + 3 for text, _ in pieces)
        # Lists and noise are separated as in a prompt; a restated value continues its line.
        separator = " " if haystack == "essay" else forms.separator
        pieces = [((" " if kind else separator) + text, kind) for text, kind in pieces]
        keys = list(values)
        while size < 2 * length:  # certainly enough tokens
            queried = rng.sample(keys, min(len(keys), rng.choice((1, 1, 1, 2, 3, 4))))
            answers = [value for key in queried for value in values[key]]
            text = forms.ask(question, queried, value_kind, len(answers))
            pieces += [(text, ""), (" " + ", ".join(answers), "answer")]
            size += max(6 + 4 * len(queried), len(text.split()) + len(answers))
        return pieces


def begins_with_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a space before every text, even one that begins with a space."""
    once, twice = tokenizer([" a", " a a"], add_special_tokens=False).input_ids
    return bool(twice != once + once)


def _restate(rng: random.Random, pieces: list[Piece], fact: str, value: str) -> None:
    """Insert a fact again further on in the text, where its value can be recalled."""
    first = next(i for i, (text, _) in enumerate(pieces) if text == fact)
    before, after = fact.split(value)
    place = rng.randint(first + 1, len(pieces))
    while place < len(pieces) and pieces[place][1] == "fact":
        place += 1  # not between another restated key and its value
    pieces[place:place] = [(before.rstrip(), ""), (value + after, "fact")]


def _weighted(rng: random.Random, table: Sequence[tuple]) -> tuple:
    row = rng.choices(table, weights=[row[-1] for row in table])[0]
    return row[:-1]
