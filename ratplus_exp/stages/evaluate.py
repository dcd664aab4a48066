"""stage=eval: accuracy on the NIAH tasks under one method and budget. One cell a task."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from ratplus_exp import provenance
from ratplus_exp.config import budget_name, forms_of, plain, validate_method
from ratplus_exp.memory import gate_statistics
from ratplus_exp.methods import Engine, Method, Oracle, Random, Selector, TopK
from ratplus_exp.models.loading import (
    check_model,
    dtype_on,
    interface_digest,
    load_model,
    load_tokenizer,
)
from ratplus_exp.results import MISSING, Cell, Store, Table, accuracies, tidy
from ratplus_exp.results.frame import COLUMNS, EXTRA
from ratplus_exp.stages.common import device_of, job_folder, resolve, store_of
from ratplus_exp.tasks import NIAH, TASKS, Sample, read_jsonl, score_p2, score_ruler
from ratplus_exp.tracking import log_frame, tracked
from ratplus_exp.training.parallel import barrier, from_first, processes, rank, world_size

DECODING = ("decode", "once")  # phases of methods that leave the prefill dense


def run(cfg: DictConfig) -> None:
    """Run the cells that are missing, log them, and print and write the table of this job."""
    method, store, examples = validate_method(cfg), store_of(cfg), cfg.data.examples
    path = resolve(cfg.model.path)
    digest = check_model(path, cfg.model.sha256, cfg.model.backbone)
    files = _ruler_files(cfg)
    cells = {
        task: store.cell(_key(cfg, method, digest, task, files.get(task)))
        for task in cfg.data.tasks
    }
    device = device_of(cfg)
    with processes(device, timedelta(hours=2)):
        names = from_first(lambda: [t for t, c in cells.items() if not c.is_done(examples)])
        if names:
            _run(cfg, method, store, cells, names, files, device)
        elif rank() == 0:
            print(f"All {len(cells)} cells are there already; nothing to run.")
    if rank() == 0:
        _report(cfg, _frame(store, cells))


def _run(
    cfg: DictConfig,
    method: Method,
    store: Store,
    cells: dict[str, Cell],
    names: list[str],
    files: dict[str, Path],
    device: torch.device,
) -> None:
    """Fill the cells of `names`; of several processes, each with its share of the samples."""
    path = resolve(cfg.model.path)
    tokenizer = load_tokenizer(path)
    source = _Source(cfg, tokenizer, files)
    for task in names:
        source(task, 0)  # prompts that cannot be made are refused before anything is written
    total = cfg.data.examples * len(names)
    with tracked(cfg, job_folder()) as tracker:
        model = load_model(path, device)
        with tqdm(total=total, unit="example", disable=rank() > 0) as bar:
            for task in names:
                bar.set_description(f"{cfg.model.name} {cfg.method.name} {task}")
                with _opened(cells[task], cfg):
                    _fill(cells[task], cfg, model, tokenizer, method, source, task, bar)
        if rank() == 0:
            _log(tracker, _frame(store, cells))


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


def _frame(store: Store, cells: dict[str, Cell]) -> pd.DataFrame:
    """The job's cells as a tidy frame, in the order of its tasks, with the other backbone's
    accuracy beside them where that has been measured in the very same setting."""
    every = tidy(store, "eval").set_index("cell")
    frame = every.loc[[cell.id for cell in cells.values()]].reset_index()
    settings = [_setting(cell) for cell in cells.values()]
    twins = [cell for cell in store.cells("eval") if cell.done() and _setting(cell) in settings]
    other = every.loc[[cell.id for cell in twins]]
    other = other[other["backbone"] != frame.loc[0, "backbone"]]
    if other["checkpoint"].nunique() != 1:
        return frame
    accuracy = other.set_index("task")["accuracy"].rename(other["model"].iloc[0])
    return frame.join(accuracy, on="task")


def _setting(cell: Cell) -> dict[str, Any]:
    own = ("model", "backbone", "checkpoint", "interface")
    return {name: value for name, value in cell.key.items() if name not in own}


def _key(
    cfg: DictConfig, method: Method, digest: str, task: str, file: Path | None
) -> dict[str, Any]:
    """Everything that affects a cell's numbers, and nothing else."""
    essay, forms = cfg.data.essay, forms_of(cfg)
    data: dict[str, Any]
    if file is not None:
        data = {"file": provenance.sha256(file), "reserve": forms.reserve}
    else:
        data = {"forms": asdict(forms), "essay": essay and provenance.sha256(resolve(essay))}
    return {
        "stage": "eval",
        "tier": cfg.model.tier,
        "model": cfg.model.name,
        "backbone": cfg.model.backbone,
        "checkpoint": digest[:16],
        "interface": interface_digest(resolve(cfg.model.path))[:16],
        "dtype": str(dtype_on(device_of(cfg))).removeprefix("torch."),
        "method": cfg.method.name,
        "settings": asdict(method),
        "block_size": method.block_size if method.unit == "block" else 1,
        "top_k": method.top_k,
        "budget": budget_name(cfg, method),
        "first_token": cfg.stage.first_token if method.phase in DECODING else None,
        "selector": cfg.selector,
        "selector_seed": cfg.selector_seed if cfg.selector == "random" else 0,
        "task": task,
        "seed": 0 if file is not None else cfg.seed,  # of the generated samples
        "context_length": cfg.data.length,
        "data": data,
    }


