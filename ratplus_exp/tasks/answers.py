"""Prompts with their answers, for supervised fine-tuning on the NIAH training split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ratplus_exp.tasks.facts import IGNORE, Batch
from ratplus_exp.tasks.forms import Forms
from ratplus_exp.tasks.niah import NIAH
from ratplus_exp.tasks.sample import target_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Answers:
    """Batches of prompts as a pure function of (seed, step).

    Only answers and their EOS are labelled. mixture: weights of the tasks. essay: as in `NIAH`.
    """

    tokenizer: PreTrainedTokenizerBase
    forms: Forms
    essay: str | None
    mixture: dict[str, float]

    def batch(self, seed: int, step: int, batch: int, length: int) -> Batch:
        """Token ids and labels (already those of the next token), both (batch, length) int64."""
        source = NIAH(self.tokenizer, length, self.forms, self.essay)
        tasks, weights = zip(*self.mixture.items(), strict=True)
        draw = np.random.default_rng((seed, step))
        chosen = draw.choice(len(tasks), batch, p=np.array(weights) / sum(weights))
        ids = np.full((batch, length), self.tokenizer.pad_token_id, np.int64)
        labels = np.full((batch, length), IGNORE, np.int64)
        for row, task in enumerate(chosen):
            sample = source.sample(tasks[task], seed, step * batch + row, "train")
            answer = target_ids(sample, self.tokenizer)
            end = sample.length + len(answer)
            ids[row, :end] = (*sample.input_ids, *answer)
            labels[row, sample.length - 1 : end - 1] = answer
        return ids, labels
