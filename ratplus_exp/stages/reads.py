"""stage=reads: from which tokens heads read a gold value, and which reads a selection loses.

The gold answer is the input, as for H1 (`stages.hit_rate`). A head reads at a decoding step if more
than half of its dense attention is on the golden position and the tokens after it, up to 1/16 of
the context: a memory of the golden token reaches them. The same attention is then limited to the
selected tokens. The read is lost if at most a tenth of what remains is on these tokens; it echoes
if, besides, more than half is on the answer's own tokens. A step is lost if more than half of its
reads, of all layers and heads, are lost.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from ratplus_exp.methods import Dense, Engine, Method, States
from ratplus_exp.methods.selection import grouped
from ratplus_exp.models.prefill import PromptBatch
from ratplus_exp.report import Table
from ratplus_exp.report.prose import SELECTORS
from ratplus_exp.stages.cells import Job, Records, selector_of
from ratplus_exp.stages.hit_rate import DecodingStage, feed, teacher_forced
from ratplus_exp.store import Finished
from ratplus_exp.tasks import Sample
from ratplus_kernels.selection import inner_products

REACH = 16  # the context over the tokens after a golden position that count as its memory
COUNTS = ("reads", "on_token", "lost", "echoes")


@dataclass
class Weighing(Engine):
    """Dense attention that gives its weights (B, H, Q, T) at decoding steps to `take`, by layer."""

    take: Callable[[int, Tensor], None] = field(kw_only=True)

    def decode(self, states: States, layer: int) -> Tensor:
        q, k = grouped(states.q, states.k.shape[1]), states.k.unsqueeze(2)
        logits = inner_products(q, k).float().flatten(1, 2) / sqrt(q.shape[-1])
        later = torch.arange(k.shape[3], device=k.device) > states.step.positions[:, None, :, None]
        self.take(layer, logits.masked_fill(later, -torch.inf).softmax(-1))
        return super().decode(states, layer)


class Reads(DecodingStage):
    """The measuring stage: counts of reads, by layer and by step."""

    name = "reads"
    version = 2

    def check(self, method: Method, name: str) -> None:
        """Besides, it must attend to its selection alone."""
        super().check(method, name)
        if type(method).pattern is not Method.pattern or method.mean_value:
            raise ValueError(
                f"stage=reads can't measure {name}: it attends to more than its selection; use "
                "quest or snapkv"
            )

    @torch.inference_mode()
    def measure(
        self, job: Job, samples: list[Sample], prompts: PromptBatch, tokenizer: Any
    ) -> list[dict[str, Any]]:
        """For each layer, over heads and steps: reads, the sum of their attention that is on the
        golden position itself, lost reads, and those that echo. steps: for each gold value and
        each of its steps, over layers and heads: reads and lost reads."""
        answers = teacher_forced(samples, prompts, tokenizer, job.cfg.data.length)
        first = 0 if prompts.fed else 1  # the first answer token that a step predicts
        golden, lengths = answers.golden[:, first:], prompts.mask.sum(1)
        reach = job.cfg.data.length // REACH
        inside = torch.arange(golden.shape[-1], device=lengths.device) < lengths[:, None, None]
        region = F.max_pool1d(F.pad(golden.float(), (reach, 0)), reach + 1, 1).bool() & inside
        selections = defaultdict(list)

        def record(layer: int, *selection: Tensor) -> None:
            selections[layer].append(selection)

        engine = Engine(job.method, selector_of(job.cfg, samples, golden.device), record)
        feed(prompts, engine, answers.forced[:, :-1])
        counts = torch.zeros(len(samples), engine.layers, len(COUNTS), dtype=torch.float64)
        by_step = torch.zeros(*golden.shape[:2], 2, dtype=torch.int64)

        def count(layer: int, weights: Tensor) -> None:
            weights = weights[:, :, -golden.shape[1] :]  # of a question's tokens none
            room = (0, weights.shape[-1] - golden.shape[-1])
            at, near = (F.pad(x, room)[:, None] for x in (golden, region))  # (B, 1, A, T)
            read = (weights * near).sum(-1) > 0.5
            left = torch.ones_like(weights, dtype=torch.bool)
            for rows, positions, selected in selections[layer]:
                steps = positions - lengths[rows, None] + 1 - first
                _remove(left, job.method, rows, steps, selected)
            left = weights * left
            answer = torch.arange(left.shape[-1], device=left.device) >= lengths[:, None]
            rest = left.sum(-1)
            lost = read & ((left * near).sum(-1) <= 0.1 * rest)
            echo = lost & ((left * answer[:, None, None]).sum(-1) > 0.5 * rest)
            parts = (read, read * (weights * at).sum(-1), lost, echo)
            counts[:, layer] = torch.stack([x.double().sum((1, 2)) for x in parts], -1).cpu()
            by_step.add_(torch.stack([read, lost], -1).sum(1).cpu())

        feed(prompts, Weighing(Dense(), take=count), answers.forced[:, :-1])
        return [
            {"id": sample.id, "steps": _by_value(steps, torch.tensor(owners[first:]))}
            | dict(zip(COUNTS, row.T.round(decimals=4).tolist(), strict=True))
            for sample, row, steps, owners in zip(
                samples, counts, by_step, answers.owners, strict=True
            )
        ]

    def metrics(self, records: Records, first: PromptBatch) -> dict[str, Any]:
        """Sums over the samples, by layer. Shares of gold values: with a lost step, with a lost
        first and with a lost last step."""
        stored = records.values()
        sums = {x: np.sum([r[x] for r in stored], axis=0).round(4).tolist() for x in COUNTS}
        values = [[2 * lost > reads for reads, lost in v] for r in stored for v in r["steps"]]
        shares = {
            "first_lost": [steps[0] for steps in values],
            "last_lost": [steps[-1] for steps in values],
            "value_lost": [any(steps) for steps in values],
        }
        return sums | {name: float(np.mean(lost)) for name, lost in shares.items()}


def _by_value(steps: Tensor, owners: Tensor) -> list[list[list[int]]]:
    """The rows of steps (A, 2) of each gold value; owners (A): the value of each row, or −1."""
    return [steps[owners == value].tolist() for value in owners.unique() if value >= 0]


def _remove(left: Tensor, method: Method, rows: Tensor, steps: Tensor, selected: Tensor) -> None:
    """Set to false in left (B, H, A, T) what a selection of some rows leaves out.

    steps (R, Q): the step, below A, that each query of the selection decodes; of the prompt's
    queries it is negative.
    """
    heads = selected.flatten(1, 2)  # of evicting methods KV heads
    heads = heads.repeat_interleave(left.shape[1] // heads.shape[1], 1)
    tokens = heads.repeat_interleave(method.block_size, -1)[..., : left.shape[-1]]
    if method.phase == "once":
        left[rows, :, :, : tokens.shape[-1]] = tokens
        return
    for row, step, kept in zip(rows, steps, tokens, strict=True):
        decoding = step >= 0
        left[row][:, step[decoding], : kept.shape[-1]] = kept[:, decoding]


def reads_table(cfg: DictConfig, cells: Sequence[Finished]) -> tuple[Table, list[Path]]:
    """A row for each training, method, budget and selector, over all tasks and layers."""
    place = ["model", "training", "method", "budget", "selector"]
    each = pd.DataFrame([x.cell.key | x.metrics for x in cells])
    each[[*COUNTS]] = each[[*COUNTS]].map(sum)
    lost = ["first_lost", "last_lost", "value_lost"]
    functions = dict.fromkeys(COUNTS, "sum") | dict.fromkeys(lost, "mean")
    sums = each.groupby(place, sort=False).agg(functions).reset_index()
    rows = [
        (
            f"{x['model']}/{x['training']}",
            *(x["method"], x["budget"], SELECTORS.get(x["selector"], x["selector"])),
            f"{x['reads']:.0f}",
            *(100 * x[name] / x["reads"] if x["reads"] else None for name in ("on_token", "lost")),
            100 * x["echoes"] / x["lost"] if x["lost"] else None,
            *(100 * x[name] for name in lost),
        )
        for x in sums.to_dict("records")
    ]
    shares = ("On the token", "Lost", "Echo", "First step", "Last step", "Any step")
    columns = ("Model", "Method", "Budget", "Selector", "Reads", *shares)
    first = cells[0].cell.key
    about = {"n": min(x.metrics["n"] for x in cells), "tasks": each["task"].nunique()}
    reach = first["context_length"] // REACH
    return Table.described("reads", columns, rows, reach=reach, first=first, **about), []
