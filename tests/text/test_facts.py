"""Generated pretraining text: what is labelled can be recalled, at all distances, in all styles."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import yaml
from transformers import PreTrainedTokenizerFast

from ratplus_exp.models.loading import read_tokenizer
from ratplus_exp.tasks import Forms, pocket_tokenizer
from ratplus_exp.tasks.niah import split_of
from ratplus_exp.text.facts import Facts, begins_with_space

ROOT = Path(__file__).parents[2]
RULER = Forms()
LIST = replace(RULER, needle="{key}: {value}", template="{context}\n{query}:", answer_prefix="")
NUMBER = r"(?<![0-9a-f-])[0-9]{7}(?![0-9a-f-])"
UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"


@pytest.fixture(scope="module")
def tokenizer():
    return read_tokenizer(ROOT / "outputs/reference/small/tokenizer")


def test_the_pocket_pair_can_be_trained_again_on_the_same_tokens():
    """The digest of a batch when the shipped pair was trained."""
    forms = Forms(**yaml.safe_load((ROOT / "conf/data/pocket.yaml").read_text())["forms"])
    facts = Facts(pocket_tokenizer(forms), forms, 0.02, 0.35, drill_steps=1, list_rate=0.2)
    digest = hashlib.sha256()
    for step, length in ((0, 64), (1, 128), (2, 512)):
        for array in facts.batch(0, step, 3, length):
            digest.update(np.ascontiguousarray(array).tobytes())
    assert digest.hexdigest()[:16] == "4fe170a0b8f11ec8"


@pytest.mark.parametrize("forms", [RULER, LIST])
def test_a_tokenizer_that_begins_texts_with_a_space_adds_none_within(tokenizer, forms):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    changes = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    backend.normalizer = tokenizers.normalizers.Sequence(changes)  # as Llama-2's
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", "merged_with_next")
    backend.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=["</s>"])
    backend.train_from_iterator([tokenizer.decode(range(len(tokenizer)))], trainer)
    like_llama = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert begins_with_space(like_llama) and not begins_with_space(tokenizer)
    for step in range(4):
        [ids], _ = Facts(like_llama, forms, other_rate=0.0).batch(0, step, 1, 2048)
        for text in like_llama.decode(ids).split("</s>"):
            assert not re.search(r"  | \n", text.strip())


@pytest.mark.parametrize("forms", [RULER, LIST])
def test_every_labelled_answer_was_said_before(tokenizer, forms):
    """Read from the decoded text: runs of labels are values, each named earlier in its document."""
    facts = Facts(tokenizer, forms, other_rate=0.0, several_rate=0.5)
    distances = []
    for step in range(4):
        ids, labels = facts.batch(0, step, 1, 2048)
        ids, labels = ids[0], labels[0]
        inside = np.flatnonzero((labels >= 0) & (np.r_[-1, labels[:-1]] < 0))
        assert len(inside) > 5
        for start in inside[:-1]:
            end = start + int(np.argmax(labels[start:] < 0))
            said = tokenizer.decode(labels[start:end])
            before = tokenizer.decode(ids[: start + 1])
            values = re.findall(rf"{UUID}|{NUMBER}", said)
            assert values
            for value in values:
                assert split_of(value) == "train"
                assert value in before
                distances.append(1 - before.index(value) / len(before))
    assert min(distances) < 0.3 and max(distances) > 0.9


def test_questions_are_those_of_the_prompts(tokenizer):
    text = tokenizer.decode(Facts(tokenizer, RULER).batch(0, 5, 1, 2048)[0][0])
    asked = re.findall(
        r"The special magic (\w+) for .{1,400}? mentioned in the provided text (is|are)", text
    )
    assert asked and all((kind[-1] == "s") == (verb == "are") for kind, verb in asked)
    assert text.lstrip().startswith("Some special magic")


def test_each_document_has_one_of_the_styles(tokenizer):
    ids, _ = Facts(tokenizer, RULER, styles=(RULER, LIST)).batch(0, 0, 16, 512)
    ruler = ["special magic" in tokenizer.decode(row) for row in ids]
    assert 2 <= sum(ruler) <= 14


def test_documents_fill_any_length(tokenizer):
    for length in (64, 4096):
        ids, labels = Facts(tokenizer, RULER, styles=(RULER, LIST)).batch(0, 1, 2, length)
        assert ids.shape == labels.shape == (2, length)
        drills = Facts(tokenizer, RULER, drill_steps=1, styles=(LIST,)).batch(0, 0, 2, length)
        assert drills[0].shape == (2, length)
        assert (labels >= 0).any()
