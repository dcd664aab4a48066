"""Generated pretraining text, rich in repeated facts: what retrieval is learnt from.

A document states facts ("otter is 4815."), alone or spread through prose or noise, restates some,
and then asks for many of them in the NIAH tasks' own form. One document has as many recallable
values as dozens of NIAH prompts, so that retrieval forms within millions of tokens, not billions.
Facts and questions lie at all distances up to the length of the document.
All values belong to the training split (`split_of`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ratplus_exp.tasks import prose
from ratplus_exp.tasks.forms import Forms, singular
from ratplus_exp.tasks.niah import Draw, seeded_random

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = tuple[np.ndarray, np.ndarray]  # token ids and next-token labels, (batch, length)
IGNORE = -100  # the label of tokens that are not in the loss

# (key, value, weight) of the facts of a document; uuid pairs are the last to be learnt (MK-3).
_KINDS = (("word", "number", 5), ("word", "uuid", 2), ("uuid", "uuid", 3))
_HAYSTACKS = (("needle", 5), ("essay", 4), ("noise", 1))


@dataclass(frozen=True, eq=False)
class Facts:
    """Batches of documents as a pure function of (seed, step).

    other_rate: the share of tokens that cannot be recalled (prose, first mentions, questions)
        which is in the loss as well; recallable tokens always are.
    several_rate: the share of documents in which half of the keys have 2 to 4 values, as in MV.
    drill_steps: for so many steps at first there are drills alone: random sequences of tokens, and
        lists of a few facts, both said over and over. On documents a young model stays for
        millions of tokens with a shortcut, any value of the document; in drills only matching what
        came before helps.
    list_rate: the share of lists among the documents afterwards.
    styles: what documents look like instead of `forms`, one of them drawn for each; keys and values
        are alike in all. RULER's needles and questions have three times as many words as values:
        key–value lists and short sentences beside them ask more in as many tokens.
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
        """Tokens of a fact in each style, and 2 for its share of what stands between facts."""
        sizes = {}
        for forms in self.styles or (self.forms,):
            draw = Draw(forms, "train", random.Random(0))
            for key, value, _ in _KINDS:
                needle = _needle(forms, draw(key), draw(value), value)
                tokens = self.tokenizer(f" {needle}", add_special_tokens=False).input_ids
                sizes[forms, key, value] = len(tokens) + 2
        return sizes

    @cached_property
    def _drill_ids(self) -> np.ndarray:
        """The tokens of keys and values."""
        rng = random.Random(0)
        texts = [self.forms.draw(kind, rng) for kind in ("word", "number", "uuid") * 1000]
        ids = self.tokenizer([f" {x}" for x in texts], add_special_tokens=False).input_ids
        return np.unique(np.concatenate(ids))

    def batch(self, seed: int, step: int, batch: int, length: int) -> Batch:
        """Token ids and labels (already those of the next token), both (batch, length) int64."""
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

    def _tokens(self, pieces: list[tuple[str, str]], count: int) -> tuple[list[int], list[bool]]:
        """The first `count` tokens of a document, and whether each can be recalled."""
        tokens: list[int] = []
        marks: list[bool] = []
        for start in range(0, len(pieces), 64):  # a document goes on for longer than is needed
            some = pieces[start : start + 64]
            encoded = self.tokenizer([text for text, _ in some], add_special_tokens=False)
            for piece, (_, mark) in zip(encoded.input_ids, some, strict=True):
                ends = [self.tokenizer.eos_token_id] if mark == "answer" else []
                tokens += piece + ends
                marks += [bool(mark)] * (len(piece) + len(ends))
            if len(tokens) >= count:
                break
        assert len(tokens) >= count
        return tokens[:count], marks[:count]

    def _sequence(self, rng: random.Random, length: int) -> tuple[np.ndarray, np.ndarray]:
        """A drill: random tokens, said over and over."""
        period = rng.randint(4, length // 2)
        tokens = np.resize(rng.choices(self._drill_ids, k=period), length)
        return tokens, np.arange(length) > period

    def _list(self, rng: random.Random, length: int) -> list[tuple[str, str]]:
        """A drill: a few facts, said over and over, each time in another order."""
        forms, draw = self.forms, Draw(self.forms, "train", rng)
        fitting = [kind for kind in _KINDS if 4 * self._fact_sizes[forms, *kind[:2]] <= length]
        key_kind, value_kind = _weighted(rng, fitting or _KINDS[:1])
        size = self._fact_sizes[forms, key_kind, value_kind]
        count = rng.randint(2, max(2, length // size // 2))
        facts = [(draw(key_kind), draw(value_kind)) for _ in range(count)]
        pieces = [(_needle(forms, *fact, value_kind), "") for fact in facts]
        for _ in range(length // count):  # certainly enough
            for key, value in rng.sample(facts, count):
                before, after = _needle(forms, key, value, value_kind).split(value)
                pieces += [(before.rstrip(), ""), (" " + value + after, "fact")]
        return [(forms.separator * (not mark) + text, mark) for text, mark in pieces]

    def _document(self, rng: random.Random, length: int) -> list[tuple[str, str]]:
        """Pieces of text, each with "" or, where it can be recalled, "fact" or "answer".

        An answer is followed by EOS. Sizes are counted in words and digits, a close enough guess
        of tokens: the last question is cut off wherever the document is full.
        """
        # Only where there is a choice is a random number used up.
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

        pieces = [(_needle(forms, key, value, value_kind), "") for key, value in facts]
        filler = int(context * (1 - share))
        while filler > 0:
            text = prose.sentence(rng) if haystack == "essay" else forms.noise
            text = text.lower() if forms.lowercase else text
            filler -= len(text.split()) + 1
            pieces.insert(rng.randint(0, len(pieces)), (text, ""))
        # What order the facts came to stand in is the order in which answers list them.
        values: dict[str, list[str]] = {}
        for key, value in facts:
            values.setdefault(key, []).append(value)
        needles = {key: _needle(forms, key, own[0], value_kind) for key, own in values.items()}
        self._restate(rng, facts, values, needles, pieces)

        preamble, _, question = forms.template.partition("{context}")
        question += forms.answer_prefix
        if preamble:
            pieces.insert(0, (_filled(preamble, "", f"{value_kind}s").strip(), ""))
        size = sum(len(text.split()) + 3 for text, _ in pieces)
        # The units of a list or of noise stand apart as in a prompt; what is marked goes on.
        apart = " " if haystack == "essay" else forms.separator
        pieces = [((" " if mark else apart) + text, mark) for text, mark in pieces]
        keys = list(values)
        while size < 2 * length:  # certainly enough, whatever a word costs
            asked = rng.sample(keys, min(len(keys), rng.choice((1, 1, 1, 2, 3, 4))))
            query = ", ".join(asked[:-1]) + (forms.query_joiner if asked[1:] else "") + asked[-1]
            answers = [value for key in asked for value in values[key]]
            several_asked = len(answers) > 1
            text = _filled(
                question if several_asked else singular(question),
                query,
                f"{value_kind}s" if several_asked else value_kind,
            )
            pieces += [(text, ""), (" " + ", ".join(answers), "answer")]
            size += max(6 + 4 * len(asked), len(text.split()) + len(answers))
        return pieces

    def _restate(
        self,
        rng: random.Random,
        facts: Sequence[tuple[str, str]],
        values: dict[str, list[str]],
        needles: dict[str, str],
        pieces: list[tuple[str, str]],
    ) -> None:
        """Say some single-valued facts again further on in the text, where they are recallable."""
        for key, value in facts:
            if len(values[key]) > 1 or rng.random() > 0.15:
                continue
            needle = needles[key]
            first = next(i for i, (text, _) in enumerate(pieces) if text == needle)
            before, after = needle.split(value)
            spot = rng.randint(first + 1, len(pieces))
            while spot < len(pieces) and pieces[spot][1] == "fact":
                spot += 1  # never between a restated key and its value
            pieces[spot:spot] = [(before.rstrip(), ""), (value + after, "fact")]


def _needle(forms: Forms, key: str, value: str, kind: str) -> str:
    return forms.needle.format(key=key, value=value, type_needle_v=f"{kind}s")


def _filled(text: str, query: str, kind: str) -> str:
    return text.format(query=query, type_needle_v=kind)


def _weighted(rng: random.Random, table: Sequence[tuple]) -> tuple:
    row = rng.choices(table, weights=[row[-1] for row in table])[0]
    return row[:-1]
