"""The pocket tier's own tokenizer: a word, two digits or one byte of a short uuid is a token.

A model of a million parameters cannot afford 32 000 embeddings. Its prompts are generated from
closed lists, so a word-level vocabulary of some 1 600 entries covers them without unknowns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ratplus_exp.tasks import prose
from ratplus_exp.tasks.forms import Forms

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"  # ids 0, 1 and 2; there is no BOS

# A token owns the space in front of it, so that decoding is plain concatenation.
_PIECE = "|".join(
    (
        r"-[0-9a-f]{2}",  # a further byte of a short uuid
        r" [0-9a-f]{2}(?=-)",  # its first byte
        r" ?[0-9]{2}",  # two digits: ' 48', '15'
        r" [a-z]+",
        r"[.,?]",
    )
)


def pocket_tokenizer(forms: Forms) -> PreTrainedTokenizerFast:
    """The word-level tokenizer of the generated prose and these forms.

    Text is given exactly one leading space, because all words of the vocabulary have one:
    `decode(encode(text))` is `text`, with that space. ValueError for forms it cannot spell.
    """
    if not forms.lowercase or forms.key_words != "noun" or forms.uuid != "short":
        raise ValueError(
            "the pocket tokenizer spells pocket forms only: set forms.lowercase to true, key_words"
            " to noun and uuid to short, or take another tokenizer"
        )
    if forms.number_digits % 2:
        raise ValueError(
            f"the pocket tokenizer reads digits in pairs: make forms.number_digits"
            f" ({forms.number_digits}) even"
        )
    words = sorted({*prose.VOCABULARY, *forms.words, *forms.nouns})
    pairs = [f"{n:02d}" for n in range(100)]
    octets = [f"{n:02x}" for n in range(256)]
    pieces = (
        PAD,
        EOS,
        UNK,
        ".",
        ",",
        "?",
        *pairs,
        *(f" {octet}" for octet in octets),
        *(f"-{octet}" for octet in octets),
        *(f" {word}" for word in words),
    )
    # ' 00' to ' 99' are bytes as well as pairs of digits; a word in two of a-f would be a byte too.
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    assert len(vocabulary) == len(pieces), "a word looks like a byte"

    from transformers import PreTrainedTokenizerFast  # seconds, which a mistyped word need not wait

    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(" "), normalizers.Replace(Regex(r"\A +"), " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )
