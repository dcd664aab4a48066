"""Forms and tokenizers that the tests of the tasks share."""

import random
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ratplus_exp.tasks import Forms, pocket_tokenizer
from ratplus_exp.tasks.prose import paragraph

POCKET = Path(__file__).parents[2] / "conf" / "data" / "pocket.yaml"


@pytest.fixture(scope="session")
def pocket_forms():
    return Forms(**yaml.safe_load(POCKET.read_text())["forms"])


@pytest.fixture(scope="session")
def pocket(pocket_forms):
    """The pocket tokenizer."""
    return pocket_tokenizer(pocket_forms)


@pytest.fixture(scope="session")
def bpe():
    """A small byte-level BPE tokenizer, of the kind that large models have."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(0)
    backend.train_from_iterator([paragraph(rng, 500), Forms().template], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
