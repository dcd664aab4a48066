"""Samples that are made once a process, where it pays by other processes ahead of their use.

A sample is a pure function of its name, so it may be made by anybody at any time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import BrokenExecutor, Future

from ratplus_exp.tasks.niah import NIAH, sample_name
from ratplus_exp.tasks.sample import Sample
from ratplus_exp.tasks.source import Ruler
from ratplus_exp.workers import Workers


class Prompts:
    """The validation samples of a NIAH and a seed, each kept once it is made.

    workers: processes for `ahead`; 0: none, and everything is made when it is asked for.
    """

    def __init__(self, niah: NIAH, seed: int, workers: int = 0) -> None:
        self.niah, self.seed, self.workers = niah, seed, workers
        self.made: dict[str, Sample | Future[Sample]] = {}
        self.pool: Workers | None = None

    def __call__(self, task: str, index: int) -> Sample:
        name = sample_name(task, self.seed, index)
        sample = self.made.pop(name, None)
        if isinstance(sample, Future):
            try:
                sample = sample.result()
            except BrokenExecutor:  # a worker was killed
                sample, self.workers = None, 0
        self.made[name] = sample = sample or self.niah.sample(task, self.seed, index)
        return sample

    def ahead(self, task: str, indices: Iterable[int]) -> None:
        """Have the workers begin with these samples, in this order."""
        for index in indices if self.workers else ():
            name = sample_name(task, self.seed, index)
            if name not in self.made:
                self.pool = self.pool or Workers(self.workers, _begin, self.niah)
                try:
                    self.made[name] = self.pool.submit(_make, task, self.seed, index)
                except BrokenExecutor:
                    self.workers = 0
                    return

    def close(self) -> None:
        """End the workers, without what they have not begun; samples that are made stay."""
        if self.pool is not None:
            self.pool.stop()
            self.pool = None
            self.made = {k: x for k, x in self.made.items() if not isinstance(x, Future)}


_kept: dict[tuple, Prompts] = {}


def prompts_of(niah: NIAH, seed: int, workers: int = 0) -> Prompts:
    """`Prompts` that all of a process's settings share, as long as they follow each other: those
    of the same tokenizer, length, forms, essay and seed."""
    spelling = niah.tokenizer.backend_tokenizer.to_str()
    digest = hashlib.sha256(spelling.encode()).hexdigest()
    others = repr(niah.others) if isinstance(niah, Ruler) else ""
    key = (digest, niah.length, niah.forms, niah.essay, others, seed, workers)
    if key not in _kept:
        for prompts in _kept.values():
            prompts.close()
        _kept.clear()  # thousands of prompts are hundreds of MB
        _kept[key] = Prompts(niah, seed, workers)
    return _kept[key]


_niah: NIAH  # of a worker process


def _begin(niah: NIAH) -> None:
    global _niah
    _niah = niah


def _make(task: str, seed: int, index: int) -> Sample:
    return _niah.sample(task, seed, index)