class _Source:
    """Samples by task and index, generated or from RULER's files."""

    def __init__(self, cfg: DictConfig, tokenizer: Any, files: dict[str, Path]) -> None:
        forms = forms_of(cfg)
        essay = str(resolve(cfg.data.essay)) if cfg.data.essay else None
        self.seed = cfg.seed
        self.niah = NIAH(tokenizer, cfg.data.length, forms, essay)
        prompt_length = cfg.data.length - forms.reserve
        self.read = {t: read_jsonl(f, tokenizer, prompt_length, t) for t, f in files.items()}
        for task, samples in self.read.items():
            if len(samples) < cfg.data.examples:
                raise ValueError(
                    f"{files[task]} has {len(samples)} samples: set data.examples={len(samples)}"
                )

    def __call__(self, task: str, index: int) -> Sample:
        if self.read:
            return self.read[task][index]
        return self.niah.sample(task, self.seed, index)


def _ruler_files(cfg: DictConfig) -> dict[str, Path]:
    """RULER's file of each task, where data.path is set."""
    if not cfg.data.path:
        return {}
    files = {
        t: resolve(cfg.data.path) / TASKS[t].ruler_name / "validation.jsonl" for t in cfg.data.tasks
    }
    for file in files.values():
        if not file.is_file():
            raise ValueError(f"there is no {file}: set data.path to RULER's output folder")
    return files


def _fill(
    cell: Cell,
    cfg: DictConfig,
    model: Any,
    tokenizer: Any,
    method: Method,
    source: _Source,
    task: str,
    bar: Any,
) -> None:
    """Append the samples that a cell lacks, batch by batch, and finish it.

    What is missing is dealt out by rank 0's reading of the store, card by card: a share that a dead
    process left is shared by all of the next run, whatever their number.
    """

    def lacking() -> list[int]:
        have, every = cell.records(), range(cfg.data.examples)
        return [index for index in every if source(task, index).id not in have]

    todo = from_first(lacking)
    bar.update(cfg.data.examples - len(todo))
    mine = todo[rank() :: world_size()]
    for start in range(0, len(mine), cfg.stage.batch_size):
        batch = [source(task, index) for index in mine[start : start + cfg.stage.batch_size]]
        engine = Engine(method, _selector(cfg, batch, model.device))
        new, first = forms_of(cfg).reserve, cell.key["first_token"] or "prefill"
        texts, fractions = generate(model, tokenizer, batch, engine, new, first)
        cell.append(
            [
                {
                    "id": sample.id,
                    "score_p2": score_p2(text, sample.answers),
                    "score_ruler": score_ruler(text, sample.answers),
                    "prediction": text,
                    "answers": list(sample.answers),
                    "prompt_tokens": sample.length,
                    "budget_measured": round(fraction, 6),
                }
                for sample, text, fraction in zip(batch, texts, fractions, strict=True)
            ]
        )
        bar.update(min(len(batch) * world_size(), bar.total - bar.n))
    barrier()
    if rank() > 0:
        return
    records = cell.records()
    ids, mask = _padded([source(task, i) for i in range(min(16, cfg.data.examples))], tokenizer)
    measured = sum(r["budget_measured"] for r in records.values()) / len(records)
    metrics = accuracies(records) | {"budget_measured": round(measured, 5)}
    cell.finish(metrics | gate_statistics(model, ids.to(model.device), mask.to(model.device)))


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    samples: list[Sample],
    engine: Engine,
    max_new_tokens: int,
    first_token: str = "prefill",
) -> tuple[list[str], list[float]]:
    """Greedy answers to a batch of prompts, left-padded, and each one's measured budget.

    first_token: what gives the answer's first token, the "prefill" (as in the papers' own code) or
        a "decode" step for the prompt's last token, so that methods which select while decoding
        or keep a part of the cache are at work from the first token on.
    """
    ids, mask = (x.to(model.device) for x in _padded(samples, tokenizer))
    cache = model.new_cache(engine)
    if first_token == "decode":
        model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache, logits_to_keep=1)
    out = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )[:, ids.shape[1] :]
    # The last generated token is never fed back, nor is anything behind a row's EOS.
    ended = (out == tokenizer.eos_token_id).cumsum(1) > 0
    fed = (~ended).sum(1).clamp(max=out.shape[1] - 1)
    fractions = engine.usage.fractions(len(ids), mask.sum(1) - 1 + fed)
    return tokenizer.batch_decode(out, skip_special_tokens=True), fractions.tolist()


