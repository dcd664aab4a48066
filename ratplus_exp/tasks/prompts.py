"""Validation samples, made once per process, and prefetched by worker processes for a GPU.

A sample is a pure function of its name, so any process may make it at any time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import BrokenExecutor, Future

from ratplus_exp.tasks.niah import sample_name
from ratplus_exp.tasks.ruler import Ruler
from ratplus_exp.tasks.sample import Sample
from ratplus_exp.workers import Workers


class Prompts:
    """The validation samples of a source and a seed; each is made once.

    workers: processes for `prefetch`; 0: this process makes each sample when it is due.
    """

    def __init__(self, source: Ruler, seed: int, workers: int = 0) -> None:
        self.source, self.seed, self.workers = source, seed, workers
        self.samples: dict[str, Sample | Future[Sample]] = {}
        self.pool: Workers | None = None

    def __call__(self, task: str, index: int) -> Sample:
        name = sample_name(task, self.seed, index)
        sample = self.samples.pop(name, None)
        if isinstance(sample, Future):
            try:
                sample = sample.result()
            except BrokenExecutor:  # a worker was killed
                sample, self.workers = None, 0
        self.samples[name] = sample = sample or self.source.sample(task, self.seed, index)
        return sample

    def prefetch(self, task: str, indices: Iterable[int]) -> None:
        """Let the workers make these samples, in this order."""
        for index in indices if self.workers else ():
            name = sample_name(task, self.seed, index)
            if name not in self.samples:
                self.pool = self.pool or Workers(self.workers, self.source)
                try:
                    self.samples[name] = self.pool.call(Ruler.sample, task, self.seed, index)
                except BrokenExecutor:
                    self.workers = 0
                    return

    def close(self) -> None:
        """End the workers and drop what they have not made; finished samples stay."""
        if self.pool is not None:
            self.pool.stop()
            self.pool = None
            self.samples = {k: x for k, x in self.samples.items() if not isinstance(x, Future)}


_kept: dict[str, Prompts] = {}


def prompts_of(source: Ruler, seed: int, workers: int = 0) -> Prompts:
    """The `Prompts` of the last call, if it had the same tokenizer, length, texts and seed; else
    new ones."""
    tokenizer = source.tokenizer.backend_tokenizer.to_str()
    settings = (tokenizer, source.length, source.forms, source.essay, source.others, seed, workers)
    key = hashlib.sha256(repr(settings).encode()).hexdigest()
    if key not in _kept:
        for prompts in _kept.values():
            prompts.close()
        _kept.clear()  # thousands of prompts are hundreds of MB
        _kept[key] = Prompts(source, seed, workers)
    return _kept[key]
