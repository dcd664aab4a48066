"""stage=tokenize: writes a corpus as token shards for memory-mapping, once."""

from __future__ import annotations

from omegaconf import DictConfig

from ratplus_exp.config import build, plain
from ratplus_exp.models.loading import load_tokenizer
from ratplus_exp.stages.common import corpus_folder, model_folder, tokenizer_name
from ratplus_exp.store import locked
from ratplus_exp.text.corpus import Corpus
from ratplus_exp.text.shards import Source, write_shards


def run(cfg: DictConfig) -> None:
    """Tokenise the corpus with the tokenizer of stage.init, resuming a killed run."""
    settings = plain(cfg.corpus)
    settings.pop("folder")
    source = build(Source, settings, "corpus")
    init = model_folder(cfg)
    tokenizer = load_tokenizer(init)
    folder, name = corpus_folder(cfg, init), tokenizer_name(init)
    with locked(folder):
        write_shards(source, tokenizer, name, folder, cfg.stage.workers)
    print(f"{Corpus(folder, name).tokens:,} tokens in {folder}")
