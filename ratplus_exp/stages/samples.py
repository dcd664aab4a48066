"""The samples of measuring stages: generated, or from RULER's files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from ratplus_exp.config import forms_of, question_template, reserve_of
from ratplus_exp.distributed import cores
from ratplus_exp.stages.common import (
    corpus_folder,
    device_of,
    resolve,
    source_of,
    tokenizer_name,
)
from ratplus_exp.tasks import RULER_NAMES, Sample, read_jsonl
from ratplus_exp.tasks.niah import sample_name
from ratplus_exp.tasks.prompts import prompts_of
from ratplus_exp.tasks.sample import question_tokens, target
from ratplus_exp.text.corpus import Corpus
from ratplus_exp.text.facts import Facts
from ratplus_exp.training.settings import IGNORE, Batch

DOCUMENTS = "documents"  # the task of stage=loss
MAX_WORKERS = 4  # a prompt of 4096 tokens takes 15 ms, less than its evaluation on a GPU


class Samples:
    """Samples by task and index; all settings of a process share the generated ones (`Prompts`)."""

    def __init__(self, cfg: DictConfig, tokenizer: Any) -> None:
        self.cfg, self.seed, self.tokenizer = cfg, cfg.seed, tokenizer
        self.reserve = {task: reserve_of(cfg, task) for task in RULER_NAMES}
        self.questions = {task: question_template(cfg, task) for task in RULER_NAMES}
        self.device = device_of(cfg)
        source = source_of(cfg, tokenizer, cfg.data.length)
        self.prompts = prompts_of(source, cfg.seed, _workers(self.device))
        self.read: dict[str, list[Sample]] = {}
        for task, file in ruler_files(cfg, cfg.data.tasks).items():
            longest = cfg.data.length - self.reserve[task]
            self.read[task] = read_jsonl(file, tokenizer, longest, task)
            if (size := len(self.read[task])) < cfg.data.examples:
                raise ValueError(f"{file} has {size} samples: set data.examples={size}")

    def __call__(self, task: str, index: int) -> Sample:
        if task == DOCUMENTS:
            return self._document(index)
        sample = self.read[task][index] if self.read else self.prompts(task, index)
        if index == 0:
            self._check(sample)
        return sample

    def _document(self, index: int) -> Sample:
        """A document of a context's length, and with generated text the places of what can be
        recalled."""
        (ids,), (labels,) = self._documents(index)
        places = (np.flatnonzero(labels[:-1] != IGNORE) + 1).tolist()
        spans = {"recallable": tuple((i, i + 1) for i in places)}
        name = self.id(DOCUMENTS, index)
        return Sample(name, DOCUMENTS, "", tuple(ids.tolist()), (), spans, len(ids))

    @cached_property
    def _documents(self) -> Callable[[int], Batch]:
        """Ids and next-token labels (1, length) of a document, as `Facts.batch`."""
        length, examples = self.cfg.data.length, self.cfg.data.examples
        if (corpus := corpus_of(self.cfg)) is None:
            facts = Facts(self.tokenizer, forms_of(self.cfg), other_rate=0.0)
            return lambda index: facts.batch(f"held-out/{self.seed}", index, 1, length)
        corpus.check(length)
        if (windows := corpus.windows(length)) < examples:
            raise ValueError(f"the corpus has {windows} contexts: set data.examples={windows}")
        nothing = np.full((1, length), IGNORE)
        return lambda index: (corpus.batch(self.seed, index, 1, length)[0], nothing)

    def _check(self, sample: Sample) -> None:
        """ValueError for a task that no training could make the model solve."""
        answer = len(self.tokenizer(target(sample), add_special_tokens=False).input_ids)
        if answer > (reserve := self.reserve[sample.task]):
            where = sample.task if sample.task in ("vt", "cwe", "fwe") else "forms"
            raise ValueError(
                f"{sample.id}: the answer has {answer} tokens, but data.{where}.reserve keeps "
                f"{reserve} free for it: raise it"
            )
        unknown = sample.input_ids.count(self.tokenizer.unk_token_id)
        if unknown > 0.05 * sample.length:
            raise ValueError(
                f"{sample.id}: {unknown} of {sample.length} tokens are unknown to the model's "
                "tokenizer: choose the data of the model's tier, for instance data=pocket"
            )

    def id(self, task: str, index: int) -> str:
        """The sample's id; does not make the sample."""
        read = self.read and task != DOCUMENTS
        return self.read[task][index].id if read else sample_name(task, self.seed, index)

    def by_fed(self, samples: list[Sample], first_token: str) -> list[tuple[int, list[Sample]]]:
        """The samples grouped by the number of last prompt tokens that are fed under the method,
        which the rows of a batch must share."""
        if first_token != "split":
            return [(int(first_token == "decode"), samples)]
        groups: dict[int, list[Sample]] = {}
        for sample in samples:
            fed = question_tokens(sample, self.questions[sample.task], self.tokenizer)
            groups.setdefault(fed, []).append(sample)
        return list(groups.items())

    def padded(self, samples: list[Sample]) -> tuple[Tensor, Tensor]:
        """Prompts and attention mask (B, T), left-padded, on the configured device."""
        rows = {"input_ids": [list(sample.input_ids) for sample in samples]}
        batch = self.tokenizer.pad(rows, return_tensors="pt").to(self.device)
        return batch["input_ids"], batch["attention_mask"]

    def prefetch(self, task: str, indices: list[int]) -> None:
        """See `Prompts.prefetch`."""
        if not self.read and task != DOCUMENTS:
            self.prompts.prefetch(task, indices)

    def close(self) -> None:
        """End the processes that prefetch."""
        self.prompts.close()


def _workers(device: torch.device) -> int:
    """Processes that prefetch prompts. None on a CPU, whose cores run the model, and none in a
    worker of a sweep, which makes prompts while other workers use the GPU."""
    if device.type != "cuda" or parent_process() is not None:
        return 0
    return min(MAX_WORKERS, cores() - 1)


def corpus_of(cfg: DictConfig) -> Corpus | None:
    """The corpus that stage=tokenize wrote for the model's tokenizer, if one is configured."""
    if cfg.corpus is None:
        return None
    path = resolve(cfg.model.path)
    return Corpus(corpus_folder(cfg, path), tokenizer_name(path))


def ruler_files(cfg: DictConfig, tasks: Iterable[str]) -> dict[str, Path]:
    """RULER's file of each task, where data.path is set."""
    if not cfg.data.path:
        return {}
    folder = resolve(cfg.data.path)
    files = {task: folder / RULER_NAMES[task] / "validation.jsonl" for task in tasks}
    for file in files.values():
        if not file.is_file():
            raise ValueError(f"there is no {file}: set data.path to RULER's output folder")
    return files
