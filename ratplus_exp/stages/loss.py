"""stage=loss: next-token loss on held-out documents under methods, by position in the context."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from torch.nn.functional import cross_entropy

from ratplus_exp.analysis.frame import LABELS
from ratplus_exp.config import forms_of
from ratplus_exp.methods import Engine, Method
from ratplus_exp.models.loading import load_tokenizer
from ratplus_exp.models.prefill import PromptBatch
from ratplus_exp.report import Table
from ratplus_exp.report.figures import losses
from ratplus_exp.report.prose import number
from ratplus_exp.stages.cells import Job, MeasuringStage, Records, selector_of
from ratplus_exp.stages.common import job_folder, resolve
from ratplus_exp.stages.samples import Samples
from ratplus_exp.stages.tokenize import corpus_of
from ratplus_exp.store import Finished
from ratplus_exp.tasks import Sample
from ratplus_exp.tasks.niah import sample_name
from ratplus_exp.text.corpus import Corpus
from ratplus_exp.text.facts import Facts, begins_with_space
from ratplus_exp.training.settings import IGNORE, Batch

BINS = 8  # equal parts of the context
KINDS = ("all", "recallable")  # tokens; of a corpus none counts as recallable


class Documents(Samples):
    """Held-out documents of a context's length: generated, or of the configured corpus."""

    @staticmethod
    def keys(cfg: DictConfig) -> dict[str, dict[str, Any]]:
        corpus = _corpus(cfg)
        if corpus:
            data: dict[str, Any] = {"corpus": corpus.id}
        else:
            data = {"forms": asdict(forms_of(cfg))}
            if begins_with_space(load_tokenizer(resolve(cfg.model.path))):
                data["text"] = 2  # 1: with spaces between its pieces
        return {"documents": {"seed": cfg.seed, "data": data}}

    def __call__(self, task: str, index: int) -> Sample:
        """A document, and with generated text the places of what can be recalled."""
        (ids,), (labels,) = self._batch(index)
        places = (np.flatnonzero(labels[:-1] != IGNORE) + 1).tolist()
        spans = {"recallable": tuple((i, i + 1) for i in places)}
        return Sample(self.id(task, index), task, "", tuple(ids.tolist()), (), spans)

    @cached_property
    def _batch(self) -> Callable[[int], Batch]:
        """Ids and next-token labels (1, length) of a document, as `Facts.batch`."""
        length, examples = self.cfg.data.length, self.cfg.data.examples
        if (corpus := _corpus(self.cfg)) is None:
            facts = Facts(self.tokenizer, forms_of(self.cfg), other_rate=0.0)
            return lambda index: facts.batch(f"held-out/{self.seed}", index, 1, length)
        corpus.check(length)
        if (windows := corpus.windows(length)) < examples:
            raise ValueError(f"the corpus has {windows} contexts: set data.examples={windows}")
        nothing = np.full((1, length), IGNORE)
        return lambda index: (corpus.batch(self.seed, index, 1, length)[0], nothing)

    def id(self, task: str, index: int) -> str:
        return sample_name(task, self.seed, index)

    def prefetch(self, task: str, indices: list[int]) -> None:
        """Documents take less time than their evaluation."""


def _corpus(cfg: DictConfig) -> Corpus | None:
    """The corpus in the model's tokens, if one is configured."""
    return corpus_of(cfg, resolve(cfg.model.path)) if cfg.corpus else None


