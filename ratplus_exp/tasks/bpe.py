"""The small tier's tokenizer: a byte-level BPE of the generated text and RULER's forms.

    python -m ratplus_exp.tasks.bpe outputs/reference/small/tokenizer

writes the shipped one. It splits text as the tokenizers of current language models do: a word
includes the space in front of it, digits form groups of up to three from the left ("4815162" is
481 516 2), and punctuation is separate. The space in front of a number is a token: seven digits
take four tokens, and the first token of an answer has no information.
"""

import random
import sys
from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ratplus_exp.tasks import prose
from ratplus_exp.tasks.forms import Forms
from ratplus_exp.tasks.tokenizer import EOS, PAD

_PIECE = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s"


def train_bpe() -> Tokenizer:
    """Learn 8192 entries from generated documents; the same on every machine.

    Every byte has an entry, so decoding inverts encoding; ids 0 and 1 are padding and EOS.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_texts(), trainer)
    return backend


def _texts() -> Iterator[str]:
    """Parts of prompts, with RULER's proportions of prose, words, numbers and uuids."""
    forms, rng = Forms(), random.Random(0)
    for _ in range(3000):
        yield prose.paragraph(rng, 10)
        key = rng.choice(("word", "word", "uuid"))
        value = rng.choice(("number", "number", "uuid"))
        pairs = [(forms.draw(key, rng), forms.draw(value, rng)) for _ in range(10)]
        yield forms.separator.join((forms.noise, *(forms.state(*pair, value) for pair in pairs)))
        fields = {"type_needle_v": f"{value}s"}
        yield forms.template.format(context="", query=pairs[0][0], **fields)
        yield forms.answer_prefix.format(query=pairs[1][0], **fields)
        yield " " + ", ".join(v for _, v in pairs)


if __name__ == "__main__":
    PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(),
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(sys.argv[1])
