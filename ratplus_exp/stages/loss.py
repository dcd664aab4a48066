"""stage=loss: next-token loss on held-out documents under methods, by position in the context."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from ratplus_exp.methods import Engine, Method
from ratplus_exp.models.prefill import PromptBatch
from ratplus_exp.report import Table
from ratplus_exp.report.prose import number
from ratplus_exp.stages.cells import Job, Records, selector_of
from ratplus_exp.store import Cell
from ratplus_exp.tasks import Sample

BINS = 8  # equal parts of the context
KINDS = ("all", "recallable")


class Loss:
    """The measuring stage: of all tokens and of those that can be recalled (`text.facts`)."""

    def check(self, method: Method, name: str) -> None:
        """The method must be dense throughout or sparse in the prompt."""
        if method.dense_prefill and method.sparse_in:
            raise ValueError(
                f"stage=loss is of prompt tokens, which {name} leaves dense: use a pattern "
                "(method=dilated) or a method that selects for prompts (method=moba)"
            )

    @torch.inference_mode()
    def measure(
        self, job: Job, samples: list[Sample], prompts: PromptBatch, tokenizer: Any
    ) -> list[dict[str, Any]]:
        """By kind of token, the sums of loss (nats), right guesses and tokens in each bin."""
        records = []
        for sample, ids in zip(samples, prompts.ids, strict=True):  # of one, logits are large
            engine = Engine(job.method, selector_of(job.cfg, [sample], ids.device))
            cache = prompts.model.new_cache(engine)
            logits = prompts.model(ids[None], past_key_values=cache).logits[0, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").cpu()
            right = (logits.argmax(-1) == ids[1:]).cpu()
            place = torch.arange(len(losses)) * BINS // sample.length
            recallable = torch.zeros(len(ids), dtype=torch.bool)
            for start, end in sample.gold_spans.get("recallable", ()):
                recallable[start:end] = True
            record: dict[str, Any] = {"id": sample.id}
            for kind, mask in zip(KINDS, (recallable >= 0, recallable), strict=True):
                counts = [losses, right, torch.ones_like(losses)]
                record[kind] = [
                    [round(float(x), 4) for x in _by_bin(count, place, mask[1:])]
                    for count in counts
                ]
            record["budget_measured"] = round(float(engine.usage.fractions(1)[0]), 6)
            records.append(record)
        return records

    def metrics(self, records: Records, first: PromptBatch) -> dict[str, Any]:
        """By kind of token: loss, perplexity, accuracy in percent, and the loss in each bin; null
        without such tokens."""
        measured = [record["budget_measured"] for record in records.values()]
        metrics: dict[str, Any] = {"budget_measured": round(sum(measured) / len(measured), 5)}
        for kind in KINDS:
            sums = np.sum([record[kind] for record in records.values()], axis=0)  # (3, BINS)
            loss, right, tokens = sums.sum(1)
            bins = [round(x / n, 4) if n else None for x, n in zip(sums[0], sums[2], strict=True)]
            metrics[kind] = {"tokens": int(tokens), "loss_by_bin": bins} | (
                {
                    "loss": round(loss / tokens, 4),
                    "perplexity": round(math.exp(loss / tokens), 3),
                    "accuracy": round(100 * right / tokens, 2),
                }
                if tokens
                else {"loss": None, "perplexity": None, "accuracy": None}
            )
        return metrics


def _by_bin(counts: torch.Tensor, place: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(BINS, dtype=torch.float64).index_add(0, place[mask], counts[mask].double())


def loss_table(cells: list[Cell]) -> Table:
    """A row for each model and method."""
    rows = []
    for cell in cells:
        key, found = cell.key, cell.metrics()
        every, recalled = (found[kind] for kind in KINDS)
        rows.append(
            (
                key["model"] + (f", training {key['training']}" if key["training"] else ""),
                key["method"],
                _sizes(key),
                number(found["budget_measured"], 3),
                *(number(every[name], 2) for name in ("loss", "perplexity")),
                *(number(recalled[name], 2) for name in ("loss", "perplexity", "accuracy")),
                *(number(x, 2) for x in (recalled if recalled["tokens"] else every)["loss_by_bin"]),
            )
        )
    first, recallable = cells[0].metrics(), any(c.metrics()["recallable"]["tokens"] for c in cells)
    breaks = (i for i in range(1, len(rows)) if rows[i][0] != rows[i - 1][0])
    return Table(
        title=f"Held-out loss at {cells[0].key['context_length']} tokens",
        caption=(
            f"Next-token loss in nats on {first['n']} documents of a held-out seed. Read: the "
            "measured fraction of the context that was attended to. Recall: tokens of values that "
            "stand earlier in the document, with the share in % that is predicted. Last columns: "
            f"loss of {'these tokens' if recallable else 'all tokens'} in each eighth of the "
            "context."
        ),
        columns=(
            *("Model", "Method", "Sizes", "Read", "Loss", "Perplexity"),
            *("Recall loss", "Recall perplexity", "Recalled"),
            *(f"{i + 1}/{BINS}" for i in range(BINS)),
        ),
        rows=tuple(rows),
        breaks=frozenset(breaks),
        text_hides=frozenset({"Recall perplexity"}),
    )


def _sizes(key: dict[str, Any]) -> str:
    """A method's sizes, "D=8 W=16"; a list of its layers' in brackets."""
    settings = key["settings"]
    if "layers" in settings:
        of = ({"method": "", "settings": layer} for layer in settings["layers"])
        names = zip(settings["names"], map(_sizes, of), strict=True)
        return "[" + ", ".join(f"{name} {sizes}".strip() for name, sizes in names) + "]"
    sizes = {"D": "dilation", "W": "local", "I": "initial", "k": "top_k"}
    return " ".join(f"{k}={settings[x]}" for k, x in sizes.items() if settings.get(x))
