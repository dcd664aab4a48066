"""The pocket tier's own tokenizer: a word, a pair of digits or one byte of a uuid is a token.

A model of a million parameters cannot afford 32 000 embeddings. Its prompts are generated from
closed lists, so a word-level vocabulary of some 1 300 entries covers them without unknowns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ratplus_exp.tasks import prose
from ratplus_exp.tasks.forms import Forms

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"  # ids 0, 1 and 2; there is no BOS

# A token owns the space in front of it, so that decoding is plain concatenation. Eight letters from
# a to f begin a uuid: no word of the vocabulary does.
_PIECE = "|".join((r" (?=[0-9]|[0-9a-f]{8})[0-9a-f]{2}", r" [a-z]+", r"[0-9a-f]{2}", r"[.,?]"))


def pocket_tokenizer(forms: Forms) -> PreTrainedTokenizerFast:
    """The word-level tokenizer of the generated prose and these forms.

    Text is given exactly one leading space, because all words of the vocabulary have one:
    `decode(encode(text))` is `text`, with that space. ValueError for forms it cannot spell.
    """
    if not forms.lowercase or forms.key_words != "noun" or forms.uuid != "hex":
        raise ValueError(
            "the pocket tokenizer spells pocket forms only: set forms.lowercase to true, key_words"
            " to noun and uuid to hex, or take another tokenizer"
        )
    if forms.number_digits % 2:
        raise ValueError(
            f"the pocket tokenizer reads digits in pairs: make forms.number_digits"
            f" ({forms.number_digits}) even"
        )
    words = sorted({*prose.VOCABULARY, *forms.words, *forms.nouns})
    octets = [f"{n:02x}" for n in range(256)]
    marks = (PAD, EOS, UNK, ".", ",", "?")
    pieces = (*marks, *octets, *(f" {piece}" for piece in (*octets, *words)))
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
