"""What the measuring stages share: the cells of a configuration, their samples, and filling them.

A measuring stage is a module with two functions, which `fill` calls:

    measure(job, loaded, samples) -> one record a sample, plain JSON with "id"
    metrics(job, loaded, records, samples) -> what is computed from all records of a cell

`records` are all of the cell by id, `samples` its first ones, for what takes prompts to measure.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from ratplus_exp import provenance
from ratplus_exp.config import (
    budget_name,
    expected_sha256,
    forms_of,
    oracle_heads,
    plain,
    validate_method,
)
from ratplus_exp.methods import Oracle, Random, Selector, TopK
from ratplus_exp.models.loading import (
    check_length,
    check_model,
    dtype_on,
    interface_digest,
    load_config,
    load_model,
    load_tokenizer,
    weight_files,
)
from ratplus_exp.stages.common import device_of, job_folder, resolve, store_of
from ratplus_exp.stages.samples import Samples, ruler_files
from ratplus_exp.store import Cell
from ratplus_exp.tasks import Sample
from ratplus_exp.tracking import tracked
from ratplus_exp.training.parallel import barrier, from_first, processes, rank, world_size

DECODING = ("decode", "once")  # phases of methods that leave the prefill dense


class Job:
    """One configuration of a measuring stage and its cells, one a task.

    Making it checks what can be wrong, and loads and writes nothing.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.method = validate_method(cfg)
        self.store = store_of(cfg)
        self.path = resolve(cfg.model.path)
        self.files = ruler_files(cfg)
        setting = self._setting()
        self.cells = {task: self.store.cell(self._key(setting, task)) for task in cfg.data.tasks}

    @property
    def first_token(self) -> str:
        """Where an answer's first token comes from; a sparse prefill knows no difference."""
        return self.cfg.stage.first_token if self.method.phase in DECODING else "prefill"

    def missing(self) -> dict[str, Cell]:
        """Cells that lack samples, by task."""
        n = self.cfg.data.examples
        return {task: cell for task, cell in self.cells.items() if not cell.is_done(n)}

    def _setting(self) -> dict[str, Any]:
        """Everything that affects the numbers of all cells, and nothing else."""
        cfg, method = self.cfg, self.method
        files = [file for file in weight_files(self.path) if file.exists()]
        stamp = tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in files)
        digest = _digest(self.path, expected_sha256(cfg.model), cfg.model.backbone, stamp)
        check_length(self.path, cfg.data.length)
        return {
            "stage": cfg.stage.name,
            "tier": cfg.model.tier,
            "model": cfg.model.name,
            "training": cfg.model.training,
            "backbone": cfg.model.backbone,
            "checkpoint": digest[:16],
            "interface": interface_digest(self.path)[:16],
            "dtype": str(dtype_on(device_of(cfg))).removeprefix("torch."),
            "method": cfg.method.name,
            "settings": asdict(method),
            "block_size": method.block_size if method.unit == "block" else 1,
            "top_k": method.top_k,
            "budget": budget_name(cfg, method),
            "first_token": self.first_token if method.phase in DECODING else None,
            "selector": cfg.selector + self._told(),
            "selector_seed": cfg.selector_seed if cfg.selector == "random" else 0,
            "context_length": cfg.data.length,
        }

    def _told(self) -> str:
        """Which heads an oracle tells, as in ":1-0,1-3"; ValueError for one that isn't there."""
        heads = oracle_heads(self.cfg)
        if not heads:
            return ""
        model = load_config(self.path)
        shared = self.method.phase == "once"
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
        if file := self.files.get(task):
            data = {"file": _file_digest(file, "data.path"), "reserve": forms.reserve}
        else:
            digest = essay and _file_digest(resolve(essay), "data.essay")
            data = {"forms": asdict(forms), "essay": digest}
        seed = 0 if file else self.cfg.seed  # of the generated samples
        return setting | {"task": task, "seed": seed, "data": data}


def _file_digest(path: Path, field: str) -> str:
    try:
        return provenance.sha256(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): set {field}") from None


@cache
def _digest(path: Path, sha256: str | None, backbone: str, stamp: Any) -> str:
    """check_model, once for the many jobs of a sweep; stamp changes when the file does."""
    return check_model(path, sha256, backbone)


