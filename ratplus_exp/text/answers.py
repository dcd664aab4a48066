"""Prompts with their answers, for supervised fine-tuning: the training split, or RULER's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ratplus_exp.tasks.ruler import Ruler
from ratplus_exp.tasks.sample import Sample, check_known, target_ids
from ratplus_exp.training.settings import IGNORE, Batch


@dataclass(frozen=True, eq=False)
class Answers:
    """Batches of prompts as a pure function of (seed, step); only answers and EOS are labelled.

    source: generates the samples (its length is replaced). mixture: weights of the tasks. read: by
        task, samples from files, used instead of generated ones.
    """

    source: Ruler
    mixture: dict[str, float]
    read: Mapping[str, Sequence[Sample]] = field(default_factory=dict)

    def batch(self, seed: int, step: int, batch: int, length: int) -> Batch:
        """Token ids and next-token labels, both (batch, length) int64."""
        source = replace(self.source, length=length)
        tokenizer = source.tokenizer
        tasks, weights = zip(*self.mixture.items(), strict=True)
        rng = np.random.default_rng((seed, step))
        chosen = rng.choice(len(tasks), batch, p=np.array(weights) / sum(weights))
        ids = np.full((batch, length), tokenizer.pad_token_id, np.int64)
        labels = np.full((batch, length), IGNORE, np.int64)
        for row, number in enumerate(chosen):
            if samples := self.read.get(task := tasks[number]):
                sample = samples[int(rng.integers(len(samples)))]
            else:
                sample = source.sample(task, seed, step * batch + row, "train")
            check_known(sample, tokenizer)
            answer = target_ids(sample, tokenizer)
            end = sample.length + len(answer)
            if end > length:
                raise ValueError(
                    f"{sample.id}: prompt and answer have {end} tokens, more than the {length} of"
                    " a sequence: raise stage.schedule's lengths, or the task's reserve"
                )
            ids[row, :end] = (*sample.input_ids, *answer)
            labels[row, sample.length - 1 : end - 1] = answer
        return ids, labels
