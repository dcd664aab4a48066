"""stage=pretrain, continued_pretrain and sft: one training loop, three kinds of data."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ratplus_exp import provenance
from ratplus_exp.config import build, forms_of, plain, reserve_of
from ratplus_exp.cost import Shape
from ratplus_exp.methods import Dilated
from ratplus_exp.models.building import MEMORY_SETTINGS, add_memory, config_for, new_model
from ratplus_exp.models.loading import (
    check_model,
    load_model,
    load_tokenizer,
    read_tokenizer,
    weight_files,
    weights_digest,
)
from ratplus_exp.stages.common import (
    corpus_folder,
    device_of,
    model_folder,
    resolve,
    source_of,
    tokenizer_name,
)
from ratplus_exp.stages.samples import ruler_files
from ratplus_exp.store import locked, write_atomically
from ratplus_exp.tasks import TASKS, pocket_tokenizer, read_jsonl
from ratplus_exp.tasks.answers import Answers
from ratplus_exp.tasks.facts import Facts
from ratplus_exp.tasks.source import QA_FILES
from ratplus_exp.tracking import tracked
from ratplus_exp.training.batches import BatchOf
from ratplus_exp.training.checkpoint import Checkpoints
from ratplus_exp.training.corpus import Corpus
from ratplus_exp.training.loop import Trainer
from ratplus_exp.training.parallel import (
    barrier,
    from_first,
    processes,
    rank,
    whole_state_dict,
    world_size,
)
from ratplus_exp.training.precision import fastest
from ratplus_exp.training.settings import Schedule, TrainSettings

# What a training may be continued with a change of.
RATES = ("lr", "memory_lr", "spike", "log_every", "checkpoint_every")
EXECUTION = ("rows_per_pass", "activation_checkpointing", "compile", "parallel", "peak_tflops")
OWN = ("folder", "optimizer", "workers")  # of a stage: not compared, or apart


def pretrain(cfg: DictConfig) -> None:
    """Next-token training on generated text: from scratch, or from `stage.init`."""
    tokenizer = _tokenizer(cfg)
    stage = cfg.stage
    facts = Facts(
        tokenizer,
        forms_of(cfg),
        other_rate=stage.other_rate,
        several_rate=stage.several_rate,
        drill_steps=stage.drill_tokens // stage.tokens_per_step,
        list_rate=stage.list_rate,
        styles=tuple(forms_of(cfg, style) for style in stage.get("styles", [])),
    )
    _train(cfg, tokenizer, partial(facts.batch, cfg.seed))


def continued_pretrain(cfg: DictConfig) -> None:
    """Next-token training of `stage.init` on the corpus that stage=tokenize wrote."""
    init = model_folder(cfg)
    tokenizer = load_tokenizer(init)
    corpus = Corpus(corpus_folder(cfg, init), tokenizer_name(init))
    passes = 0.0
    for tokens, length in cfg.stage.schedule:
        corpus.check(length)
        passes += tokens / (corpus.windows(length) * length)
    if passes > 1 and rank() == 0:
        print(f"The corpus has {corpus.tokens:,} tokens: the schedule reads it {passes:.1f} times.")
    _train(cfg, tokenizer, partial(corpus.batch, cfg.seed), corpus.id)


def sft(cfg: DictConfig) -> None:
    """Answer-only training from `stage.init`, on the training split, or on RULER's files in
    data.path, whose prompts must fit the shortest context of the schedule."""
    tokenizer = load_tokenizer(model_folder(cfg))
    mixture = {task: weight for task, weight in plain(cfg.stage.mixture).items() if weight}
    shortest = min(length for _, length in cfg.stage.schedule)
    read = {
        task: read_jsonl(file, tokenizer, shortest - reserve_of(cfg, task), task)
        for task, file in ruler_files(cfg, mixture).items()
    }
    answers = Answers(source_of(cfg, tokenizer, cfg.data.length), mixture, read)
    _train(cfg, tokenizer, partial(answers.batch, cfg.seed))


def _train(cfg: DictConfig, tokenizer: Tokenizer, batch: BatchOf, data: str = "") -> None:
    """Train in stage.folder, resuming there, and save the model in Hugging Face format."""
    folder = Path(cfg.stage.folder)
    target = folder / "model"
    schedule = schedule_of(cfg)
    settings = build(TrainSettings, plain(cfg.stage.optimizer), "stage.optimizer")
    sparse = build(Dilated, plain(cfg.stage.joint), "stage.joint") if cfg.stage.joint else None
    schedule.check(world_size())
    device = device_of(cfg)
    dtype = getattr(torch, cfg.stage.dtype) if cfg.stage.dtype else None
    steps = cfg.stage.sparse_only_tokens // cfg.stage.tokens_per_step
    _refuse_other_settings(cfg, folder)
    with locked(folder) if rank() == 0 else nullcontext():
        if weight_files(target)[0].exists():
            print(f"Trained already: {target}. Delete the folder to train again.")
            return
        refuse_target(target)
        with processes(device):
            model = _model(cfg, tokenizer)
            if settings.precision == "auto":
                chosen = from_first(partial(_precision, model, device, folder))
                settings = replace(settings, precision=chosen)
            if rank() == 0:
                _remember(cfg, folder, settings.precision)
            with tracked(cfg, folder) as tracker:
                trainer = Trainer(
                    model,
                    batch,
                    schedule,
                    settings,
                    folder,
                    sparse=sparse,
                    sparse_only_steps=steps,
                    log=tracker.log,
                    device=device,
                    data=data,
                    workers=cfg.stage.get("workers", 0),
                )
                trainer.run(f"{cfg.stage.name} {cfg.model.name}")
            weights = whole_state_dict(model)
            if rank() == 0:
                if dtype is not None:
                    cast = {id(tensor): tensor.to(dtype) for tensor in weights.values()}
                    weights = {name: cast[id(tensor)] for name, tensor in weights.items()}
                save_model(model, tokenizer, target, weights)
                print(f"Saved {target}, sha256 {weights_digest(target)}")
            barrier()


def schedule_of(cfg: DictConfig) -> Schedule:
    """stage.schedule in steps of stage.tokens_per_step."""
    return Schedule([tuple(part) for part in cfg.stage.schedule], cfg.stage.tokens_per_step)


def save_model(
    model: PreTrainedModel,
    tokenizer: Tokenizer | None,
    target: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """All of a model's files, or none. weights: where the model's own are spread over processes."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial, state_dict=weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        os.replace(partial, target)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {target} ({error}): make room, then run it again") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_target(target: Path) -> None:
    """ValueError, before any work, for a folder that `save_model` could not replace."""
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is there already: delete the folder or choose another one")


