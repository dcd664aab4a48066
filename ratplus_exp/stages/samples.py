"""The samples of measuring stages: generated, or from RULER's files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from ratplus_exp import provenance
from ratplus_exp.config import forms_of, others_of, texts_of
from ratplus_exp.distributed import cores
from ratplus_exp.stages.common import device_of, resolve, source_of
from ratplus_exp.tasks import RULER_NAMES, TASKS, Forms, Others, Sample, read_jsonl
from ratplus_exp.tasks.niah import sample_name
from ratplus_exp.tasks.prompts import prompts_of
from ratplus_exp.tasks.qa import QA_FILES, no_file
from ratplus_exp.tasks.sample import check_known, question_tokens, target

MAX_WORKERS = 4  # a prompt of 4096 tokens takes 15 ms, less than its evaluation on a GPU


class Samples:
    """Samples by task and index; all settings of a process share the generated ones (`Prompts`)."""

    @staticmethod
    def keys(cfg: DictConfig) -> dict[str, dict[str, Any]]:
        """Of each configured task what determines its samples, for the keys of its cells."""
        forms, others = forms_of(cfg), others_of(cfg)
        files = ruler_files(cfg, cfg.data.tasks)

        def data(task: str) -> dict[str, Any]:
            if files:
                file = _digest(files[task], "data.path")
                return {"file": file, "reserve": others.of(task, forms).reserve}
            return _niah(forms, cfg.data.essay) if task in TASKS else _beyond(task, others, forms)

        seed = 0 if files else cfg.seed
        return {task: {"seed": seed, "data": data(task)} for task in cfg.data.tasks}

    def __init__(self, cfg: DictConfig, tokenizer: Any) -> None:
        self.cfg, self.seed, self.tokenizer = cfg, cfg.seed, tokenizer
        self.device = device_of(cfg)
        self.source = source_of(cfg, tokenizer)
        self.reserve = {task: texts_of(cfg, task).reserve for task in RULER_NAMES}
        self.prompts = prompts_of(self.source, cfg.seed, _workers(self.device))
        self.read: dict[str, list[Sample]] = {}
        for task, file in ruler_files(cfg, cfg.data.tasks).items():
            longest = cfg.data.length - self.reserve[task]
            self.read[task] = read_jsonl(file, tokenizer, longest, task)
            if (size := len(self.read[task])) < cfg.data.examples:
                raise ValueError(f"{file} has {size} samples: set data.examples={size}")
            for sample in self.read[task][: cfg.data.examples]:
                self._check(sample)

    def __call__(self, task: str, index: int) -> Sample:
        if self.read:
            return self.read[task][index]
        sample = self.prompts(task, index)
        self._check(sample)
        return sample

    def _check(self, sample: Sample) -> None:
        """ValueError for a sample that no model with this tokenizer could answer."""
        answer = len(self.tokenizer(target(sample), add_special_tokens=False).input_ids)
        if answer > (reserve := self.reserve[sample.task]):
            where = "qa" if sample.task in QA_FILES else sample.task
            where = "forms" if sample.task in TASKS else where
            raise ValueError(
                f"{sample.id}: the answer has {answer} tokens, but data.{where}.reserve keeps "
                f"{reserve} free for it: raise it"
            )
        check_known(sample, self.tokenizer)

    def id(self, task: str, index: int) -> str:
        """The sample's id; does not make the sample."""
        return self.read[task][index].id if self.read else sample_name(task, self.seed, index)

    def question_tokens(self, sample: Sample) -> int:
        """How many of the prompt's last tokens are its question."""
        return question_tokens(sample, question_of(self.cfg, sample.task), self.tokenizer)

    def by_suffix_length(
        self, samples: list[Sample], first_token: str
    ) -> list[tuple[int, list[Sample]]]:
        """The samples grouped by the number of last prompt tokens that are fed under the method,
        which the rows of a batch must share."""
        if first_token != "split":
            return [(int(first_token == "decode"), samples)]
        groups: dict[int, list[Sample]] = {}
        for sample in samples:
            groups.setdefault(self.question_tokens(sample), []).append(sample)
        return list(groups.items())

    def padded(self, samples: list[Sample]) -> tuple[Tensor, Tensor]:
        """Prompts and attention mask (B, T), left-padded, on the configured device."""
        rows = {"input_ids": [list(sample.input_ids) for sample in samples]}
        batch = self.tokenizer.pad(rows, return_tensors="pt").to(self.device)
        return batch["input_ids"], batch["attention_mask"]

    def prefetch(self, task: str, indices: list[int]) -> None:
        """See `Prompts.prefetch`."""
        if not self.read:
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


def question_of(cfg: DictConfig, task: str) -> str:
    """The template of a task's question, which follows the context."""
    return str(texts_of(cfg, task).template.rpartition("{context}")[2])


def _niah(forms: Forms, essay: str | None) -> dict[str, Any]:
    """What determines the generated samples of a NIAH task; essay: its file."""
    digest = essay and _digest(resolve(essay), "data.essay")
    data: dict[str, Any] = {"forms": asdict(forms), "essay": digest}
    if essay or forms.answer_order == "creation":
        data["sampler"] = 2  # an earlier version made other prompts
    return data


def _beyond(task: str, others: Others, forms: Forms) -> dict[str, Any]:
    """What determines the generated samples of another task."""
    texts = asdict(others.of(task, forms))
    files = {name: texts.pop(name) for name in QA_FILES.values() if name in texts}
    data = {"texts": texts, "with": asdict(forms), "reserve": texts["reserve"]}
    if name := QA_FILES.get(task):
        if not files[name]:
            raise ValueError(no_file(task))
        data["questions"] = _digest(resolve(files[name]), f"data.qa.{name}")
    return data


def _digest(path: Path, field: str) -> str:
    try:
        return provenance.sha256(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): set {field}") from None


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
