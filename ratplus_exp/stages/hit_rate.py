"""stage=hit_rate: H1, per layer and head; one cell a task.

The model is fed the gold answer, so every decoding step has a golden position: the place in the
prompt of the token to predict. A head hits a gold value if its selection includes this position at
every step of the value, where any occurrence of the value counts. MV and MQ count each of their
values. As in generation, with data.first_token=prefill the first token of an answer has no step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor

from ratplus_exp.analysis.hits import hit_rates
from ratplus_exp.methods import Engine, Layers, Method
from ratplus_exp.methods.hits import HitCounter
from ratplus_exp.models.prefill import PromptBatch
from ratplus_exp.report import Table
from ratplus_exp.stages.cells import Job, MeasuringStage, Records, selector_of
from ratplus_exp.stages.common import job_folder, model_name, show
from ratplus_exp.stages.pool import fill_tracked
from ratplus_exp.store import write_atomically
from ratplus_exp.tasks import Sample
from ratplus_exp.tasks.sample import golden_answer


def run(cfg: DictConfig) -> None:
    """Fill the missing cells, and print, write and track the heads' hit rates."""
    fill_tracked(Job(cfg, HitRate()), _report)


class DecodingStage(MeasuringStage):
    """A stage that measures what decoding steps select; name: of the stage, for messages."""

    name = ""

    def check(self, method: Method, name: str) -> None:
        """The method must select for decoding steps."""
        if method.phase == "prefill":
            raise ValueError(
                f"stage={self.name} can't measure {name}: it selects for prompt tokens and decodes "
                "densely, so decoding steps have no selection; use quest or snapkv"
            )
        if isinstance(method, Layers):
            raise ValueError(f"stage={self.name} takes one method for all layers, not {name}")
        if method.phase is None:
            raise ValueError(
                f"stage={self.name} needs a method that selects, not {name}: use quest"
            )


class HitRate(DecodingStage):
    """The measuring stage: gold values hit, by layer and head."""

    name = "hit_rate"

    @torch.inference_mode()
    def measure(
        self, job: Job, samples: list[Sample], prompts: PromptBatch, tokenizer: Any
    ) -> list[dict[str, Any]]:
        """Hits, by layer and head."""
        answers = teacher_forced(samples, prompts, tokenizer, job.cfg.data.length)
        device, lengths = prompts.ids.device, prompts.mask.sum(1)
        layers = prompts.model.config.num_hidden_layers
        counter = HitCounter(job.method, answers.golden, lengths, layers)
        engine = Engine(job.method, selector_of(job.cfg, samples, device), counter)
        feed(prompts, engine, answers.forced[:, :-1])
        last = lengths.cpu() + torch.tensor([answer - 3 for answer in answers.sizes])
        fractions = engine.usage.fractions(len(samples), last)
        values, hits = counter.values(answers.owners)
        return [
            {
                "id": sample.id,
                "values": values[row],
                "hits": hits[row],
                "prompt_tokens": sample.length,
                "budget_measured": round(float(fractions[row]), 6),
            }
            for row, sample in enumerate(samples)
        ]

    def metrics(self, records: Records, first: PromptBatch) -> dict[str, Any]:
        """Hit rates in percent, [layer][head], over all gold values."""
        values = sum(record["values"] for record in records.values())
        hits = np.sum([record["hits"] for record in records.values()], axis=0)
        rates = np.round(100 * hits / max(values, 1), 4)
        measured = sum(r["budget_measured"] for r in records.values()) / len(records)
        return {
            "hit_rate": rates.tolist(),
            "values": values,
            "budget_measured": round(measured, 5),
        }


@dataclass
class TeacherForced:
    """The gold answers of a batch as input: A tokens, without EOS.

    golden: (B, A, data.length) bool, the golden positions of each token.
    forced: (B, A) tokens, padded.
    owners: for each sample and token the gold value that it is part of, or −1.
    sizes: each answer's tokens, EOS included.
    """

    golden: Tensor
    forced: Tensor
    owners: list[list[int]]
    sizes: list[int]


def teacher_forced(
    samples: list[Sample], prompts: PromptBatch, tokenizer: Any, length: int
) -> TeacherForced:
    """ValueError if no token that a decoding step predicts has a golden position."""
    answers = [golden_answer(sample, tokenizer) for sample in samples]
    width = max(len(answer.ids) for answer in answers) - 1
    golden = torch.zeros(len(samples), width, length, dtype=torch.bool)
    forced = torch.full((len(samples), width), tokenizer.pad_token_id)
    owners = [[-1] * width for _ in answers]
    for row, answer in enumerate(answers):
        forced[row, : len(answer.ids) - 1] = torch.tensor(answer.ids[:-1])
        for token, positions, value in answer.steps(prompts.fed):
            golden[row, token, positions] = True
            owners[row][token] = value
    if all(owner < 0 for tokens in owners for owner in tokens):
        raise ValueError(
            f"{samples[0].task}: every answer is one token long, so no decoding step has a "
            "golden position: set data.first_token=decode"
        )
    sizes = [len(answer.ids) for answer in answers]
    return TeacherForced(golden.to(prompts.ids.device), forced, owners, sizes)


def feed(prompts: PromptBatch, engine: Engine, answers: Tensor) -> None:
    """Run the model over prompts and given answers (B, T): prefill, then decoding steps."""
    ids = prompts.ids
    cache = prompts.model.new_cache(engine)
    prompts.prefill(cache)
    steps = torch.cat((ids[:, ids.shape[1] - prompts.fed :], answers.to(ids.device)), dim=1)
    if steps.shape[1]:
        prompts.model(steps, past_key_values=cache, logits_to_keep=1)


def _report(job: Job) -> dict[str, Any]:
    frame = hit_rates(job.store, cell=[cell.id for cell in job.cells.values()])
    show(_table(job.cfg, frame), "heads", also="hit_rate.csv and ")  # makes the folder
    write_atomically(job_folder() / "hit_rate.csv", frame.to_csv(index=False))
    return {"hit_rate": frame}


def _table(cfg: DictConfig, frame: pd.DataFrame) -> Table:
    """The job's heads, best first on the mean of its tasks."""
    tasks = [task for task in cfg.data.tasks if task in set(frame["task"])]
    wide = frame.pivot_table(index=["layer", "head"], columns="task", values="hit_rate")[tasks]
    wide = wide.assign(Mean=wide.mean(axis=1)).sort_values("Mean", ascending=False, kind="stable")
    heads = enumerate(wide.head(32).iterrows(), start=1)
    rows = [(rank, f"{layer}.{head}", *row) for rank, ((layer, head), row) in heads]
    first = frame.iloc[0]
    values = {"name": model_name(cfg), "method": cfg.method.name, "selector": cfg.selector}
    more = max(0, len(wide) - 32)
    columns = ("Rank", "Head", *tasks, "Mean")
    return Table.described("heads_of_job", columns, rows, 0, first=first, more=more, **values)
