"""qa_1 and qa_2 from files in the published formats of SQuAD and HotpotQA."""

import json
import re
from dataclasses import replace

import pytest

from ratplus_exp.tasks import Others, Ruler, exact, substring
from ratplus_exp.tasks.niah import split_of
from ratplus_exp.tasks.qa import QA
from ratplus_exp.tasks.sample import target


@pytest.fixture(scope="module")
def squad(tmp_path_factory):
    """20 articles of 5 paragraphs with two questions each, one of them without an answer."""
    path = tmp_path_factory.mktemp("qa") / "dev-v2.0.json"
    articles = [
        {
            "title": f"Town {a}",
            "paragraphs": [
                {
                    "context": f"In town {a}, house {p} is of colour{a}x{p}. It has a garden.",
                    "qas": [
                        {
                            "question": f"Of which colour is house {p} of town {a}?",
                            "id": f"{a}-{p}",
                            "is_impossible": False,
                            "answers": [
                                {"text": f"of colour{a}x{p}", "answer_start": 22},
                                {"text": f"colour{a}x{p}", "answer_start": 25},
                                {"text": f"colour{a}x{p}", "answer_start": 25},
                            ],
                        },
                        {"question": "Why?", "id": "x", "is_impossible": True, "answers": []},
                    ],
                }
                for p in range(5)
            ],
        }
        for a in range(20)
    ]
    path.write_text(json.dumps({"version": "v2.0", "data": articles}))
    return str(path)


@pytest.fixture(scope="module")
def hotpotqa(tmp_path_factory):
    path = tmp_path_factory.mktemp("qa") / "hotpot_dev_distractor_v1.json"
    entries = [
        {
            "_id": str(q),
            "question": f"Is river {q} longer than river {q + 1}?",
            "answer": "yes" if q % 2 else "no",
            "supporting_facts": [[f"River {q}", 0], [f"River {q + 1}", 0]],
            "context": [[f"River {q + d}", [f"It is {q + d} miles long.", " It is wide."]]
                        for d in range(10)],
        }
        for q in range(40)
    ]  # fmt: skip
    path.write_text(json.dumps(entries))
    return str(path)


@pytest.fixture
def ruler(bpe, squad, hotpotqa):
    return Ruler(bpe, 1024, others=Others(qa=QA(squad=squad, hotpotqa=hotpotqa)))


def documents(sample):
    context = sample.prompt.split("given documents.\n\n", 2)[1].split("\n\nAnswer the")[0]
    return re.findall(r"Document (\d+):\n(.*?)(?=\n\nDocument |$)", context, re.DOTALL)


def test_squad_prompts_hold_the_paragraph_and_first_those_of_its_article(ruler):
    places = set()
    for index in range(8):
        sample = ruler.sample("qa_1", 0, index)
        p, town = re.search(r"is house (\d+) of town (\d+)\? Answer:$", sample.prompt).groups()
        found = documents(sample)
        assert [int(number) for number, _ in found] == [*range(1, len(found) + 1)]
        texts = [text for _, text in found]
        own = f"In town {town}, house {p} is of colour{town}x{p}. It has a garden."
        assert texts.count(own) == 1 and split_of(own) == "validation"
        assert sum(f"In town {town}," in text for text in texts) == 5 < len(set(texts))
        assert sample.answers == (f"of colour{town}x{p}", f"colour{town}x{p}")
        assert target(sample) == f" colour{town}x{p}"
        assert 1024 - 32 - 60 < sample.length <= 1024 - 32
        places.add(texts.index(own))
    assert len(places) > 3


def test_splits_share_no_paragraph_and_seeds_no_order(ruler):
    def questions(split, seed=0, count=10):
        prompts = [ruler.sample("qa_1", seed, i, split).prompt for i in range(count)]
        return [re.search(r"Question: (.*) Answer:$", prompt)[1] for prompt in prompts]

    validation, train = questions("validation"), questions("train", count=30)
    assert len(set(validation)) == 10 and not set(validation) & set(train)
    assert questions("validation", 1) != validation
    with pytest.raises(ValueError, match=r"questions of the validation split: lower data.examples"):
        ruler.sample("qa_1", 0, 100)


def test_hotpotqa_has_titles_and_all_of_its_paragraphs(ruler):
    sample = ruler.sample("qa_2", 0, 0)
    number = int(re.search(r"Is river (\d+) longer", sample.prompt)[1])
    texts = [text for _, text in documents(sample)]
    for d in range(10):
        assert f"River {number + d}\nIt is {number + d} miles long. It is wide." in texts
    assert len(texts) > 12 and sample.answers == ("yes" if number % 2 else "no",)
    assert not sample.gold_spans


def test_one_answer_of_several_is_enough():
    assert substring("It is Paris, I think", ["France", "paris"], one_of=True) == 1.0
    assert substring("It is Paris", ["France", "paris"]) == 0.5
    assert exact(" Paris", ["Paris", "France"], one_of=True) == 1.0
    assert exact(" Paris, France", ["Paris", "Rome"], one_of=True) == 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "cannot be read"),
        ("{}", "not in squad's format"),
        ('{"data": []}', "no question with an answer"),
    ],
)
def test_files_that_are_not_the_published_ones_are_refused(ruler, tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    qa = QA(squad=str(tmp_path / "x.json"))
    with pytest.raises(ValueError, match=message):
        replace(ruler, others=Others(qa=qa)).sample("qa_1", 0, 0)
