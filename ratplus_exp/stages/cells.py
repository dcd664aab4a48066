"""The cells of a configuration, and the protocol of the stages that fill them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from omegaconf import DictConfig

from ratplus_exp import provenance
from ratplus_exp.config import (
    budget_name,
    expected_sha256,
    forms_of,
    oracle_heads,
    others_of,
    reserve_of,
    rope_of,
    validate_method,
)
from ratplus_exp.methods import Method, Oracle, Random, Selector, TopK
from ratplus_exp.methods.base import EVICTING
from ratplus_exp.models.loading import (
    check_length,
    check_model,
    dtype_on,
    interface_digest,
    load_config,
    weight_files,
)
from ratplus_exp.models.prefill import PromptBatch
from ratplus_exp.stages.common import device_of, first_token_of, resolve, store_of
from ratplus_exp.stages.samples import DOCUMENTS, corpus_of, ruler_files
from ratplus_exp.store import Cell
from ratplus_exp.tasks import TASKS, Sample
from ratplus_exp.tasks.qa import QA_FILES, no_file

Records = Mapping[Any, Mapping[str, Any]]
DECODING = ("decode", *EVICTING)  # phases of methods that select after the prompt
PROMPTS = ("checkpoint", "interface", "dtype", "rope", "task", "seed", "data", "context_length")
"""The part of a cell's key that determines its prompts and their dense prefill."""


class MeasuringStage(Protocol):
    """Measures a model under a method, sample by sample."""

    def check(self, method: Method, name: str) -> None:
        """ValueError, with the remedy, for a method (of this name) that it can't measure."""

    def measure(
        self, job: Job, samples: list[Sample], prompts: PromptBatch, tokenizer: Any
    ) -> list[dict[str, Any]]:
        """A record for each sample of a batch, plain JSON with "id"; prompts: of the samples."""
        ...

    def metrics(self, records: Records, first: PromptBatch) -> dict[str, Any]:
        """Aggregates of all records of a cell, by id; first: some of its prompts."""
        ...


