"""dry_run=true: the estimated cost of the configured job, from a model on the meta device."""

from __future__ import annotations

from dataclasses import asdict
from statistics import mean

import torch
from omegaconf import DictConfig

from ratplus_exp import cost
from ratplus_exp.config import build, forms_of, plain, validate_method
from ratplus_exp.cost import Shape
from ratplus_exp.methods import Method
from ratplus_exp.methods.dilated import PREFIXES, DilatedAfterPrefix
from ratplus_exp.models.building import config_for, memory_config, new_model
from ratplus_exp.models.loading import load_config
from ratplus_exp.report import Table
from ratplus_exp.stages.common import model_folder, resolve
from ratplus_exp.stages.train import joint_of, schedule_of
from ratplus_exp.training.settings import TrainSettings

Rows = list[tuple[str, str]]
BUDGETS = {"1": 1.0, "1/4": 1 / 4, "1/8": 1 / 8, "1/16": 1 / 16, "1/64": 1 / 64}


def run(cfg: DictConfig) -> None:
    """Print the estimate; ValueError for settings that the job refuses."""
    shape = shape_of(cfg)
    model = [
        ("Parameters", f"{shape.parameters / 1e6:,.1f} M"),
        ("of which memory", f"{shape.memory_parameters / 1e6:,.1f} M"),
        ("FLOPs per token of matrix products, forward", f"{2 * shape.multiplied:.3g}"),
    ]
    groups = [model]
    if "joint" in cfg.stage:
        groups += training(cfg, shape)
    elif cfg.stage.name not in ("convert", "report", "tokenize"):
        groups += evaluation(cfg, shape)
    groups.append(_cache(cfg, shape))
    breaks = frozenset(sum(map(len, groups[:i])) for i in range(1, len(groups)))
    gpus = cfg.cluster
    caption = (
        f"{gpus.gpus} GPUs of {gpus.memory_gb:g} GB, {gpus.bandwidth_tb:g} TB/s and "
        f"{gpus.peak_tflops:g} TFLOP/s, of which {gpus.mfu:.0%} are reached (cluster.*). "
        "1 GB is 10⁹ bytes. docs/cluster.md shows the arithmetic."
    )
    part = "one setting of " if cfg.stage.name == "look" or "cells" in cfg.stage else ""
    title = f"{part}stage={cfg.stage.name} model={cfg.model.name}: estimated cost"
    rows = tuple(row for group in groups for row in group)
    print(Table(title, caption, ("Quantity", "Estimate"), rows, breaks).to_text())


def shape_of(cfg: DictConfig) -> Shape:
    """The shape of cfg.model: of its folder if that exists, else of the configured architecture, or
    without one (model=hf_ratplus), of the model it starts from with the memory added."""
    memory, architecture = cfg.model.backbone == "ratplus", plain(cfg.model.architecture)
    folder = resolve(cfg.model.path)
    if (folder / "config.json").is_file():
        config = load_config(folder)
    elif "hidden_size" in architecture:
        config = config_for(architecture, memory)
    elif "init" not in cfg.stage:
        raise ValueError(f"there is no model in {folder}: set model.path")
    else:
        start = load_config(model_folder(cfg))
        config = memory_config(start, **architecture) if memory else start
    with torch.device("meta"):
        return Shape.of(new_model(config, seed=0))


