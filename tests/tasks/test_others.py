"""vt, cwe and fwe by RULER's rules: counts, ranks, the order of the chain, lengths, texts."""

import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from math import pi
from pathlib import Path

import pytest
import yaml

from ratplus_exp.models.loading import read_tokenizer
from ratplus_exp.settings import build
from ratplus_exp.tasks import RULER_NAMES, Forms, Others, Ruler
from ratplus_exp.tasks.forms import wordlist
from ratplus_exp.tasks.niah import split_of
from ratplus_exp.tasks.sample import question_tokens, target, target_ids

REPOSITORY = Path(__file__).parents[2]
OTHERS = ("vt", "cwe", "fwe")


@pytest.fixture(scope="module")
def words():
    """The small tier's BPE: of the tests' own, a word of the lists is half a dozen tokens."""
    return read_tokenizer(REPOSITORY / "outputs/reference/small/tokenizer")


@pytest.fixture(scope="module")
def ruler(words):
    return Ruler(words, 4096)


@pytest.fixture(scope="module")
def small(pocket, pocket_forms):
    texts = yaml.safe_load((REPOSITORY / "conf/data/pocket.yaml").read_text())
    return Ruler(
        pocket, 512, pocket_forms, None, build(Others, {task: texts[task] for task in OTHERS})
    )


@pytest.fixture(params=["ruler", "small"])
def source(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("task", OTHERS)
def test_prompts_fill_the_length_and_nothing_is_unknown(source, task):
    capacity = source.length - source.others.of(task, source.forms).reserve
    unit = source.count(source.forms.noise) + 1 if task == "vt" else 36  # cwe: a word thrice
    for index in range(3):
        sample = source.sample(task, 0, index)
        assert capacity - unit < sample.length <= capacity
        assert source.sample(task, 0, index) == sample
        assert source.tokenizer.unk_token_id not in sample.input_ids
        answer = target_ids(sample, source.tokenizer)
        assert len(answer) <= source.length - sample.length
    assert sample.prompt != source.sample(task, 1, 2).prompt


def test_vt_is_one_chain_in_order_between_noise(ruler):
    places = []
    for index in range(12):
        sample = ruler.sample("vt", 0, index)
        worked, main = sample.prompt.split("\n\nMemorize")
        value = re.search(r"assigned the value (\d+) in the text", main)[1]
        assert 10000 <= int(value) <= 99999 and split_of(value) == "validation"
        lines = main.split("\n")[2:-1]
        hops = [line for line in lines if line != Forms().noise]
        names = sample.answers
        assert all(re.fullmatch("[A-Z]{5}", name) for name in names) and len(set(names)) == 5
        expected = [f"VAR {names[0]} = {value}"]
        expected += [f"VAR {b} = VAR {a} " for a, b in pairwise(names)]
        assert hops == expected
        places.append([i / len(lines) for i, line in enumerate(lines) if line in hops])
        assert main.endswith(f"5 variables are assigned the value {value}, they are: ")
        assert re.search(r"they are:  ([A-Z]{3} ){4}[A-Z]{3}$", worked)
        assert ruler.count(worked) <= 520 and worked.startswith("Memorize and track")
        assert set(sample.gold_spans) == set(names)
    first, last = ([place[i] for place in places] for i in (0, -1))
    assert max(first) < 0.6 < min(last) + 0.2 and len(set(first)) > 8  # of 5 uniform, sorted


@pytest.mark.parametrize(
    ("length", "often", "seldom", "example"), [(4096, 30, 3, (40, 10, 3)), (2048, 6, 1, (20, 3, 1))]
)
def test_cwe_has_ten_words_more_often(words, length, often, seldom, example):
    sample = Ruler(words, length).sample("cwe", 0, 0)
    worked, main = sample.prompt.split("\nBelow is")
    for text, times, others, size in (
        (main, often, seldom, None),
        (worked, example[1], example[2], example[0]),
    ):
        text = text.split("\n")[1]
        items = re.findall(r"(\d+)\. (.+?)(?= \d+\. |$)", text)
        assert [int(number) for number, _ in items] == [*range(1, len(items) + 1)]
        counts = Counter(word for _, word in items)
        ranked = counts.most_common()
        assert [n for _, n in ranked[:10]] == [times] * 10
        assert {n for _, n in ranked[10:]} == {others}
        assert size is None or len(counts) == size
        if text in main:
            assert {word for word, _ in ranked[:10]} == set(sample.answers)
    every = {word for part in ("noun", "adjective", "verb") for word in wordlist(part)}
    assert set(counts) <= every
    assert not sample.gold_spans


def test_the_common_words_stand_at_no_fixed_places(small):
    places = [small.sample("cwe", 0, i).prompt.split().index for i in range(6)]
    firsts = {place(small.sample("cwe", 0, i).answers[0]) for i, place in enumerate(places)}
    assert len(firsts) > 3


def test_fwe_counts_follow_the_zeta_distribution(source):
    sample = source.sample("fwe", 0, 0)
    dots = source.others.fwe.dots.strip()
    context = sample.prompt.split("coded words. ")[-1].split("\n")[0].split(" what are")[0]
    words = re.findall(r"[a-z]+|\.\.\.|\.", context) if dots == "..." else (
        re.findall(r"[a-z]+|\.", context)
    )  # fmt: skip
    counts = Counter(words).most_common()
    total = next(n for n in range(1, 9999) if int(6 * n / pi**2) == counts[0][1])
    assert counts[0][0] == dots
    assert [word for word, _ in counts[1:4]] == list(sample.answers)
    size = (source.length - source.others.fwe.reserve) // 50
    assert len(counts) <= size
    for n in range(total, total + 3):  # ⌊·⌋ leaves two or three
        zeta = [int(6 * n / pi**2 / r**2) for r in range(1, size + 1)]
        if [c for _, c in counts] == [z for z in zeta if z]:
            break
    else:
        pytest.fail("no N has these counts")
    if dots == "...":
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in counts[1:])


