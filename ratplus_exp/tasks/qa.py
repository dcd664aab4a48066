"""qa_1 and qa_2: questions about one document among many, from the user's SQuAD or HotpotQA file.

Rules and texts are RULER's (NVIDIA/RULER, scripts/data/synthetic/qa.py); the documents are shuffled
by sample, and a question belongs to one split: SQuAD's with its paragraph, HotpotQA's by itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ratplus_exp.settings import Text
from ratplus_exp.tasks.forms import Reserve, Words
from ratplus_exp.tasks.niah import QA_FILES, Draft, Draw, seeded_random, split_of
from ratplus_exp.tasks.others import Texts

if TYPE_CHECKING:
    from ratplus_exp.tasks.ruler import Ruler


@dataclass(frozen=True)
class QA(Texts):
    """squad, hotpotqa: the files, SQuAD's dev-v2.0.json (qa_1) and HotpotQA's
    hotpot_dev_distractor_v1.json (qa_2)."""

    asked = {"template": ({"context", "query"}, set()), "answer_prefix": (set(), {"query"})}
    formats = {"document": ({"text"}, {"number"})}
    template: Words = (
        "Answer the question based on the given documents. Only give me the answer and do not"
        " output any other words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the"
        " question based on the given documents. Only give me the answer and do not output any"
        " other words.\n\nQuestion: {query}"
    )
    answer_prefix: Words = " Answer:"
    reserve: Reserve = 32
    document: Words = "Document {number}:\n{text}"
    squad: Text | None = None
    hotpotqa: Text | None = None

    def draft(self, draw: Draw, name: str, source: Ruler) -> Draft:
        """The question of the name's index; its seed shuffles the split's questions."""
        task, split, seed, index = name.split("/")
        data_set = QA_FILES[task]
        file = getattr(self, data_set)
        if file is None:
            raise ValueError(no_file(task))
        documents, questions = _read(file, data_set)
        order = _order(file, data_set, split, seed)
        if split == "validation" and int(index) >= len(order):
            raise ValueError(
                f"{file} has {len(order)} questions of the validation split: lower data.examples"
            )
        question = questions[order[int(index) % len(order)]]
        article = draw.rng.sample(question.article, len(question.article))
        used = {*question.documents, *article}
        others = [text for text in documents if text not in used]
        draw.rng.shuffle(others)
        pool = [*question.documents, *article, *others]

        def context(n: int) -> str:
            chosen = list(islice(cycle(pool), len(question.documents) + n))  # repeated if too few
            seeded_random(f"{name}/{n}").shuffle(chosen)
            texts = (self.document.format(number=i, text=d) for i, d in enumerate(chosen, start=1))
            return "\n\n".join(texts)

        return Draft(self.ask(question.query), context, question.answers)


class Question(NamedTuple):
    query: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]  # with the answer
    article: tuple[str, ...]  # other documents of the same article
    split_text: str  # determines the split


Questions = tuple[list[str], list[Question]]  # documents and questions


def no_file(task: str) -> str:
    return f"{task} needs a file: set data.qa.{QA_FILES[task]}=FILE, or leave it out of the tasks"


def squad(data: Any) -> Questions:
    """All paragraphs, and the questions that have an answer."""
    documents: set[str] = set()
    questions = []
    for article in data["data"]:
        texts = dict.fromkeys(paragraph["context"] for paragraph in article["paragraphs"])
        documents |= texts.keys()
        for paragraph in article["paragraphs"]:
            text = paragraph["context"]
            others = tuple(other for other in texts if other != text)
            for qa in paragraph["qas"]:
                answers = tuple(dict.fromkeys(a["text"] for a in qa["answers"]))
                if answers and not qa.get("is_impossible", False):
                    questions.append(Question(qa["question"], answers, (text,), others, text))
    return sorted(documents), questions


def hotpotqa(data: Any) -> Questions:
    """All paragraphs under their titles, and all questions with their ten paragraphs."""
    questions = []
    for entry in data:
        query = entry["question"]
        texts = dict.fromkeys(f"{title}\n{''.join(p)}" for title, p in entry["context"])
        questions.append(Question(query, (entry["answer"],), tuple(texts), (), query))
    return sorted({text for question in questions for text in question.documents}), questions


@lru_cache(maxsize=4)
def _order(file: str, data_set: str, split: str, seed: str) -> list[int]:
    """The numbers of a split's questions, shuffled by the seed."""
    _, questions = _read(file, data_set)
    order = [i for i, question in enumerate(questions) if split_of(question.split_text) == split]
    if not order:
        raise ValueError(f"{file} has no question of the {split} split: give the published file")
    seeded_random(f"{data_set}/{seed}").shuffle(order)
    return order


@lru_cache(maxsize=4)
def _read(file: str, data_set: str) -> Questions:
    try:
        data = json.loads(Path(file).read_text("utf-8"))
        documents, questions = {"squad": squad, "hotpotqa": hotpotqa}[data_set](data)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}): give the published JSON file") from None
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{file} is not in {data_set}'s format ({error!r}): give the published JSON file"
        ) from None
    if not questions:
        raise ValueError(f"{file} has no question with an answer: give the published JSON file")
    return documents, questions
