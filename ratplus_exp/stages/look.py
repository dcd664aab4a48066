"""stage=look: what each layer and head keeps of one prompt (task, seed, index), under several
methods and on both backbones, as a page and a picture.

Answers are each method's own. What is kept is shown along the right answer, which is fed token by
token as for H1 (`stages.hit_rate`).
"""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from ratplus_exp.memory import Gate, Memory, of_each_memory
from ratplus_exp.methods import Engine
from ratplus_exp.models.prefill import PromptBatch
from ratplus_exp.report.look import Look, Memories, Step, View
from ratplus_exp.stages.cells import Job, selector_of
from ratplus_exp.stages.common import job_folder
from ratplus_exp.stages.evaluate import generate
from ratplus_exp.stages.runner import Session
from ratplus_exp.stages.sweep import configuration, job_of
from ratplus_exp.tasks import Sample, exact
from ratplus_exp.tasks.golden import golden_answer
from ratplus_exp.tasks.sample import question_tokens, target
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
    cfg.data.examples = cfg.stage.index + 1
    one = {"training": cfg.model.training, "tasks": [cfg.stage.task]}
    models = [one | {"model": name} for name in cfg.stage.models] or [one]
    views, memories = [], []
    with closing(Session()) as session:
        for entry in models:
            jobs = [job_of(configuration(cfg, entry | {"method": m})) for m in cfg.stage.methods]
            source, model = session.source(jobs[0]), session.model(jobs[0])
            sample = source(cfg.stage.task, cfg.stage.index)
            asked = question_tokens(sample, source.questions[sample.task], source.tokenizer)
            views += [_view(job, session, sample, asked) for job in jobs]
            layers = of_each_memory(model, _memory, *source.padded([sample]))
            if layers:
                lengths, gates = (np.stack(x) for x in zip(*layers, strict=True))
                memories.append(Memories(jobs[0].cfg.model.name, lengths, gates))
    tokens = _pieces(sample, source.tokenizer)
    spans = [span for found in sample.gold_spans.values() for span in found]
    return Look(
        id=sample.id,
        budget=str(cfg.budget),
        tokens=tokens,
        prompt=sample.length,
        question=sample.length - asked,
        needles=[_sentence(tokens, *span) for span in spans],
        gold=sorted({token for span in spans for token in range(*span)}),
        answers=sample.answers,
        views=views,
        memories=memories,
    )


def _view(job: Job, session: Session, sample: Sample, asked: int) -> View:
    """One method on one model: its own answer, and what it keeps along the right one."""
    source, model, method = session.source(job), session.model(job), job.method
    ((fed, _),) = source.by_fed([sample], job.first_token)
    prompts = PromptBatch(model, *source.padded([sample]), fed)
    (text,), usage, last = generate(job, [sample], prompts, source.tokenizer)
    kept: dict[tuple[int, int], np.ndarray] = {}

    def record(layer: int, rows: Tensor, positions: Tensor, selected: Tensor) -> None:
        for number, position in enumerate(positions[0].tolist()):
            kept[position, layer] = selected[0].flatten(0, 1)[:, number].cpu().numpy()

    answer = golden_answer(sample, source.tokenizer)
    engine = Engine(method, selector_of(job.cfg, [sample], prompts.ids.device), record)
    cache = model.new_cache(engine)
    prompts.prefill(cache)
    right = prompts.ids.new_tensor([answer.ids[:-2]])  # what predicts EOS is no step
    steps = torch.cat((prompts.ids[:, sample.length - fed :], right), dim=1)
    if steps.shape[1]:
        model(steps, past_key_values=cache, logits_to_keep=1)
    first = 0 if fed else 1  # the answer's first token with a step
    gold = [sorted(places) for places in answer.positions[first:-1]]
    tokens = _pieces(sample, source.tokenizer)
    if method.phase in ("decode", "step"):  # the query behind token t − 1 predicts token t
        answered = range(sample.length + first, len(tokens))
        wanted = [(tokens[t], t - 1, [x]) for t, x in zip(answered, gold, strict=True)]
    elif method.phase == "prefill":
        wanted = [(tokens[t], t, gold) for t in range(sample.length - asked, sample.length)]
    else:
        wanted = [("the answer", max((p for p, _ in kept), default=0), gold)]
    layers = range(engine.layers)
    return View(
        method=job.cfg.method.name,
        phase=method.phase,
        model=job.cfg.model.name,
        backbone=job.cfg.model.backbone,
        size=method.block_size if method.unit == "block" else 1,
        answer=text.strip(),
        right=exact(text, sample.answers, sample.one_of) == 1,
        read=float(usage.fractions(1, last)[0]),
        steps=[
            Step(label, query, [x for x in gold if x], np.stack([kept[query, i] for i in layers]))
            for label, query, gold in wanted
            if (query, 0) in kept
        ],
    )


def _memory(memory: Memory, x: Tensor, real: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """A layer's effective lengths (heads, channels), and its gates (heads, T), means over the
    channels; (heads, 0) without gates."""
    lengths = memory.statistics(x, real)["length"].float().cpu().numpy()
    if not isinstance(memory, Gate):
        return lengths, np.empty((len(lengths), 0))
    return lengths, memory.gate_logits(x)[0].sigmoid().mean(-1).T.float().cpu().numpy()


def _pieces(sample: Sample, tokenizer: Any) -> list[str]:
    """Prompt and right answer, cut into their tokens; each has the space before it."""
    text = sample.prompt + target(sample)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = [0, *(end for _, end in encoded.offset_mapping)]
    return [text[a:b] for a, b in zip(ends, ends[1:], strict=False)]


def _sentence(tokens: list[str], start: int, end: int) -> tuple[int, int]:
    """The needle of a value at [start, end): the sentence around it."""
    while start and not tokens[start - 1].rstrip().endswith("."):
        start -= 1
    while end < len(tokens) and not tokens[end - 1].rstrip().endswith("."):
        end += 1
    return start, end
