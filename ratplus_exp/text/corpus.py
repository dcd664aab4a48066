"""Batches from memory-mapped token shards, shuffled, as pure functions of the step."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path

import numpy as np

from ratplus_exp.training.settings import Batch


class Corpus:
    """The tokens of a folder of `write_shards`, in windows of one context each.

    A window may span documents, which end in EOS. Each pass over the corpus shuffles the windows
    again. tokens: their number; id: a digest of shards, lengths and tokenizer.
    """

    def __init__(self, folder: Path, tokenizer: str) -> None:
        """ValueError if the corpus is missing, damaged, or has a tokenizer of another name."""
        try:
            text = (folder / "index.json").read_text(encoding="utf-8")
        except OSError:
            raise ValueError(
                f"there is no finished corpus in {folder}: run stage=tokenize with the same "
                "corpus and stage.init"
            ) from None
        try:
            index = json.loads(text)
            name, self.tokens, shards = index["tokenizer"], int(index["tokens"]), index["shards"]
            sizes = [(folder / shard["file"], int(shard["tokens"])) for shard in shards]
            dtype = np.dtype(index["dtype"])
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{folder / 'index.json'} is damaged: delete {folder} and run stage=tokenize"
            ) from None
        if name != tokenizer:
            raise ValueError(
                f"the corpus in {folder} was made with another tokenizer: set corpus.folder and "
                "run stage=tokenize"
            )
        self.id = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._shards = []
        for file, size in sizes:
            if not file.exists() or file.stat().st_size != size * dtype.itemsize:
                raise ValueError(
                    f"{file} is not {size} tokens long: delete {folder} and run stage=tokenize"
                )
            if size:  # an empty file cannot be mapped
                self._shards.append(np.memmap(file, dtype, "r", shape=(size,)))
        self._starts = np.cumsum([0, *map(len, self._shards)])

    def windows(self, length: int) -> int:
        """The number of windows; each reads `length` tokens, and one more for the last label."""
        return (self.tokens - 1) // length

    def check(self, length: int) -> None:
        if self.windows(length) < 1:
            raise ValueError(
                f"the corpus has {self.tokens} tokens, fewer than a context of {length}: raise "
                "corpus.tokens or use another corpus"
            )

    def batch(self, seed: int, step: int, rows: int, length: int) -> Batch:
        """Token ids and next-token labels (rows, length); all steps have the same rows."""
        count = self.windows(length)
        ids = np.empty((rows, length + 1), np.int64)
        for row in range(rows):
            epoch, place = divmod(step * rows + row, count)
            window = int(_order(seed, epoch, length, count)[place])
            ids[row] = self._read(window * length, length + 1)
        return ids[:, :-1], ids[:, 1:]

    def _read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of all shards, concatenated."""
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = []
        while count:
            part = self._shards[shard][start - self._starts[shard] :][:count]
            parts.append(part)
            start, count, shard = start + len(part), count - len(part), shard + 1
        return np.concatenate(parts)


@lru_cache(maxsize=2)  # a batch may end one pass and begin the next
def _order(seed: int, epoch: int, length: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch, length)).permutation(count)
