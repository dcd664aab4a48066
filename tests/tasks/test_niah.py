"""NIAH samples: RULER's tasks and texts, pure, disjoint between splits, filled, spans complete."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest

from ratplus_exp.tasks import TASKS, Forms, Ruler
from ratplus_exp.tasks.niah import SPLITS, split_of
from ratplus_exp.tasks.sample import target, target_ids

UUID = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
HEX = "[0-9a-f]{32}"


@pytest.fixture(scope="module")
def ruler(bpe):
    """RULER's prompts at 4096 tokens."""
    return Ruler(bpe, 4096)


@pytest.fixture(scope="module")
def small(pocket, pocket_forms):
    return Ruler(pocket, 512, pocket_forms)


@pytest.fixture(params=["ruler", "small"])
def niah(request):
    return request.getfixturevalue(request.param)


def test_tasks_are_the_papers_eight():
    assert {name: tuple(vars(spec).values()) for name, spec in TASKS.items()} == {
        "S-1": ("niah_single_1", "noise", "word", "number", 1, 1, 1),
        "S-2": ("niah_single_2", "essay", "word", "number", 1, 1, 1),
        "S-3": ("niah_single_3", "essay", "word", "uuid", 1, 1, 1),
        "MK-1": ("niah_multikey_1", "essay", "word", "number", 4, 1, 1),
        "MK-2": ("niah_multikey_2", "needle", "word", "number", 1, 1, 1),
        "MK-3": ("niah_multikey_3", "needle", "uuid", "uuid", 1, 1, 1),
        "MV": ("niah_multivalue", "essay", "word", "number", 1, 4, 1),
        "MQ": ("niah_multiquery", "essay", "word", "number", 4, 1, 4),
    }


@pytest.mark.parametrize("task", TASKS)
def test_prompt_fills_the_length_but_for_the_reserve(niah, task):
    capacity = niah.length - niah.forms.reserve
    for index in range(3):
        sample = niah.sample(task, 0, index)
        assert 0.95 * capacity <= sample.length <= capacity
        ids = niah.tokenizer(sample.prompt, add_special_tokens=False).input_ids
        assert tuple(ids) == sample.input_ids  # whole, nothing truncated
        assert sample.length == len(ids)


@pytest.mark.parametrize("task", TASKS)
def test_spans_are_all_occurrences_and_decode_to_the_value(niah, task):
    for split in SPLITS:
        sample = niah.sample(task, 1, 0, split)
        spec = TASKS[task]
        assert len(sample.answers) == spec.queries * spec.values == len(sample.gold_spans)
        for value in sample.answers:
            spans = sample.gold_spans[value]
            assert len(spans) == sample.prompt.count(value) == 1
            for start, end in spans:
                assert niah.tokenizer.decode(sample.input_ids[start:end]).strip() == value


def test_repeated_value_has_a_span_for_each_occurrence(bpe):
    forms = replace(Forms(), needle="{key} is {value}, yes, {value}.")
    sample = Ruler(bpe, 1024, forms).sample("S-2", 0, 0)
    (spans,) = sample.gold_spans.values()
    assert len(spans) == 2
    for start, end in spans:
        assert bpe.decode(sample.input_ids[start:end]).strip() == sample.answers[0]


def test_sample_is_a_pure_function_of_its_name(small, pocket, pocket_forms):
    sample = small.sample("MQ", 3, 7)
    small.sample("S-1", 0, 0)
    assert small.sample("MQ", 3, 7) == sample
    assert Ruler(pocket, 512, pocket_forms).sample("MQ", 3, 7) == sample
    assert sample.id == "MQ/validation/3/7"
    others = [small.sample("MQ", 3, 8), small.sample("MQ", 4, 7), small.sample("MQ", 3, 7, "train")]
    assert len({sample.prompt, *(other.prompt for other in others)}) == 4