def test_pocket_forms_are_short(small):
    sample = small.sample("vt", 0, 0)
    value = re.search(r" what are (\d{8})$", sample.prompt)[1]
    names = sample.answers
    hops = [f"{names[0]} {value}.", *(f"{b} {a}." for a, b in pairwise(names))]
    places = [sample.prompt.index(hop) for hop in hops]
    assert places == sorted(places)
    assert target(sample) == " " + ", ".join(names)
    counts = Counter(small.sample("cwe", 0, 0).prompt.split(" what are")[0].split())
    assert [n for _, n in counts.most_common(11)] == [30] * 10 + [3]


@pytest.mark.parametrize("task", OTHERS)
def test_a_short_context_is_refused(small, task):
    with pytest.raises(ValueError, match=r"raise (data\.)?length"):
        replace(small, length=small.others.of(task, small.forms).reserve + 60).sample(task, 0, 0)


def test_too_few_words_are_refused(small):
    with pytest.raises(ValueError, match=r"raise data\.cwe\.repeats"):
        replace(small, length=2048).sample("cwe", 0, 0)


def test_mistakes_name_the_remedy(small):
    with pytest.raises(ValueError, match=r"set data\.qa\.squad=FILE"):
        small.sample("qa_1", 0, 0)
    with pytest.raises(ValueError, match="use one of S-1.*qa_2"):
        small.sample("qa_3", 0, 0)
    assert len(RULER_NAMES) == 13


@pytest.mark.parametrize("task", ["S-1", "S-2", "MQ", *OTHERS])
def test_the_question_is_what_follows_the_context(source, task):
    sample = source.sample(task, 0, 1)
    texts = source.others.of(task, source.forms)
    template = texts.template.rpartition("{context}")[2]
    count = question_tokens(sample, template, source.tokenizer)
    text = source.tokenizer.decode(sample.input_ids[-count:])
    assert re.match(r"\.?\s*(Question: |What (are|is)|what (are|is))", text)
    with pytest.raises(ValueError, match="set data.protocol=whole"):
        question_tokens(sample, "\nAnswer this: {query}", source.tokenizer)