class Job:
    """One configuration of a measuring stage and its cells, one a task.

    The constructor checks all settings, and neither loads a model nor writes.
    """

    def __init__(self, cfg: DictConfig, stage: MeasuringStage) -> None:
        self.cfg, self.stage = cfg, stage
        self.examples: int = cfg.data.examples  # of each task
        self.method = validate_method(cfg)
        stage.check(self.method, cfg.method.name)
        self.store = store_of(cfg)
        self.path = resolve(cfg.model.path)
        self.rope = rope_of(cfg)
        tasks = [DOCUMENTS] if cfg.stage.name == "loss" else cfg.data.tasks
        self.files = ruler_files(cfg, cfg.data.tasks)
        setting = self._setting()
        self.cells = {task: self.store.cell(self._key(setting, task)) for task in tasks}

    @property
    def first_token(self) -> str:
        """See `first_token_of`. Methods that select in the prefill select for every token by that
        token alone, and dense attention does not select, so their answers don't depend on it."""
        return first_token_of(self.cfg) if self.method.phase in DECODING else "prefill"

    def missing(self) -> dict[str, Cell]:
        """Cells that lack samples, by task."""
        return {task: x for task, x in self.cells.items() if not x.is_done(self.examples)}

    def prefill(self, task: str) -> str:
        """A key of the prefill that a cell begins with; cells with an equal key share it."""
        cell = self.cells[task]
        if not self.method.dense_prefill:
            return cell.id
        return json.dumps([self.first_token, *(cell.key.get(name) for name in PROMPTS)])

    def _setting(self) -> dict[str, Any]:
        """The part of the keys that all cells share: exactly what affects their numbers."""
        cfg, method = self.cfg, self.method
        files = [file for file in weight_files(self.path) if file.exists()]
        stamp = tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in files)
        digest = _digest(self.path, expected_sha256(cfg.model), cfg.model.backbone, stamp)
        check_length(self.path, cfg.data.length, self.rope, cfg.positions)
        method.check_layers(load_config(self.path).num_hidden_layers)
        scaled = {"rope": self.rope} if self.rope else {}
        return scaled | {
            "stage": cfg.stage.name,
            "tier": cfg.model.tier,
            "model": cfg.model.name,
            "training": cfg.model.training,
            "backbone": cfg.model.backbone,
            "checkpoint": digest[:16],
            "interface": interface_digest(self.path)[:16],
            "dtype": str(dtype_on(device_of(cfg), cfg.dtype)).removeprefix("torch."),
            "method": cfg.method.name,
            "settings": asdict(method),
            "block_size": method.block_size if method.unit == "block" else 1,
            "top_k": method.top_k,
            "budget": budget_name(cfg, method),
            "first_token": self.first_token if method.phase in DECODING else None,
            "selector": cfg.selector + self._oracle_heads(),
            "selector_seed": cfg.selector_seed if cfg.selector == "random" else 0,
            "context_length": cfg.data.length,
        }

    def _oracle_heads(self) -> str:
        """The heads with an oracle, as in ":1-0,1-3"; ValueError for one that doesn't exist."""
        heads = oracle_heads(self.cfg)
        if not heads:
            return ""
        model = load_config(self.path)
        shared = self.method.phase in EVICTING
        count = model.num_key_value_heads if shared else model.num_attention_heads
        for layer, head in heads:
            if layer >= model.num_hidden_layers or head >= count:
                raise ValueError(
                    f"oracle_heads: there is no {layer}-{head}: {self.cfg.model.name} has layers "
                    f"0 to {model.num_hidden_layers - 1} with heads 0 to {count - 1}"
                )
        return ":" + ",".join(f"{layer}-{head}" for layer, head in heads)

    def _key(self, setting: dict[str, Any], task: str) -> dict[str, Any]:
        essay, forms = self.cfg.data.essay, forms_of(self.cfg)
        data: dict[str, Any]
        if task == DOCUMENTS:
            corpus = corpus_of(self.cfg)
            data = {"corpus": corpus.id} if corpus else {"forms": asdict(forms)}
        elif file := self.files.get(task):
            data = {"file": _file_digest(file, "data.path"), "reserve": reserve_of(self.cfg, task)}
        elif task in TASKS:
            digest = essay and _file_digest(resolve(essay), "data.essay")
            data = {"forms": asdict(forms), "essay": digest}
            if essay or forms.answer_order == "creation":
                data["sampler"] = 2  # an earlier version made other prompts
        else:
            texts = asdict(others_of(self.cfg).of(task))
            files = {name: texts.pop(name) for name in QA_FILES.values() if name in texts}
            data = {"texts": texts, "with": asdict(forms), "reserve": texts["reserve"]}
            if name := QA_FILES.get(task):
                if not files[name]:
                    raise ValueError(no_file(task))
                data["questions"] = _file_digest(resolve(files[name]), f"data.qa.{name}")
        seed = 0 if task in self.files else self.cfg.seed  # of the generated samples
        return setting | {"task": task, "seed": seed, "data": data}


def _file_digest(path: Path, field: str) -> str:
    try:
        return provenance.sha256(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): set {field}") from None


@cache
def _digest(path: Path, sha256: str | None, backbone: str, stamp: Any) -> str:
    """check_model, once for all jobs of a sweep; stamp: changes with the file."""
    return check_model(path, sha256, backbone)


def selector_of(cfg: DictConfig, samples: list[Sample], device: torch.device) -> Selector:
    """The selector of a batch; a random one depends on selector_seed and the sample alone."""
    if cfg.selector == "random":
        names = (f"{cfg.selector_seed}/{sample.id}".encode() for sample in samples)
        seeds = [int.from_bytes(hashlib.sha256(name).digest()[:4]) for name in names]
        return Random(torch.tensor(seeds, device=device))
    if cfg.selector == "oracle":
        gold = torch.zeros(len(samples), cfg.data.length, dtype=torch.bool)
        for row, sample in zip(gold, samples, strict=True):
            for start, end in (span for spans in sample.gold_spans.values() for span in spans):
                row[start:end] = True
        return Oracle(gold.to(device), oracle_heads(cfg))
    return TopK()
