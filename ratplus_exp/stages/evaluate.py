"""stage=eval: accuracy on RULER's tasks under one method and budget; one cell a task."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor

from ratplus_exp.analysis.frame import COLUMNS, SCORERS, accuracies, finished, tidy
from ratplus_exp.config import texts_of
from ratplus_exp.methods import Engine, Usage
from ratplus_exp.models.decoding import cuda_graphs, greedy
from ratplus_exp.models.loading import end_tokens
from ratplus_exp.models.prefill import PromptBatch
from ratplus_exp.report import Table
from ratplus_exp.stages.cells import Job, MeasuringStage, Records, selector_of
from ratplus_exp.stages.common import model_name, resolve, show
from ratplus_exp.stages.pool import fill_tracked
from ratplus_exp.tasks import Sample, exact, substring

MEASURED = ("budget_measured", "choosing_measured", "slots_measured")
"""Fractions of the context, for each sample: read or stored; read in addition by selection, in
bytes of all keys and values; slots of the cache for what is kept."""


def run(cfg: DictConfig) -> None:
    """Fill the missing cells, and print, write and track the table of this job."""
    fill_tracked(Job(cfg, Accuracy()), _report)


class Accuracy(MeasuringStage):
    """The measuring stage: answers and their scores."""

    def measure(
        self, job: Job, samples: list[Sample], prompts: PromptBatch, tokenizer: Any
    ) -> list[dict[str, Any]]:
        texts, usage, last = generate(job, samples, prompts, tokenizer)
        fractions = usage.fractions(len(samples), last).tolist()
        choosing = usage.choosing_fractions(len(samples), last).tolist()
        slots = torch.stack(usage.slots).double().mean(0).tolist()
        return [
            {
                "id": sample.id,
                "exact": exact(text, sample.answers, sample.one_of),
                "substring": substring(text, sample.answers, sample.one_of),
                "prediction": text,
                "answers": list(sample.answers),
                "prompt_tokens": sample.length,
                "budget_measured": round(fraction, 6),
                "choosing_measured": round(chosen, 6),
                "slots_measured": round(min(1.0, needed / sample.length), 6),
            }
            for sample, text, fraction, chosen, needed in zip(
                samples, texts, fractions, choosing, slots, strict=True
            )
        ]

    def metrics(self, records: Records, first: PromptBatch) -> dict[str, Any]:
        """Accuracies, measured fractions, and the gates' statistics."""
        measured = {
            name: round(sum(r[name] for r in records.values()) / len(records), 5)
            for name in MEASURED
            if all(name in r for r in records.values())  # older records lack some
        }
        return accuracies(records) | measured | first.gates


def generate(
    job: Job, samples: list[Sample], prompts: PromptBatch, tokenizer: Any
) -> tuple[list[str], Usage, Tensor]:
    """Greedy answers to a batch of prompts, what was read, and each one's last position (B,)."""
    engine = Engine(job.method, selector_of(job.cfg, samples, prompts.ids.device))
    room = texts_of(job.cfg, samples[0].task).reserve
    out, last = answers(prompts, engine, room, tokenizer, job.cfg)
    return tokenizer.batch_decode(out, skip_special_tokens=True), engine.usage, last


def answers(
    prompts: PromptBatch, engine: Engine, room: int, tokenizer: Any, cfg: DictConfig
) -> tuple[Tensor, Tensor]:
    """Greedy answers (B, at most `room`) of the configured model, padded from EOS on, and each
    row's last position (B,)."""
    eos = end_tokens(resolve(cfg.model.path)) or [tokenizer.eos_token_id]
    out = greedy(
        prompts,
        engine,
        room,
        eos=eos,
        pad=tokenizer.pad_token_id,
        capture=cuda_graphs if cfg.cuda_graphs and prompts.ids.is_cuda else None,
    )
    # Neither the last generated token nor anything behind a row's EOS is fed back.
    ended = torch.isin(out, out.new_tensor(eos)).cumsum(1) > 0
    fed = (~ended).sum(1).clamp(max=out.shape[1] - 1)
    return out.masked_fill(ended, tokenizer.pad_token_id), prompts.mask.sum(1) - 1 + fed


def _frame(job: Job) -> pd.DataFrame:
    """The job's cells as a tidy frame, in the order of its tasks, with the other backbone's
    accuracy where the store has it for the same setting and number of samples."""
    stored = finished(job.store, "eval")
    every = tidy(stored).set_index("cell")
    frame = every.loc[[cell.id for cell in job.cells.values()]].reset_index()
    settings = [_setting(cell.key) for cell in job.cells.values()]
    other = every.loc[[x.cell.id for x in stored if _setting(x.cell.key) in settings]]
    other = other[other["backbone"] != frame.loc[0, "backbone"]]
    of_task = other.set_index("task")
    if len(other[["model", "checkpoint"]].drop_duplicates()) != 1 or of_task.index.has_duplicates:
        return frame
    same_samples = frame["task"].map(of_task["n"]) == frame["n"]
    accuracy = frame["task"].map(of_task[SCORERS[0]]).where(same_samples)
    return frame.assign(**{other["model"].iloc[0]: accuracy}) if same_samples.any() else frame


def _setting(key: dict[str, Any]) -> dict[str, Any]:
    of_model = ("model", "backbone", "checkpoint", "interface")
    return {name: value for name, value in key.items() if name not in of_model}


def _report(job: Job) -> dict[str, Any]:
    """Print and write the table of this job's cells, one row a task; what to track of them."""
    cfg, frame = job.cfg, _frame(job)
    first = frame.iloc[0]
    others = [name for name in frame.columns if name not in COLUMNS]
    numbers = frame.set_index("task")[[*SCORERS, *others]].astype(float)
    numbers.loc["Mean"] = numbers.mean(skipna=False)
    counts = [*frame["n"], frame["n"].sum()]
    rows = [(x, *row, n) for (x, row), n in zip(numbers.iterrows(), counts, strict=True)]
    table = Table.described(
        "of_job",
        ("Task", *SCORERS, *others, "n"),
        rows,
        first=first,
        name=model_name(cfg),
        method=cfg.method.name,
        kept=frame["budget_measured"].mean(),
        memory=frame["effective_memory_length"].mean(skipna=False),
        other=others[0] if others else "",
    )
    show(replace(table, breaks=frozenset({len(rows) - 1})), "table")
    accuracy = {f"accuracy/{r.task}": r.exact for r in frame.itertuples()}
    return accuracy | {"accuracy/mean": float(frame[SCORERS[0]].mean()), "cells": frame}
