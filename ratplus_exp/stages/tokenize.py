"""stage=tokenize: writes a corpus as token shards for memory-mapping, once."""

from __future__ import annotations

import hashlib
from pathlib import Path

from omegaconf import DictConfig

from ratplus_exp.config import plain
from ratplus_exp.models.loading import load_tokenizer, read_tokenizer
from ratplus_exp.provenance import sha256
from ratplus_exp.settings import Source
from ratplus_exp.stages.common import model_folder
from ratplus_exp.store import locked
from ratplus_exp.text.corpus import Corpus
from ratplus_exp.text.shards import write_shards


def run(cfg: DictConfig) -> None:
    """Tokenise the corpus with the tokenizer of stage.init, resuming a killed run."""
    init = model_folder(cfg)
    tokenizer = load_tokenizer(init)
    folder, name = _place(cfg, init)
    source = Source(**{field: x for field, x in plain(cfg.corpus).items() if field != "folder"})
    with locked(folder):
        write_shards(source, tokenizer, name, folder, cfg.stage.workers)
    print(f"{corpus_of(cfg, init).tokens:,} tokens in {folder}")


def corpus_of(cfg: DictConfig, model: Path) -> Corpus:
    """The configured corpus in the tokens of a model's folder; ValueError if it does not exist."""
    return Corpus(*_place(cfg, model))


def _place(cfg: DictConfig, model: Path) -> tuple[Path, str]:
    """The folder of the tokens, one below corpus.folder for each tokenizer, and the tokenizer's
    digest; that of a model whose texts end otherwise than the tokenizer's is another one."""
    name, end = sha256(model / "tokenizer.json"), load_tokenizer(model).eos_token_id
    if end != read_tokenizer(model).eos_token_id:
        name = hashlib.sha256(f"{name} {end}".encode()).hexdigest()
    return Path(cfg.corpus.folder) / name[:12], name
