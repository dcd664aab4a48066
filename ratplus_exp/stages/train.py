"""stage=pretrain, continued_pretrain and sft: one training loop on three kinds of data."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from omegaconf import DictConfig
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ratplus_exp import provenance
from ratplus_exp.config import build, command_line_fields, forms_of, plain, texts_of
from ratplus_exp.cost import Shape
from ratplus_exp.distributed import barrier, from_rank_0, process_group, rank, world_size
from ratplus_exp.methods import Dilated
from ratplus_exp.models import low_rank
from ratplus_exp.models.building import MEMORY_SETTINGS, add_memory, config_for, new_model
from ratplus_exp.models.loading import (
    check_model,
    load_config,
    load_model,
    load_tokenizer,
    read_tokenizer,
    weight_files,
    weights_digest,
)
from ratplus_exp.models.saving import cast, refuse_target, save_model
from ratplus_exp.stages.common import (
    device_of,
    model_folder,
    resolve,
    source_of,
)
from ratplus_exp.stages.samples import ruler_files
from ratplus_exp.stages.tokenize import corpus_of
from ratplus_exp.store import locked, write_atomically
from ratplus_exp.tasks import TASKS, pocket_tokenizer, read_jsonl
from ratplus_exp.tasks.qa import QA_FILES
from ratplus_exp.text.answers import Answers
from ratplus_exp.text.facts import Facts
from ratplus_exp.tracking import tracked
from ratplus_exp.training.batches import BatchOf
from ratplus_exp.training.checkpoint import Checkpoints
from ratplus_exp.training.loop import Trainer
from ratplus_exp.training.parallel import whole_state_dict
from ratplus_exp.training.precision import fastest
from ratplus_exp.training.settings import Schedule, TrainSettings

CHANGEABLE = (
    *("lr", "memory_lr", "spike", "log_every", "checkpoint_every", "seconds", "rows_per_pass"),
    *("activation_checkpointing", "compile", "parallel", "peak_tflops"),
)
"""Settings of the optimizer, rates and execution, that may change when a training resumes."""


def pretrain(cfg: DictConfig) -> None:
    """Next-token training on generated text: from scratch, or from `stage.init`."""
    tokenizer = _tokenizer(cfg)
    stage, forms = cfg.stage, forms_of(cfg)
    facts = Facts(
        tokenizer,
        forms,
        other_rate=stage.other_rate,
        several_rate=stage.several_rate,
        drill_steps=stage.drill_tokens // stage.tokens_per_step,
        list_rate=stage.list_rate,
        styles=tuple(replace(forms, **plain(style)) for style in stage.get("styles", [])),
    )
    _train(cfg, tokenizer, partial(facts.batch, cfg.seed))


def continued_pretrain(cfg: DictConfig) -> None:
    """Next-token training of `stage.init` on the corpus that stage=tokenize wrote."""
    init = model_folder(cfg)
    tokenizer = load_tokenizer(init)
    corpus = corpus_of(cfg, init)
    passes = 0.0
    for tokens, length in cfg.stage.schedule:
        corpus.check(length)
        passes += tokens / (corpus.windows(length) * length)
    if passes > 1 and rank() == 0:
        print(f"The corpus has {corpus.tokens:,} tokens: the schedule reads it {passes:.1f} times.")
    _train(cfg, tokenizer, partial(corpus.batch, cfg.seed), corpus.id)


def sft(cfg: DictConfig) -> None:
    """Training on answers alone from `stage.init`: on the training split, or on RULER's files in
    data.path, whose prompts must fit the shortest context of the schedule."""
    tokenizer = load_tokenizer(model_folder(cfg))
    mixture = {task: weight for task, weight in plain(cfg.stage.mixture).items() if weight}
    shortest = min(length for _, length in cfg.stage.schedule)
    read = {
        task: read_jsonl(file, tokenizer, shortest - texts_of(cfg, task).reserve, task)
        for task, file in ruler_files(cfg, mixture).items()
    }
    answers = Answers(source_of(cfg, tokenizer), mixture, read)
    _train(cfg, tokenizer, partial(answers.batch, cfg.seed))


def _train(cfg: DictConfig, tokenizer: Tokenizer, batch: BatchOf, data: str = "") -> None:
    """Train in stage.folder, resuming there, and save the model in Hugging Face's format.

    With stage.low_rank, the trained weights alone are saved first, and the model is made of their
    file: the same one as from a copy of it.
    """
    folder = Path(cfg.stage.folder)
    target, updates = folder / "model", folder / low_rank.FILE
    add_updates = partial(low_rank.add_low_rank, rank=cfg.stage.low_rank, seed=cfg.seed)
    schedule_of(cfg).check(world_size())
    device = device_of(cfg)
    _refuse_long_contexts(cfg)
    _refuse_other_settings(cfg, folder)
    with locked(folder) if rank() == 0 else nullcontext():
        if weight_files(target)[0].exists():
            _refuse_other_rates(cfg, folder)
            print(f"Already trained: {target}. Delete the folder to train again.")
            return
        refuse_target(target)
        with process_group(device):
            model = _model(cfg, tokenizer)
            if cfg.stage.low_rank:
                add_updates(model)
            settings = _start(cfg, model, device)
            if not updates.exists():
                weights = _fit(cfg, model, batch, settings, data)
                if cfg.stage.low_rank and rank() == 0:
                    low_rank.save_trained(model, weights, updates, _origin(cfg))
            if rank() == 0:
                if cfg.stage.low_rank:
                    wrapper = add_updates(_model(cfg, tokenizer))
                    model = low_rank.merge_trained(wrapper, updates)
                    weights = whole_state_dict(model)
                save_model(model, tokenizer, target, cast(weights, cfg.stage.dtype))
                print(f"Saved {target}, sha256 {weights_digest(target)}")
            barrier()


def _start(cfg: DictConfig, model: PreTrainedModel, device: torch.device) -> TrainSettings:
    """Add this start to stage.folder/provenance.json. Returns the settings of the optimizer; for
    precision=auto with the precision of the first start, or the fastest on this device."""
    folder = Path(cfg.stage.folder)

    def chosen() -> Any:
        if past := _past(folder):
            return past[0]["precision"]
        shape = Shape.of(model)
        precision = fastest(device, shape.hidden, shape.ffn)
        print(f"precision=auto: {precision}, which {device} multiplies fastest")
        return precision

    settings = build(TrainSettings, plain(cfg.stage.optimizer), "stage.optimizer")
    if settings.precision == "auto":
        settings = replace(settings, precision=from_rank_0(chosen))
    if rank() == 0:
        entry = provenance.provenance(plain(cfg)) | {"precision": settings.precision}
        entries = [*_past(folder), entry]
        write_atomically(folder / "provenance.json", json.dumps(entries, indent=1) + "\n")
    return settings


def _fit(
    cfg: DictConfig,
    model: PreTrainedModel,
    batch: BatchOf,
    settings: TrainSettings,
    data: str,
) -> dict[str, torch.Tensor]:
    """Run the schedule from the last checkpoint on; the whole weights, on rank 0."""
    stage, folder = cfg.stage, Path(cfg.stage.folder)
    with tracked(cfg, folder) as tracker:
        trainer = Trainer(
            *(model, batch, schedule_of(cfg), settings, folder),
            sparse=joint_of(cfg),
            alternate=stage.alternate,
            prefix=stage.prefix,
            sparse_only_steps=stage.sparse_only_tokens // stage.tokens_per_step,
            log=tracker.log,
            device=device_of(cfg),
            data=data,
            workers=stage.workers,
        )
        trainer.run(f"{stage.name} {cfg.model.name}")
    return whole_state_dict(model)


def schedule_of(cfg: DictConfig) -> Schedule:
    """stage.schedule in steps of stage.tokens_per_step."""
    return Schedule([tuple(part) for part in cfg.stage.schedule], cfg.stage.tokens_per_step)


def joint_of(cfg: DictConfig) -> Dilated | None:
    """The pattern of joint training; None for dense steps alone."""
    return build(Dilated, plain(cfg.stage.joint), "stage.joint") if cfg.stage.joint else None


def _tokenizer(cfg: DictConfig) -> Tokenizer:
    if cfg.stage.init:
        return load_tokenizer(resolve(cfg.stage.init))
    if cfg.model.tokenizer:
        return read_tokenizer(resolve(cfg.model.tokenizer))
    return pocket_tokenizer(forms_of(cfg))


def _model(cfg: DictConfig, tokenizer: Tokenizer) -> PreTrainedModel:
    """New, or from `stage.init`; a RAT+ model from attention weights gets new gates."""
    architecture: dict[str, Any] = plain(cfg.model.architecture)
    memory = cfg.model.backbone == "ratplus"
    if not cfg.stage.init:
        sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": cfg.data.length}
        special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id")}
        try:
            config = config_for(sizes | architecture | special, memory)
            if config.vocab_size < len(tokenizer):
                raise ValueError(
                    f"model.architecture.vocab_size={config.vocab_size} is less than the "
                    f"tokenizer's {len(tokenizer)} entries: leave it out"
                )
            return new_model(config, cfg.seed)
        # Of torch's allocator, and of transformers' classes for settings that don't fit together.
        except (RuntimeError, LookupError, AssertionError, StrictDataclassError) as error:
            text = " ".join(str(error).split())[:120]
            raise ValueError(
                f"model.architecture makes no model here ({text}): change it"
            ) from None
    start, settings = resolve(cfg.stage.init), architecture.keys() & MEMORY_SETTINGS
    has_memory = start.exists() and json.loads((start / "config.json").read_text()).get("memory")
    check_model(start, None, "ratplus" if has_memory else "attention")
    model = load_model(start, torch.device("cpu"))
    for name in command_line_fields("model.architecture"):
        if (memory and name in MEMORY_SETTINGS) or name not in architecture:
            continue
        if (value := getattr(model.config, name, None)) != architecture[name]:
            raise ValueError(
                f"model.architecture.{name}={architecture[name]} has no effect: the model in "
                f"{start} has {value}; leave it out, or train from scratch with stage.init=null"
            )
    if memory and not has_memory:
        return add_memory(model, **{name: architecture[name] for name in settings})
    if has_memory and not memory:
        raise ValueError(f"{start} has the memory: set model to a ratplus backbone")
    for name in sorted(settings) if has_memory else ():
        value = getattr(model.config, name, None)
        value = list(value) if isinstance(value, tuple) else value
        if architecture[name] != value:
            raise ValueError(
                f"the memory in {start} was made with {name}={value}, not {architecture[name]}: set"
                f" model.architecture.{name}={value}, or start from a model without the memory"
            )
    return model


def _past(folder: Path) -> list[dict[str, Any]]:
    """Earlier starts of the training in the folder; none before its first checkpoint, so that the
    settings of a failed start can be corrected."""
    file, results = folder / "provenance.json", (weight_files(folder / "model")[0], low_rank.FILE)
    begun = Checkpoints(folder).kept() or any((folder / result).exists() for result in results)
    return json.loads(file.read_text(encoding="utf-8")) if begun and file.exists() else []


def _refuse_other_settings(cfg: DictConfig, folder: Path) -> None:
    """ValueError if settings other than rates and execution differ from those of the first start.
    The checkpoint identifies the corpus, by its content."""
    past, updates = _past(folder), folder / low_rank.FILE
    other = bool(past) and _fixed(past[0]["config"]) != _fixed(plain(cfg))
    if updates.exists():  # and maybe alone, without its provenance
        other |= not cfg.stage.low_rank or low_rank.origin_of(updates) != _origin(cfg)
    if other:
        raise ValueError(
            f"{folder} holds a training with another configuration: delete it or set stage.folder"
        )


def _refuse_long_contexts(cfg: DictConfig) -> None:
    """ValueError for contexts longer than `positions`, by default those of the model."""
    longest = max(length for _, length in cfg.stage.schedule)
    if cfg.stage.init:
        limit, remedy = load_config(resolve(cfg.stage.init)).max_position_embeddings, "positions=N"
    else:
        own = cfg.model.architecture.get("max_position_embeddings")
        limit = own or cfg.data.length  # of a new model
        remedy = "model.architecture.max_position_embeddings" if own else "data.length"
    if longest > (cfg.positions or limit):
        raise ValueError(
            f"stage.schedule has contexts of {longest} tokens, but the model has {limit} "
            f"positions: shorten them, or set {remedy}"
        )


def _refuse_other_rates(cfg: DictConfig, folder: Path) -> None:
    """ValueError if no start of a finished training had these learning rates."""
    past = [start["config"]["stage"]["optimizer"] for start in _past(folder)]
    for name in ("lr", "memory_lr"):
        rates = [start[name] for start in past if name in start]
        if rates and cfg.stage.optimizer[name] not in rates:
            raise ValueError(
                f"{folder} holds a training with stage.optimizer.{name}={rates[-1]}: set "
                "stage.folder for another one"
            )


def _fixed(config: dict[str, Any]) -> dict[str, Any]:
    """What does not change when a training resumes."""
    free = ("folder", "optimizer", "workers")
    stage = {k: v for k, v in config["stage"].items() if k not in free}
    stage = {"alternate": False, "prefix": None, "low_rank": 0} | stage  # begun before these
    data = {k: config["data"][k] for k in ("length", "forms", "essay")}
    if "mixture" in stage:
        stage["mixture"] = {task: weight for task, weight in stage["mixture"].items() if weight}
        texts = {"qa" if task in QA_FILES else task for task in stage["mixture"]} - TASKS.keys()
        data |= {k: config["data"].get(k) for k in ("path", *texts)}
    stage |= {k: x for k, x in config["stage"]["optimizer"].items() if k not in CHANGEABLE}
    model = {k: config["model"].get(k) for k in ("backbone", "architecture", "tokenizer")}
    return {"model": model, "data": data, "stage": stage, "seed": config["seed"]}


def _origin(cfg: DictConfig) -> str:
    """A digest of what does not change, wherever `stage.init` is, and of its weights."""
    fixed = _fixed(plain(cfg))
    fixed["stage"]["init"] = weights_digest(resolve(cfg.stage.init))
    return sha256(json.dumps(fixed, sort_keys=True, default=str).encode()).hexdigest()
