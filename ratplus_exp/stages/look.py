"""stage=look: what each layer and head keeps of one prompt (task, seed, index), under several
methods and on both backbones, as a page and a picture.

The answers shown are those of the methods. A method's selection is recorded at the tokens of the
gold answer, which is the input as for H1 (`stages.hit_rate`).
"""

from __future__ import annotations

from contextlib import closing
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from ratplus_exp.analysis.frame import LABELS
from ratplus_exp.memory import Gate, Memory, of_each_memory
from ratplus_exp.methods import Engine, Layers
from ratplus_exp.models.prefill import PromptBatch
from ratplus_exp.report.look import Look, MemoryView, Step, View
from ratplus_exp.report.prose import METHODS
from ratplus_exp.stages.cells import Job, selector_of
from ratplus_exp.stages.common import job_folder
from ratplus_exp.stages.evaluate import generate
from ratplus_exp.stages.hit_rate import feed
from ratplus_exp.stages.runner import Session
from ratplus_exp.stages.samples import Samples
from ratplus_exp.stages.sweep import configuration, job_of, refuse_unused
from ratplus_exp.tasks import Sample, exact
from ratplus_exp.tasks.sample import golden_answer, target
from ratplus_exp.tracking import tracked


def run(cfg: DictConfig) -> None:
    """Write look.html and look.png."""
    page, picture = look_at(cfg).write(job_folder())
    print(f"Page: {page}\nPicture: {picture}")
    with tracked(cfg, job_folder()) as tracker:
        tracker.log({"look": picture})


@torch.inference_mode()
def look_at(cfg: DictConfig) -> Look:
    """The prompt under every method on every model."""
    cfg = cfg.copy()
    cfg.data.examples, cfg.data.tasks = cfg.stage.index + 1, [cfg.stage.task]
    cfg.data.first_token = "decode"  # so that the first answer token has a selection, too
    one = {"training": cfg.model.training}
    entries = [one | {"model": name} for name in cfg.stage.models] or [one]
    methods = [{"method": name} for name in cfg.stage.methods]
    refuse_unused(cfg, methods)
    every = [[job_of(configuration(cfg, x | y)) for y in methods] for x in entries]
    backbones = [jobs[0].cfg.model.backbone for jobs in every]
    with closing(Session()) as session:
        source = session.source(every[0][0])
        sample = source(cfg.stage.task, cfg.stage.index)
        text = sample.prompt + target(sample)
        offsets = source.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = [0, *(end for _, end in offsets.offset_mapping)]
        look = Look(
            id=sample.id,
            budget=str(cfg.budget),
            tokens=[text[a:b] for a, b in pairwise(ends)],
            prompt=sample.length,
            question=sample.length - source.question_tokens(sample),
            values=[span for spans in sample.gold_spans.values() for span in spans],
            answers=sample.answers,
        )
        for jobs in every:
            backbone, name = jobs[0].cfg.model.backbone, jobs[0].cfg.model.name
            label = LABELS[backbone] if backbones.count(backbone) == 1 else name
            model = session.model(jobs[0])
            look.views.extend(_view(job, model, sample, source, look, label) for job in jobs)
            if layers := of_each_memory(model, _memory, *source.padded([sample])):
                both = (np.stack(x) for x in zip(*layers, strict=True))
                look.memories.append(MemoryView(label, *both))
    return look


def _view(job: Job, model: Any, sample: Sample, source: Samples, look: Look, label: str) -> View:
    """One method on one model: its own answer, and what it keeps along the right one."""
    method, name = job.method, job.cfg.method.name
    ((fed, _),) = source.by_suffix_length([sample], job.first_token)
    prompts = PromptBatch(model, *source.padded([sample]), fed)
    (text,), usage, last = generate(job, [sample], prompts, source.tokenizer)
    kept: dict[tuple[int, int], np.ndarray] = {}

    def record(layer: int, rows: Tensor, positions: Tensor, selected: Tensor) -> None:
        for number, position in enumerate(positions[0].tolist()):
            kept[position, layer] = selected[0].flatten(0, 1)[:, number].cpu().numpy()

    answer = golden_answer(sample, source.tokenizer)
    engine = Engine(method, selector_of(job.cfg, [sample], prompts.ids.device), record)
    # The token that predicts EOS is not a step.
    feed(prompts, engine, prompts.ids.new_tensor([answer.ids[:-2]]))
    steps = [(look.prompt + token - 1, places) for token, places, _ in answer.steps(fed)]
    gold = [places for _, places in steps]
    if method.phase in ("decode", "step"):
        wanted = [(t, [places]) for t, places in steps]
    elif method.phase == "prefill":
        wanted = [(t, gold) for t in range(look.question, look.prompt)]
    else:
        wanted = [(t, gold) for t, layer in kept if layer == 0]
    layers = range(engine.layers)
    return View(
        method=METHODS.get(name, name),
        model=label,
        phase=method.phase,
        size=method.block_size,
        answer=text.strip(),
        right=exact(text, sample.answers, sample.one_of) == 1,
        read=float(usage.fractions(1, last)[0]),
        steps=[
            Step(t, [x for x in places if x], np.stack([kept[t, layer] for layer in layers]))
            for t, places in wanted
            if (t, 0) in kept and not isinstance(method, Layers)
        ],
    )


def _memory(memory: Memory, x: Tensor, real: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """A layer's effective lengths (heads, channels), and its gates (heads, T), means over the
    channels; (heads, 0) without gates."""
    lengths = memory.statistics(x, real)["length"].float().cpu().numpy()
    if not isinstance(memory, Gate):
        return lengths, np.empty((len(lengths), 0))
    return lengths, memory.gate_logits(x)[0].sigmoid().mean(-1).T.float().cpu().numpy()