def _padded(samples: Iterable[Sample], tokenizer: Any) -> tuple[Tensor, Tensor]:
    batch = tokenizer.pad(
        {"input_ids": [list(sample.input_ids) for sample in samples]}, return_tensors="pt"
    )
    return batch["input_ids"], batch["attention_mask"]


def _selector(cfg: DictConfig, samples: list[Sample], device: torch.device) -> Selector:
    if cfg.selector == "random":
        names = (f"{cfg.selector_seed}/{sample.id}".encode() for sample in samples)
        seeds = [int.from_bytes(hashlib.sha256(name).digest()[:4]) for name in names]
        return Random(torch.tensor(seeds, device=device))
    if cfg.selector == "oracle":
        gold = torch.zeros(len(samples), cfg.data.length, dtype=torch.bool)
        for row, sample in zip(gold, samples, strict=True):
            for start, end in (span for spans in sample.gold_spans.values() for span in spans):
                row[start:end] = True
        return Oracle(gold.to(device))
    return TopK()


def _report(cfg: DictConfig, frame: pd.DataFrame) -> None:
    """Print and write the table of this job's cells, one row a task."""
    first = frame.iloc[0]
    shown = {"accuracy": "P2", "accuracy_ruler": "RULER"}
    others = [name for name in frame.columns if name not in (*COLUMNS, *EXTRA)]
    numbers = frame.set_index("task")[[*shown, *others]].astype(float)
    numbers.loc["Mean"] = numbers.mean(skipna=False)
    counts = [*frame["n"], frame["n"].sum()]
    rows = [
        (task, *(MISSING if x != x else f"{x:.1f}" for x in row), str(n))
        for (task, row), n in zip(numbers.iterrows(), counts, strict=True)
    ]
    caption = (
        f"Accuracy in % by P2's and by RULER's score; tier {first.tier}, {first.context_length} "
        f"tokens, seed {first.seed}; budget {first.budget}, really attended or stored: "
        f"{frame['budget_measured'].mean():.3f}."
    )
    if frame["effective_memory_length"].notna().all():
        memory = frame["effective_memory_length"].mean()
        caption += f" Effective memory length: {memory:.1f} tokens."
    if others:
        caption += f" {others[0]}: the other backbone in the same setting, by P2's score."
    title = f"{cfg.model.name}, {cfg.method.name} at budget {first.budget}, selector {cfg.selector}"
    columns = ("Task", *shown.values(), *others, "n")
    table = Table(title, caption, columns, tuple(rows), frozenset({len(rows) - 1}))
    table.write(job_folder(), "table")
    print(table.to_text())
    print(f"Written to {job_folder()}/table.md, .csv and .tex.")


def _log(tracker: Any, frame: pd.DataFrame) -> None:
    accuracy = {f"accuracy/{r.task}": r.accuracy for r in frame.itertuples()}
    tracker.summary.update(accuracy | {"accuracy/mean": float(frame["accuracy"].mean())})
    log_frame(tracker, "cells", frame)