def test_sample_is_the_same_in_another_process(small, pocket, tmp_path):
    pocket.save_pretrained(tmp_path)
    code = (
        "import sys, yaml; from transformers import AutoTokenizer\n"
        "from ratplus_exp.tasks import Ruler, Forms\n"
        "forms = Forms(**yaml.safe_load(open('conf/data/pocket.yaml'))['forms'])\n"
        "niah = Ruler(AutoTokenizer.from_pretrained(sys.argv[1]), 512, forms)\n"
        "print('\\n'.join(niah.sample(task, 0, 5).prompt for task in ('MK-2', 'MQ')))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    expected = [small.sample(task, 0, 5).prompt for task in ("MK-2", "MQ")]
    assert result.stdout.splitlines() == expected


@pytest.mark.parametrize("task", TASKS)
def test_every_value_is_of_its_split(small, ruler, task):
    for niah, uuid in ((small, HEX), (ruler, UUID)):
        for split in SPLITS:
            sample = niah.sample(task, 0, 0, split)
            pattern = (
                uuid if TASKS[task].value == "uuid" else rf"\b\d{{{niah.forms.number_digits}}}\b"
            )
            values = re.findall(pattern, sample.prompt)
            assert len(values) >= len(sample.answers)
            assert {split_of(value) for value in values} == {split}


def test_split_is_by_the_sum_of_character_codes():
    assert sum(map(ord, "1000")) % 5 == 3 and split_of("1000") == "train"
    assert sum(map(ord, "1002")) % 5 == 0 and split_of("1002") == "validation"


def test_needle_haystack_repeats_neither_key_nor_value(small, ruler):
    found = re.findall(r"(\S+) (\d{8})\.", small.sample("MK-2", 0, 0).prompt)
    assert len(found) > 50
    text = ruler.sample("MK-3", 0, 0).prompt
    uuids = re.findall(rf"for ({UUID}) is: ({UUID})\.", text)
    assert len(uuids) > 10
    for pairs in (found, uuids):
        assert len({key for key, _ in pairs}) == len({value for _, value in pairs}) == len(pairs)


def test_ruler_prompt_word_for_word_with_one_answer(ruler):
    sample = ruler.sample("S-1", 0, 0)
    key = re.search(r"for (\S+) is: ", sample.prompt)[1]
    needle = f"One of the special magic numbers for {key} is: {sample.answers[0]}."
    first, *lines, last = sample.prompt.split("\n")
    assert first == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    assert set(lines) == {Forms().noise, needle}
    assert lines.count(needle) == 1
    assert last == (
        f"What is the special magic number for {key} mentioned in the provided text?"
        f" The special magic number for {key} mentioned in the provided text is"
    )


def test_ruler_prompt_word_for_word_with_several_answers(ruler):
    sample = ruler.sample("MQ", 0, 0)
    needles = dict(re.findall(r"One of the special magic numbers for (\S+) is: (\d+)\.",
                              sample.prompt))  # fmt: skip
    keys = {value: key for key, value in needles.items()}
    a, b, c, d = (keys[value] for value in sample.answers)  # answered in the order of the query
    assert sample.prompt.startswith("Some special magic numbers are hidden within the following")
    assert sample.prompt.endswith(
        f"\nWhat are all the special magic numbers for {a}, {b}, {c}, and {d} mentioned in the "
        f"provided text? The special magic numbers for {a}, {b}, {c}, and {d} mentioned in the "
        "provided text are"
    )


def test_ruler_uuid_needles_are_plural_and_questions_singular(ruler):
    prompt = ruler.sample("MK-3", 0, 0).prompt
    assert "One of the special magic uuids for" in prompt
    assert prompt.startswith("A special magic uuid is hidden")


def test_pocket_prompts_are_short_and_lower_case(small):
    sample = small.sample("MQ", 0, 0)
    assert sample.prompt == sample.prompt.lower()
    question = r" what are the numbers of (\w+), (\w+), (\w+), (\w+)\?"
    keys = re.search(question, sample.prompt).groups()
    needles = dict(re.findall(r"([a-z]+) (\d{8})\.", sample.prompt))
    assert tuple(needles[key] for key in keys) == sample.answers  # in the order of the question


def test_multivalue_asks_one_key_for_four_values(small):
    sample = small.sample("MV", 0, 0)
    key = re.search(r"what are the numbers of (\w+)\? \1$", sample.prompt)[1]
    values = re.findall(rf"\b{key} (\d{{8}})\.", sample.prompt)
    assert tuple(values) == sample.answers
    assert len(set(values)) == 4


def test_needles_stand_at_all_depths(small):
    depths = []
    for index in range(60):
        sample = small.sample("S-2", 0, index)
        (((start, _),),) = sample.gold_spans.values()
        depths.append(start / sample.length)
    assert min(depths) < 0.15 and max(depths) > 0.85
    assert 0.3 < sum(depths) / len(depths) < 0.7


def test_target_is_joined_by_commas_and_tokenised_behind_the_prompt(niah):
    sample = niah.sample("MV", 0, 0)
    assert target(sample) == " " + ", ".join(sample.answers)
    ids = target_ids(sample, niah.tokenizer)
    text = niah.tokenizer.decode([*sample.input_ids, *ids[:-1]])
    assert text.strip() == sample.prompt + target(sample)
    assert ids[-1] == niah.tokenizer.eos_token_id


def test_essay_file_is_taken_from_its_beginning_and_repeated(bpe, tmp_path):
    path = tmp_path / "essay.txt"
    path.write_text("Hackers  and painters\nare alike. " * 3 + "Makers make good things.")
    sample = Ruler(bpe, 1024, Forms(), str(path)).sample("S-2", 0, 0)
    context = re.sub(r"One of the special magic numbers for \S+ is: \d+\. ?", "",
                     sample.prompt.split("\n")[1]).split()  # fmt: skip
    words = path.read_text().split()
    assert len(context) > 2 * len(words)
    assert context == (words * 100)[: len(context)]


def test_essay_that_cannot_be_read_is_refused_at_once(bpe, tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        Ruler(bpe, 1024, Forms(), str(tmp_path / "absent.txt"))


@pytest.mark.parametrize("task", TASKS)
def test_needles_that_do_not_fit_are_refused(bpe, task):
    with pytest.raises(ValueError, match="raise length"):
        Ruler(bpe, 160).sample(task, 0, 0)


def test_tight_length_gets_the_needles_alone(pocket, pocket_forms):
    """14 tokens of needle and question fit, whatever little haystack goes along."""
    sample = Ruler(pocket, 16 + pocket_forms.reserve, pocket_forms).sample("S-1", 0, 0)
    assert re.fullmatch(r"(\w+) \d{8}\. what is the number of \1\? \1", sample.prompt)


def test_too_few_keys_are_an_error(pocket, pocket_forms):
    with pytest.raises(ValueError, match="raise forms.key_count"):
        Ruler(pocket, 512, replace(pocket_forms, key_count=20)).sample("MK-2", 0, 0)


def test_mistakes_of_the_caller_name_the_remedy(pocket, pocket_forms, small):
    with pytest.raises(ValueError, match="use one of S-1, S-2"):
        small.sample("S-9", 0, 0)
    with pytest.raises(ValueError, match="use train or validation"):
        small.sample("S-1", 0, 0, "test")
    with pytest.raises(ValueError, match="raise length or lower reserve"):
        Ruler(pocket, 16, pocket_forms)


@pytest.mark.parametrize("task", ["MV", "MQ"])
def test_question_order_follows_the_question_and_then_the_document(pocket, pocket_forms, task):
    source = Ruler(pocket, 256, replace(pocket_forms, answer_order="question"))
    for index in range(5):
        sample = source.sample(task, 0, index)
        place = {value: sample.prompt.index(value) for value in sample.answers}
        question = sample.prompt[max(place.values()) :]
        keys = [sample.prompt[: place[value]].split()[-1] for value in sample.answers]
        order = [
            (question.index(key), place[value])
            for key, value in zip(keys, sample.answers, strict=True)
        ]
        assert order == sorted(order)


def test_creation_order_is_rulers_permutation_and_places_are_counted_first(bpe, tmp_path):
    path = tmp_path / "essay.txt"
    path.write_text(" ".join(f"Sentence {i} ends." for i in range(5000)))
    source = Ruler(bpe, 2048, Forms(), str(path))
    for index in range(6):
        sample = source.sample("MV", 0, index)
        order = sorted(sample.answers, key=sample.prompt.index)
        assert [order.index(value) for value in sample.answers] == [3, 1, 0, 2]
        needle = r"One of the special magic numbers for \S+ is: \d+\. ?"
        bare = re.sub(needle, "", sample.prompt.split("\n")[1])
        total = len(re.findall("Sentence", bare))
        places = {total * round(100 * i / 39) // 100 for i in range(40)}
        for found in re.finditer(needle, sample.prompt):
            before = re.sub(needle, "", sample.prompt[: found.start()])
            assert before.count("Sentence") in places
