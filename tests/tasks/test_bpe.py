"""The small tier's tokenizer: what it does to numbers, and that the shipped file is its own."""

import json
import re
from pathlib import Path

import pytest

from ratplus_exp.models.loading import read_tokenizer
from ratplus_exp.tasks import TASKS, Forms, Ruler
from ratplus_exp.tasks.bpe import train_bpe
from ratplus_exp.tasks.sample import target, target_ids

SHIPPED = Path(__file__).parents[2] / "outputs/reference/small/tokenizer"


@pytest.fixture(scope="module")
def tokenizer():
    return read_tokenizer(SHIPPED)


def pieces(tokenizer, text):
    return [tokenizer.decode([i]) for i in tokenizer(text).input_ids]


def test_it_is_small_and_starts_with_padding_and_eos(tokenizer):
    assert len(tokenizer) == 8192
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert (SHIPPED / "tokenizer.json").stat().st_size < 2**21


@pytest.mark.slow  # seconds of work, and a minute where the machine is busy
def test_training_it_again_gives_the_shipped_file():
    shipped = json.loads((SHIPPED / "tokenizer.json").read_text())
    assert json.loads(train_bpe().to_str())["model"] == shipped["model"]


def test_digits_come_in_groups_of_three_from_the_left(tokenizer):
    assert pieces(tokenizer, "is: 4815162.") == ["is", ":", " ", "481", "516", "2", "."]
    assert pieces(tokenizer, "0423") == ["042", "3"]
    for n in range(1000):
        assert len(tokenizer(str(n)).input_ids) == 1


def test_no_token_joins_digits_and_letters_of_a_uuid(tokenizer):
    for piece in pieces(tokenizer, " 9f86d081-884c-4d65-9a2f-eaa0c55ad015"):
        assert re.fullmatch(r"[ -]?|[0-9]{1,3}|[ ]?[a-f]+", piece), piece


@pytest.mark.parametrize("text", ["The red fox.", " two  spaces\n\n\tand tabs ", "naïve — 漢字 🙂"])
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("task", TASKS)
def test_an_answer_continues_the_prompt_and_fits(tokenizer, task):
    forms = Forms()
    sample = Ruler(tokenizer, 700, forms).sample(task, seed=0, index=0)
    answer = target_ids(sample, tokenizer)
    assert tokenizer.decode(answer[:-1]) == target(sample)
    assert answer[-1] == tokenizer.eos_token_id and len(answer) <= forms.reserve
    # Gold positions are those of the value's digits and letters.
    for value, spans in sample.gold_spans.items():
        for start, end in spans:
            assert tokenizer.decode(sample.input_ids[start:end]).strip() == value