def _tokenizer(cfg: DictConfig) -> Tokenizer:
    if cfg.stage.init:
        return load_tokenizer(resolve(cfg.stage.init))
    if cfg.model.tokenizer:
        return read_tokenizer(resolve(cfg.model.tokenizer))
    return pocket_tokenizer(forms_of(cfg))


def _model(cfg: DictConfig, tokenizer: Tokenizer) -> PreTrainedModel:
    """Fresh, or from `stage.init`; a RAT+ model from attention weights gets fresh gates."""
    architecture: dict[str, Any] = plain(cfg.model.architecture)
    memory = cfg.model.backbone == "ratplus"
    if not cfg.stage.init:
        sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": cfg.data.length}
        special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id")}
        return new_model(config_for(sizes | architecture | special, memory), cfg.seed)
    start = resolve(cfg.stage.init)
    has_memory = (
        json.loads((start / "config.json").read_text()).get("memory") if start.exists() else None
    )
    check_model(start, None, "ratplus" if has_memory else "attention")
    model = load_model(start, torch.device("cpu"))
    if memory and not has_memory:
        settings = {k: v for k, v in architecture.items() if k in MEMORY_SETTINGS}
        return add_memory(model, cfg.seed, **settings)
    if has_memory and not memory:
        raise ValueError(f"{start} has the memory: set model to a ratplus backbone")
    if has_memory:
        _refuse_another_memory(model.config, architecture, start)
    return model


def _refuse_another_memory(config: Any, architecture: dict[str, Any], start: Path) -> None:
    """A trained memory is what it is: what the configuration says of it must be so."""
    for name in MEMORY_SETTINGS:
        has, asked = getattr(config, name, None), architecture.get(name)
        has = list(has) if isinstance(has, tuple) else has
        if name in architecture and asked != has:
            raise ValueError(
                f"the memory in {start} was made with {name}={has}, not {asked}: set "
                f"model.architecture.{name}={has}, or start from a model without the memory"
            )


def _past(folder: Path) -> list[dict[str, Any]]:
    """The starts of the training in the folder; none before it has a checkpoint, since a first try
    that failed must not stand in the way of the corrected one."""
    file = folder / "provenance.json"
    begun = Checkpoints(folder).latest() or weight_files(folder / "model")[0].exists()
    return json.loads(file.read_text(encoding="utf-8")) if begun and file.exists() else []


def _refuse_other_settings(cfg: DictConfig, folder: Path) -> None:
    """A training goes on only with the settings that it began with; learning rates and how it is
    executed may change. A corpus is known by its content, which the checkpoint names."""

    def fixed(config: dict[str, Any]) -> dict[str, Any]:
        stage = {k: v for k, v in config["stage"].items() if k not in OWN}
        data = {k: config["data"][k] for k in ("length", "forms", "essay")}
        if "mixture" in stage:
            texts = [
                "qa" if t in QA_FILES else t for t, weight in stage["mixture"].items() if weight
            ]
            data |= {k: config["data"].get(k) for k in ("path", *texts) if k not in TASKS}
        free = (*RATES, *EXECUTION)
        stage |= {k: v for k, v in config["stage"]["optimizer"].items() if k not in free}
        model = {k: config["model"][k] for k in ("backbone", "architecture")}
        return {"model": model, "data": data, "stage": stage, "seed": config["seed"]}

    past = _past(folder)
    if past and fixed(past[0]["config"]) != fixed(plain(cfg)):
        raise ValueError(
            f"{folder} holds a training with another configuration: delete it or set stage.folder"
        )


def _precision(model: PreTrainedModel, device: torch.device, folder: Path) -> Any:
    """What the training in the folder began with, or what is fastest here."""
    if past := _past(folder):
        return past[0]["precision"]
    shape = Shape.of(model)
    chosen = fastest(device, shape.hidden, shape.ffn)
    print(f"precision=auto: {chosen}, which {device} multiplies fastest")
    return chosen


def _remember(cfg: DictConfig, folder: Path, precision: str) -> None:
    """Provenance of every start, in stage.folder/provenance.json."""
    folder.mkdir(parents=True, exist_ok=True)
    entry = provenance.provenance(plain(cfg)) | {"precision": precision}
    entries = [*_past(folder), entry]
    write_atomically(folder / "provenance.json", json.dumps(entries, indent=1) + "\n")
