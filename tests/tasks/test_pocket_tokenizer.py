"""The pocket tokenizer has no unknown tokens in pocket prompts, and decodes them back."""

import random
import re
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from ratplus_exp.tasks import TASKS, Forms, Ruler, pocket_tokenizer
from ratplus_exp.tasks.niah import SPLITS
from ratplus_exp.tasks.prose import paragraph
from ratplus_exp.tasks.sample import target, target_ids


def pieces(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)


def test_pieces_carry_their_space(pocket):
    assert pieces(pocket, "apricot is 4815. facade9f, beadacbb?") == [
        " apricot", " is", " 48", "15", ".",
        " fa", "ca", "de", "9f", ",",
        " be", "ad", "ac", "bb", "?",
    ]  # fmt: skip


def test_special_tokens_and_size(pocket):
    assert (pocket.pad_token_id, pocket.eos_token_id, pocket.unk_token_id) == (0, 1, 2)
    assert pocket.bos_token is None
    assert pocket("the mill").input_ids == pocket("the mill", add_special_tokens=False).input_ids
    assert 1200 < len(pocket) < 2000


def test_text_has_one_leading_space_either_way(pocket):
    assert pocket("the mill").input_ids == pocket(" the mill").input_ids
    assert pocket.decode(pocket("the mill").input_ids) == " the mill"
    assert pocket("the mill", return_offsets_mapping=True).offset_mapping[1] == (3, 8)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_samples_round_trip_without_unknowns(pocket, pocket_forms, task, split):
    niah = Ruler(pocket, 512, pocket_forms)
    for index in range(10):
        sample = niah.sample(task, 0, index, split)
        assert pocket.unk_token_id not in sample.input_ids
        assert pocket.decode(sample.input_ids) == " " + sample.prompt
        answer = target_ids(sample, pocket)
        assert answer == (*pocket(target(sample)).input_ids, pocket.eos_token_id)
        assert pocket.decode(answer, skip_special_tokens=True) == target(sample)
        assert len(answer) <= pocket_forms.reserve


def test_saved_tokenizer_is_the_same(pocket, pocket_forms, tmp_path):
    pocket.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    sample = Ruler(pocket, 512, pocket_forms).sample("MQ", 0, 0)
    assert loaded.get_vocab() == pocket.get_vocab()
    assert loaded(sample.prompt).input_ids == list(sample.input_ids)
    assert loaded.decode(sample.input_ids) == " " + sample.prompt
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 2)


def test_vocabulary_does_not_change_between_calls(pocket, pocket_forms):
    assert pocket_tokenizer(pocket_forms).get_vocab() == pocket.get_vocab()


def test_prose_is_known(pocket):
    assert pocket.unk_token_id not in pocket(paragraph(random.Random(1), 200).lower()).input_ids


@pytest.mark.parametrize(
    ("forms", "message"),
    [
        (Forms(), "set forms.lowercase to true"),
        ({"uuid": "uuid4"}, "uuid to hex"),
        ({"number_digits": 7}, "even"),
    ],
)
def test_forms_it_cannot_spell_are_refused(pocket_forms, forms, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pocket_tokenizer(forms if isinstance(forms, Forms) else replace(pocket_forms, **forms))
