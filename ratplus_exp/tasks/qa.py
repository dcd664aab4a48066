"""qa_1 and qa_2: questions about one document among many, from the user's SQuAD or HotpotQA file.

Rules and texts are RULER's (NVIDIA/RULER, scripts/data/synthetic/qa.py); the documents are shuffled
by sample, and a question belongs to one split: SQuAD's with its paragraph, HotpotQA's by itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from ratplus_exp.settings import Text
from ratplus_exp.tasks.forms import Words
from ratplus_exp.tasks.niah import Draw, seeded_random, split_of
from ratplus_exp.tasks.others import Draft, Texts


@dataclass(frozen=True)
class QA(Texts):
    """squad, hotpotqa: the files, SQuAD's dev-v2.0.json (qa_1) and HotpotQA's
    hotpot_dev_distractor_v1.json (qa_2)."""

    template: Words = (
        "Answer the question based on the given documents. Only give me the answer and do not"
        " output any other words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the"
        " question based on the given documents. Only give me the answer and do not output any"
        " other words.\n\nQuestion: {query}"
    )
    answer_prefix: Words = " Answer:"
    reserve: Annotated[int, Field(ge=1, le=10**6)] = 32
    document: Words = "Document {number}:\n{text}"
    squad: Text | None = None
    hotpotqa: Text | None = None

    def draft(self, draw: Draw, name: str, file: str, read: Reader, seed: int, index: int) -> Draft:
        """The question of that index in an order of the split's questions that is the seed's."""
        documents, questions = _read(file, read)
        here = _order(file, read, draw.split, seed)
        if draw.split == "validation" and index >= len(here):
            raise ValueError(
                f"{file} has {len(here)} questions of the validation split: lower data.examples"
            )
        query, answers, own, near, _ = questions[here[index % len(here)]]
        near = tuple(draw.rng.sample(near, len(near)))
        taken = {*own, *near}
        far = [i for i in range(len(documents)) if i not in taken]
        draw.rng.shuffle(far)
        every = [*own, *near, *far]

        def prompt(n: int) -> str:
            chosen = [every[i % len(every)] for i in range(len(own) + n)]  # repeated if too few
            seeded_random(f"{name}/{n}").shuffle(chosen)
            texts = (
                self.document.format(number=i, text=documents[d])
                for i, d in enumerate(chosen, start=1)
            )
            return self.fill("\n\n".join(texts), query)

        return Draft(prompt, answers, self.prefix(query), one_of=True)


class Question(NamedTuple):
    """query, accepted answers, numbers of its documents, of others of its article, and the text by
    which it belongs to a split."""

    query: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    article: tuple[int, ...]
    owner: str


Questions = tuple[list[str], list[Question]]
Reader = Callable[[Any], Questions]


def squad(data: Any) -> Questions:
    """All paragraphs, and the questions that have an answer."""
    articles = [[p["context"] for p in article["paragraphs"]] for article in data["data"]]
    documents = sorted({text for article in articles for text in article})
    number = {text: i for i, text in enumerate(documents)}
    questions = []
    for article in data["data"]:
        around = dict.fromkeys(number[p["context"]] for p in article["paragraphs"])
        for paragraph in article["paragraphs"]:
            text = paragraph["context"]
            others = tuple(i for i in around if i != number[text])
            for qa in paragraph["qas"]:
                answers = tuple(dict.fromkeys(a["text"] for a in qa["answers"]))
                if answers and not qa.get("is_impossible", False):
                    own = (number[text],)
                    questions.append(Question(qa["question"], answers, own, others, text))
    return documents, questions


def hotpotqa(data: Any) -> Questions:
    """All paragraphs under their titles, and all questions with their ten paragraphs."""
    every = [[f"{title}\n{''.join(p)}" for title, p in entry["context"]] for entry in data]
    documents = sorted({text for texts in every for text in texts})
    number = {text: i for i, text in enumerate(documents)}
    return documents, [
        Question(
            entry["question"],
            (entry["answer"],),
            tuple(dict.fromkeys(number[text] for text in texts)),
            (),
            entry["question"],
        )
        for entry, texts in zip(data, every, strict=True)
    ]


@lru_cache(maxsize=4)
def _order(file: str, read: Reader, split: str, seed: int) -> list[int]:
    """The numbers of a split's questions, in the order of a seed."""
    _, questions = _read(file, read)
    here = [i for i, question in enumerate(questions) if split_of(question.owner) == split]
    if not here:
        raise ValueError(f"{file} has no question of the {split} split: give the published file")
    seeded_random(f"{read.__name__}/{seed}").shuffle(here)
    return here


@lru_cache(maxsize=4)
def _read(file: str, read: Reader) -> Questions:
    try:
        documents, questions = read(json.loads(Path(file).read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}): give the published JSON file") from None
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{file} is not in {read.__name__}'s format ({error!r}): give the published JSON file"
        ) from None
    if not questions:
        raise ValueError(f"{file} has no question with an answer: give the published JSON file")
    return documents, questions
