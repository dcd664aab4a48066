"""The cells of a configuration, and the protocol of the stages that fill them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol

import torch
from omegaconf import DictConfig

from ratplus_exp.config import oracle_heads, rope_of, unnamed_classes, validate_method
from ratplus_exp.methods import Method, Oracle, Random, Selector, TopK
from ratplus_exp.methods.base import EVICTING
from ratplus_exp.models.loading import dtype_on, interface_digest, load_config
from ratplus_exp.models.prefill import PromptBatch
from ratplus_exp.stages.common import (
    check_context,
    checkpoint_of,
    device_of,
    first_token_of,
    resolve,
    store_of,
)
from ratplus_exp.stages.samples import Samples, question_of
from ratplus_exp.tasks import Sample

Records = Mapping[Any, Mapping[str, Any]]
DECODING = ("decode", *EVICTING)  # phases of methods that select after the prompt
PROMPTS = (
    *("checkpoint", "interface", "dtype", "rope", "task", "seed", "data", "question"),
    "context_length",
)
"""The part of a cell's key that determines its prompts and their dense prefill."""


class MeasuringStage(Protocol):
    """Measures a model under a method, sample by sample.

    samples: the class of its samples, which determines the tasks.
    version: of its records and metrics; increase it when they change.
    """

    samples: type[Samples] = Samples
    version: int = 1

    def check(self, method: Method, name: str) -> None:
        """ValueError, with the remedy, for a method (of this name) that it can't measure."""
        return

    def measure(
        self, job: Job, samples: list[Sample], prompts: PromptBatch, tokenizer: Any
    ) -> list[dict[str, Any]]:
        """A record for each sample of a batch, plain JSON with "id"; prompts: the samples'."""
        ...

    def metrics(self, records: Records, first: PromptBatch) -> dict[str, Any]:
        """Aggregates of a cell's records, which are by id; first: a batch of its first prompts."""
        ...


class Job:
    """One configuration of a measuring stage and its cells, one per task.

    The constructor checks all settings, and neither loads a model nor writes.
    """

    def __init__(self, cfg: DictConfig, stage: MeasuringStage) -> None:
        self.cfg, self.stage = cfg, stage
        self.examples: int = cfg.data.examples  # of each task
        self.method = validate_method(cfg)
        stage.check(self.method, cfg.method.name)
        self.path = resolve(cfg.model.path)
        setting = self._setting()
        self.store = store_of(cfg)
        self.cells = {
            task: self.store.cell(setting | {"task": task} | key | self._question(task))
            for task, key in stage.samples.keys(cfg).items()
        }

    @property
    def first_token(self) -> str:
        """`first_token_of`; it changes answers only of methods that select after the prompt."""
        return first_token_of(self.cfg) if self.method.phase in DECODING else "prefill"

    def missing(self) -> list[str]:
        """Tasks whose cells lack samples."""
        return [task for task, cell in self.cells.items() if cell.done() < self.examples]

    def prefill(self, task: str) -> str:
        """A key of the prefill that a cell begins with; cells with an equal key share it."""
        cell = self.cells[task]
        if not self.method.dense_prefill:
            return cell.id
        return json.dumps([self.first_token, *(cell.key.get(name) for name in PROMPTS)])

    def _setting(self) -> dict[str, Any]:
        """The part of the keys that all cells share: exactly what affects their numbers."""
        cfg, method = self.cfg, self.method
        digest = checkpoint_of(cfg.model)
        check_context(cfg)
        rope, version = rope_of(cfg), self.stage.version
        optional: dict[str, Any] = {"rope": rope} if rope else {}
        optional |= {"version": version} if version > 1 else {}
        optional |= {"target": targets} if (targets := unnamed_classes(cfg)) else {}
        if cfg.selector == "random" and any(m.by_query_block for m in method.parts):
            optional |= {"draws": 2}  # 1: one for each query
        return optional | {
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
            "block_size": method.block_size,
            "top_k": method.top_k,
            "budget": str(method.fraction(cfg.data.length)),
            "first_token": self.first_token if method.phase in DECODING else None,
            "selector": cfg.selector + self._oracle_heads(),
            "selector_seed": cfg.selector_seed if cfg.selector == "random" else 0,
            "context_length": cfg.data.length,
        }

    def _question(self, task: str) -> dict[str, str]:
        """Where a method selects before the question of a file's prompts: how to find that."""
        if not self.cfg.data.path or self.first_token != "split":
            return {}
        return {"question": question_of(self.cfg, task)}

    def _oracle_heads(self) -> str:
        """The heads with an oracle, as in ":1-0,1-3"; ValueError for one that doesn't exist."""
        heads = oracle_heads(self.cfg)
        if not heads:
            return ""
        model = load_config(self.path)
        for layer, head in heads:
            shared = self.method.for_layer(layer).phase in EVICTING
            count = model.num_key_value_heads if shared else model.num_attention_heads
            if layer >= model.num_hidden_layers or head >= count:
                raise ValueError(
                    f"oracle_heads: there is no {layer}-{head}: {self.cfg.model.name} has layers "
                    f"0 to {model.num_hidden_layers - 1} with heads 0 to {count - 1}"
                )
            if (anchor := self.method.anchor(layer)) != layer:
                raise ValueError(
                    f"oracle_heads: layer {layer} reuses the selection of layer {anchor}: use that"
                )
        return ":" + ",".join(f"{layer}-{head}" for layer, head in heads)


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
