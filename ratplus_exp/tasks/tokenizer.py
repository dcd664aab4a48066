"""The pocket tier's tokenizer: a word, a pair of digits or one byte of a uuid is a token.

A model of a million parameters has no room for 32 000 embeddings. Its prompts are generated from
closed lists, so a word-level vocabulary of about 1 300 entries covers them without unknowns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ratplus_exp.tasks import prose
from ratplus_exp.tasks.forms import Forms

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"  # ids 0, 1 and 2; there is no BOS

# A token includes the space in front of it, so decoding is concatenation. Eight letters from a to f
# begin a uuid; no word of the vocabulary has them.
_PIECE = "|".join((r" (?=[0-9]|[0-9a-f]{8})[0-9a-f]{2}", r" [a-z]+", r"[0-9a-f]{2}", r"[.,?]"))


def pocket_tokenizer(forms: Forms) -> PreTrainedTokenizerFast:
    """The word-level tokenizer of the generated prose and these forms.

    `decode(encode(text))` is `text` with exactly one leading space, as all words of the vocabulary
    have. ValueError for forms with other words or values.
    """
    if not forms.lowercase or forms.key_words != "noun" or forms.uuid != "hex":
        raise ValueError(
            "the pocket tokenizer is for pocket forms only: set forms.lowercase to true, key_words"
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

    from transformers import PreTrainedTokenizerFast  # slow; configuration checks need none

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
