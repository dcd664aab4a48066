"""Prompts with their answers, for supervised fine-tuning: the training split, or files of RULER."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ratplus_exp.tasks.facts import IGNORE, Batch
from ratplus_exp.tasks.niah import NIAH
from ratplus_exp.tasks.sample import Sample, target_ids


@dataclass(frozen=True, eq=False)
class Answers:
    """Batches of prompts as a pure function of (seed, step).

    Only answers and their EOS are labelled. source: of the samples, at any length; mixture: weights
    of the tasks; read: samples to draw from instead, by task, where they come from files.
    """

    source: NIAH
    mixture: dict[str, float]
    read: Mapping[str, Sequence[Sample]] = field(default_factory=dict)

    def batch(self, seed: int, step: int, batch: int, length: int) -> Batch:
        """Token ids and labels (already those of the next token), both (batch, length) int64."""
        source = replace(self.source, length=length)
        tokenizer = source.tokenizer
        tasks, weights = zip(*self.mixture.items(), strict=True)
        draw = np.random.default_rng((seed, step))
        chosen = draw.choice(len(tasks), batch, p=np.array(weights) / sum(weights))
        ids = np.full((batch, length), tokenizer.pad_token_id, np.int64)
        labels = np.full((batch, length), IGNORE, np.int64)
        for row, number in enumerate(chosen):
            if samples := self.read.get(task := tasks[number]):
                sample = samples[int(draw.integers(len(samples)))]
            else:
                sample = source.sample(task, seed, step * batch + row, "train")
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