def training_flops(cfg: DictConfig, shape: Shape) -> float:
    """FLOPs of a stage's whole schedule, with the dilated steps of joint training."""
    joint = joint_of(cfg)
    sparse_only = cfg.stage.sparse_only_tokens if joint else 0
    alternate = joint and cfg.stage.alternate
    flops = 0.0
    for tokens, length in cfg.stage.schedule:
        alone = min(tokens, sparse_only)
        sparse_only -= alone
        dense = (tokens - alone) / (2 if alternate else 1)
        flops += dense * shape.training_flops(cost.attended_keys(None, length))
        if joint:
            dilated = alone + dense
            eighths = {None: [0], "random": range(PREFIXES), "prompt": [PREFIXES]}[cfg.stage.prefix]
            patterns = [
                DilatedAfterPrefix(**asdict(joint), prefix=length * x // PREFIXES) for x in eighths
            ]
            keys = mean(cost.attended_keys(pattern, length) for pattern in patterns)
            flops += dilated * shape.training_flops(keys)
    return flops


def training(cfg: DictConfig, shape: Shape) -> list[Rows]:
    """Rows of a training stage: work, memory of a GPU, disk."""
    schedule = schedule_of(cfg)
    settings = build(TrainSettings, plain(cfg.stage.optimizer), "stage.optimizer")
    gpus = cfg.cluster
    schedule.check(gpus.gpus)
    tokens, length = sum(t for t, _ in schedule.stages), max(n for _, n in schedule.stages)
    share = schedule.rows(length) // gpus.gpus
    rows = min(share, settings.rows_per_pass or share)
    flops = training_flops(cfg, shape)
    memory = cost.training_memory(
        shape,
        shards=gpus.gpus if settings.parallel == "fsdp" else 1,
        rows=rows,
        length=length,
        passes=-(-share // rows),
        checkpointing=settings.activation_checkpointing,
        bf16=settings.precision != "fp32",
    )
    hours = cost.hours(flops, gpus.gpus, gpus.peak_tflops, gpus.mfu)
    passes = "1: dense"
    if cfg.stage.joint:
        passes = (
            "1: dilated and dense alternately" if cfg.stage.alternate else "2: dilated and dense"
        )
        if cfg.stage.sparse_only_tokens >= tokens:
            passes = "1: dilated"
    work = [
        ("Tokens", f"{tokens:.3g} in {schedule.steps} steps of {schedule.tokens_per_step}"),
        ("Steps per batch", passes),
        ("FLOPs", f"{flops:.3g}"),
        ("Hours", f"{hours:.3g}"),
        ("Tokens/s", f"{tokens / hours / 3600:.3g}"),
    ]
    corpus = tokens * (2 if shape.vocabulary <= 1 << 16 else 4) if cfg.corpus else 0
    disk: dict[str, float] = {
        # A checkpoint has fp32 weights and Adam's two moments.
        "checkpoints (two, and one being written)": 3 * 12 * shape.parameters,
        "the model (fp32)": 4 * shape.parameters,
        "the corpus": corpus,
    }
    return [work, _memory(memory, cfg), _gigabytes("Disk", disk)]


def evaluation(cfg: DictConfig, shape: Shape) -> list[Rows]:
    """Rows of a stage that runs prompts: work and memory of a GPU."""
    method, gpus, length = validate_method(cfg), cfg.cluster, cfg.data.length
    one, answers = cfg.stage.name == "look", cfg.stage.name != "loss"  # a single prompt; documents
    new = forms_of(cfg).reserve if answers else 0
    batch = 1 if one else cfg.data.batch_size
    examples = 1 if one else cfg.data.examples * (len(cfg.data.tasks) if answers else 1)
    prefill = examples * length * shape.forward_flops((length + 1) / 2)
    parts = [_read(method.for_layer(i), length, shape.head_dim, i) for i in range(shape.layers)]
    read = shape.kv_bytes(length) * sum(parts) / shape.layers
    sizes = {"examples": examples, "batch": batch, "new_tokens": new}
    decode = cost.decode_hours(shape, **sizes, read=read, bandwidth=gpus.bandwidth_tb)
    first = cost.hours(prefill, gpus.gpus, gpus.peak_tflops, gpus.mfu)
    answered = f", up to {new} of them answered" if answers else ""
    work = [
        ("Examples", f"{examples} of {length} tokens{answered}"),
        ("FLOPs of the prompts", f"{prefill:.3g}"),
        ("Hours for the prompts", f"{first:.3g}"),
    ]
    if answers:
        work.append(("Hours for the answers", f"{decode / gpus.gpus:.3g} at most"))
    memory = {
        "weights (bf16)": 2.0 * shape.parameters,
        f"keys and values of {batch} sequences": float(batch * shape.kv_bytes(length)),
        "activations of the prompts": 2.0 * batch * length * (6 * shape.hidden + 2 * shape.ffn),
    }
    return [work, _memory(memory, cfg)]


def _read(method: Method, length: int, dim: int, layer: int) -> float:
    """The fraction of a context's keys and values that a decoding step reads in a layer."""
    if "decode" not in method.sparse_in:
        return 1.0
    choosing = method.choosing(torch.tensor(length - 1), dim, layer)
    return float(method.fraction(length) + (0 if choosing is None else choosing.item() / length))


def _memory(parts: dict[str, float], cfg: DictConfig) -> Rows:
    total = sum(parts.values())
    fits = (
        "fits"
        if total < 0.9e9 * cfg.cluster.memory_gb
        else "too much: use more GPUs, or less per pass"
    )
    return [
        *_gigabytes("GPU memory", parts),
        ("GPU memory in all", f"{total / 1e9:.2f} GB of {cfg.cluster.memory_gb:g} ({fits})"),
    ]


def _cache(cfg: DictConfig, shape: Shape) -> Rows:
    """The KV cache of a sequence of data.length: what token methods keep and block methods read."""
    length, size = cfg.data.length, cfg.data.block_size
    whole = shape.kv_bytes(length)
    state = 4 * shape.memory_state  # fp32
    rows = [("Memory state of a sequence", f"{state / 1e6:.3g} MB")]
    for name, fraction in BUDGETS.items():
        kept, read = whole * fraction, whole * min(1, fraction + 1 / size)
        text = f"{kept / 1e6:.4g} MB kept by tokens"
        if fraction < 1:
            text += f"; {read / 1e6:.4g} MB read a step by blocks of {size}"
        rows.append((f"KV cache of {length} tokens at {name}", text))
    return rows


def _gigabytes(what: str, parts: dict[str, float]) -> Rows:
    return [(f"{what}: {name}", f"{size / 1e9:.2f} GB") for name, size in parts.items() if size]