class Loss(MeasuringStage):
    """The measuring stage: of all tokens, and of those that can be recalled (`text.facts`)."""

    samples = Documents

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
        """For each kind of token: sums of loss (nats), right guesses and tokens, of each bin."""
        records = []
        for sample, ids in zip(samples, prompts.ids, strict=True):  # singly: logits are large
            engine = Engine(job.method, selector_of(job.cfg, [sample], ids.device))
            cache = prompts.model.new_cache(engine)
            logits = prompts.model(ids[None], past_key_values=cache).logits[0, :-1].float()
            losses = cross_entropy(logits, ids[1:], reduction="none")
            counts = torch.stack((losses, logits.argmax(-1) == ids[1:], losses == losses)).cpu()
            recallable = np.zeros(len(ids), bool)
            recallable[[at for span in sample.gold_spans["recallable"] for at in range(*span)]] = 1
            place = np.arange(len(losses)) * BINS // len(ids)
            masks = zip(KINDS, (np.ones_like(recallable), recallable), strict=True)
            sums = {
                kind: [
                    np.bincount(place, row * mask[1:], BINS).round(4).tolist()
                    for row in counts.double().numpy()
                ]
                for kind, mask in masks
            }
            read = round(float(engine.usage.fractions(1)[0]), 6)
            records.append({"id": sample.id, **sums, "budget_measured": read})
        return records

    def metrics(self, records: Records, first: PromptBatch) -> dict[str, Any]:
        """For each kind of token: mean loss, perplexity, accuracy in percent, the loss by bin."""
        measured = np.mean([record["budget_measured"] for record in records.values()])
        metrics: dict[str, Any] = {"budget_measured": round(float(measured), 5)}
        for kind in KINDS:
            sums = np.sum([record[kind] for record in records.values()], axis=0)  # (3, BINS)
            loss, right, tokens = map(float, sums.sum(1))
            mean = loss / tokens if tokens else math.nan
            metrics |= {
                f"{kind}_loss": mean,
                f"{kind}_perplexity": math.exp(mean),
                f"{kind}_accuracy": 100 * right / tokens if tokens else math.nan,
                f"{kind}_by_bin": [x / n if n else None for x, _, n in sums.T.tolist()],
            }
        return metrics


def loss_outputs(cfg: DictConfig, cells: Sequence[Finished]) -> tuple[Table, list[Path]]:
    """A table with a row for each cell, and `figures.losses` of dense attention and dilated
    patterns. By position, losses are of recallable tokens if there are any."""
    results = [x.cell.key | x.metrics for x in cells]
    kind = KINDS[any(x["recallable_loss"] is not None for x in results)]
    first = results[0]
    about = {"kind": kind, "length": first["context_length"]}
    chosen = {"topk": "", "random": "random"}
    rows = [
        (
            f"{x['model']}/{x['training']}",
            " ".join(filter(None, (x["method"], _sizes(x["settings"]), chosen[x["selector"]]))),
            number(x["budget_measured"], 3),
            *(number(x[f"all_{name}"], 2) for name in ("loss", "perplexity")),
            *(number(x[f"recallable_{name}"], 2) for name in ("loss", "accuracy")),
            *(number(loss, 2) for loss in x[f"{kind}_by_bin"]),
        )
        for x in results
    ]
    columns = (
        *("Model", "Method", "Read", "Loss", "Perplexity", "Recall loss", "Recalled"),
        *(f"{i + 1}/{BINS}" for i in range(BINS)),
    )
    table = Table.described("loss", columns, rows, n=first["n"], **about)
    dense = {"dilation": 1, "local": 0, "initial": 0}
    patterns = [
        dense
        | x["settings"]
        | {"model": x["model"], "training": x["training"], "backbone": LABELS[x["backbone"]]}
        | {"parts": x[f"{kind}_by_bin"], "loss": x[f"{kind}_loss"]}
        for x in results
        if not x["top_k"] and x["settings"].keys() <= {*dense, "top_k", "block_size"}
    ]
    if not patterns:
        return table, []
    return table, losses(pd.DataFrame(patterns), job_folder(), tier=first["tier"], **about)


def _sizes(settings: dict[str, Any]) -> str:
    """A method's sizes, or in brackets those of each layer's."""
    if layers := settings.get("layers"):
        each = zip(settings["names"], map(_sizes, layers), strict=True)
        return "[" + ", ".join(" ".join(x).strip() for x in each) + "]"
    return " ".join(f"{name}={x}" for name, x in settings.items() if x and name != "block_size")