@dataclass
class Loaded:
    """A model and the tokenizer it was trained with."""

    model: Any
    tokenizer: Any

    @classmethod
    def of(cls, job: Job) -> Loaded:
        return cls(load_model(job.path, device_of(job.cfg)), load_tokenizer(job.path))


def fill_missing(job: Job, log: Callable[[Any], None]) -> None:
    """Run a job's missing cells with a progress bar, in a W&B run that `log` fills in the end; of
    several processes, each has its share of the samples."""
    with processes(device_of(job.cfg), timedelta(hours=2)):
        if missing := from_first(lambda: list(job.missing())):
            _fill_all(job, missing, log)
        elif rank() == 0:
            print(f"All {len(job.cells)} cells are there already; nothing to run.")


def _fill_all(job: Job, missing: list[str], log: Callable[[Any], None]) -> None:
    cfg, source = job.cfg, Samples(job.cfg, load_tokenizer(job.path))
    for task in missing:
        source(task, 0)  # prompts that cannot be made are refused before anything is written
    for task in missing[:1]:  # while the model is loaded
        source.ahead(task, _lacking(job, task, source)[rank() :: world_size()])
    with closing(source), tracked(cfg, job_folder()) as tracker:
        loaded = Loaded.of(job)
        have = sum(min(len(job.cells[t].records()), cfg.data.examples) for t in missing)
        total = cfg.data.examples * len(missing)
        with tqdm(total=total, initial=have, unit="example", disable=rank() > 0) as bar:
            for task in missing:
                bar.set_description(f"{cfg.model.name} {cfg.method.name} {task}")
                fill(job, task, loaded, source, bar.update)
        if rank() == 0:
            log(tracker)


def fill(job: Job, task: str, loaded: Loaded, source: Samples, done: Callable[[int], None]) -> None:
    """Append the samples that a cell lacks, batch by batch, and finish it.

    What is missing is dealt out by rank 0's reading of the store, card by card: a share that a dead
    process left is shared by all of the next run, whatever their number.

    done: called with the number of samples that were appended, by all processes together.
    """
    cfg, cell = job.cfg, job.cells[task]
    stage = import_module(cfg.stage.run.rpartition(".")[0])
    with _opened(cell, cfg):
        todo = from_first(lambda: _lacking(job, task, source))
        mine, left = todo[rank() :: world_size()], len(todo)
        source.ahead(task, mine)
        for start in range(0, len(mine), cfg.stage.batch_size):
            batch = [source(task, index) for index in mine[start : start + cfg.stage.batch_size]]
            began = time.perf_counter()
            records = stage.measure(job, loaded, batch)
            seconds = round((time.perf_counter() - began) / len(batch), 5)
            cell.append([record | {"seconds": seconds} for record in records])
            new = min(len(batch) * world_size(), left)
            left -= new
            done(new)
        barrier()
        if rank() > 0:
            return
        every = cell.records()
        first = [source(task, index) for index in range(min(16, cfg.data.examples))]
        seconds = round(sum(record.get("seconds", 0.0) for record in every.values()), 3)
        cell.finish(stage.metrics(job, loaded, every, first) | {"seconds": seconds})


def _lacking(job: Job, task: str, source: Samples) -> list[int]:
    have, every = job.cells[task].records(), range(job.cfg.data.examples)
    return [index for index in every if source.id(task, index) not in have]


@contextmanager
def _opened(cell: Cell, cfg: DictConfig) -> Iterator[None]:
    """Rank 0 takes the cell; only then do the others write beside it."""
    with ExitStack() as stack:
        if rank() == 0:
            stack.enter_context(cell.open(provenance.provenance(plain(cfg))))
        barrier()
        if rank() > 0:
            stack.enter_context(cell.open_share(rank()))
        yield


def padded(samples: Iterable[Sample], loaded: Loaded) -> tuple[Tensor, Tensor]:
    """Prompts and attention mask (B, T), left-padded, on the model's device."""
    batch = loaded.tokenizer.pad(
        {"input_ids": [list(sample.input_ids) for sample in samples]}, return_tensors="pt"
    )
    device = loaded.model.device
    return batch["input_ids"].to(device), batch["attention_mask"].to(device)


def selector_of(cfg: DictConfig, samples: list[Sample], device: torch.device) -> Selector:
    """The selector over a batch; a random draw depends on selector_seed and the sample alone."""
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
