"""What every stage needs: dispatch, folders, device, provenance."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_method
from omegaconf import DictConfig, open_dict

from ratplus_exp import provenance
from ratplus_exp.config import expected_sha256, forms_of, others_of, validate
from ratplus_exp.models.loading import check_model
from ratplus_exp.store import Store
from ratplus_exp.tasks import Ruler
from ratplus_exp.training.parallel import local_rank, world_size

STAGES = {
    "eval": "evaluate.run",
    "hit_rate": "hit_rate.run",
    "sweep": "sweep.run",
    "random_selector": "sweep.random_selector",
    "ablation": "sweep.ablation",
    "methods": "methods.run",
    "look": "look.run",
    "report": "report.run",
    "pretrain": "train.pretrain",
    "continued_pretrain": "train.continued_pretrain",
    "sft": "train.sft",
    "tokenize": "tokenize.run",
    "convert": "convert.run",
}
"""Each stage's function in this package, imported only when it runs."""

SHARED = ("pretrain", "continued_pretrain", "sft", "eval", "hit_rate")
"""The stages that several processes share; the others run in one."""


def run(cfg: DictConfig) -> None:
    """Validate, then hand the configuration to its stage, or to the estimate of what that would
    cost."""
    validate(cfg)
    if cfg.stage.name not in STAGES:
        raise ValueError(f"stage={cfg.stage.name} is unknown: use one of {', '.join(STAGES)}")
    if world_size() > 1 and (cfg.dry_run or cfg.stage.name not in SHARED):
        what = "dry_run=true" if cfg.dry_run else f"stage={cfg.stage.name}"
        raise ValueError(
            f"{what} runs in one process: start it with python run.py; torchrun is for stage="
            + ", ".join(SHARED)
        )
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    function = "dry_run.run" if cfg.dry_run else STAGES[cfg.stage.name]
    get_method(f"ratplus_exp.stages.{function}")(cfg)


@cache
def option(group: str, name: str) -> DictConfig:
    """One option of a configuration group, its interpolations left open."""
    where = [x for x in HydraConfig.get().overrides.hydra if x.startswith("hydra.searchpath")]
    return compose("config", [*where, f"{group}={name}"])[group]


def model_option(cfg: DictConfig, name: str, training: int) -> DictConfig:
    """One training of an option of the group model, in this configuration: its folder may lie in
    `output`."""
    job = cfg.copy()
    with open_dict(job):
        job.model = option("model", name)
        job.model.training = training
    return job.model


def model_name(cfg: DictConfig) -> str:
    """The model for titles, with its training where it isn't the first."""
    return cfg.model.name + (f", training {cfg.model.training}" if cfg.model.training else "")


def checkpoint_of(model: DictConfig) -> str:
    """The digest of a configured model's weights: see `check_model`."""
    return check_model(resolve(model.path), expected_sha256(model), model.backbone)


def first_token_of(cfg: DictConfig) -> str:
    """How answers begin, as cells and captions say: behind the "prefill" of a whole prompt, with
    a "decode" step of its last token, or, "split", with the question, all under the method."""
    return "split" if cfg.stage.protocol == "split" else str(cfg.stage.first_token)


def resolve(path: str) -> Path:
    """A path of the configuration: absolute, or relative to where the command was typed, or else
    to the repository, so that shipped weights are found from anywhere."""
    if (found := Path(path).expanduser()).exists() or found.is_absolute():
        return found
    return provenance.REPOSITORY / path


def source_of(cfg: DictConfig, tokenizer: Any, length: int) -> Ruler:
    """The samples of data.* at a context of `length` tokens."""
    others = others_of(cfg)
    squad, hotpotqa = (x and str(resolve(x)) for x in (others.qa.squad, others.qa.hotpotqa))
    others = replace(others, qa=replace(others.qa, squad=squad, hotpotqa=hotpotqa))
    essay = str(resolve(cfg.data.essay)) if cfg.data.essay else None
    return Ruler(tokenizer, length, forms_of(cfg), essay, others)


def model_folder(cfg: DictConfig) -> Path:
    """The trained model that a stage starts from."""
    if not cfg.stage.init:
        raise ValueError(
            f"stage={cfg.stage.name} starts from a trained model: set stage.init=FOLDER"
        )
    return resolve(cfg.stage.init)


def tokenizer_name(folder: Path) -> str:
    """What tells a model's tokenizer from others."""
    return provenance.sha256(folder / "tokenizer.json")


def corpus_folder(cfg: DictConfig, init: Path) -> Path:
    """Where the tokens of the corpus lie: below corpus.folder, one folder a tokenizer, so that
    models with the same tokenizer share them."""
    return Path(cfg.corpus.folder) / tokenizer_name(init)[:12]


def store_of(cfg: DictConfig) -> Store:
    """The results store; OSError, before any work, where its folder can't be written."""
    root = Path(cfg.results)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"cannot write results to {root} ({error.strerror}): set output=DIR"
        ) from None
    if not os.access(root, os.W_OK):
        raise OSError(f"cannot write results to {root}: set output=DIR to a folder you can write")
    return Store(root)


def job_folder() -> Path:
    """Hydra's folder of this job, for logs and tables."""
    return Path(HydraConfig.get().runtime.output_dir)


def device_of(cfg: DictConfig) -> torch.device:
    """cfg.device; among several processes on GPUs, each one's own. A GPU with a number becomes the
    current one, which is where kernels run that are told of none."""
    if cfg.device == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        device = _named_device(cfg.device)
    if device.type == "cuda" and world_size() > 1:
        device = torch.device("cuda", local_rank())
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def _named_device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name}: there is no GPU that torch can use; use device=cpu")
    if (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise ValueError(f"device={name}: there is no such GPU; use device=cuda")
    return device
