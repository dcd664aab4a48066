"""Common functions of all stages: paths, models, device, output."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict
from transformers import PreTrainedModel

from ratplus_exp import provenance
from ratplus_exp.config import expected_sha256, forms_of, method_of, others_of, rope_of
from ratplus_exp.distributed import local_rank, world_size
from ratplus_exp.models.loading import (
    check_length,
    check_model,
    load_config,
    load_model,
    weight_files,
)
from ratplus_exp.report import Table
from ratplus_exp.store import Store
from ratplus_exp.tasks import Ruler


@cache
def composed(override: str) -> DictConfig:
    """The default configuration with one override and unresolved interpolations."""
    paths = [x for x in HydraConfig.get().overrides.hydra if x.startswith("hydra.searchpath")]
    return compose("config", [*paths, override])


def option(group: str, name: str) -> DictConfig:
    """One option of a configuration group, with unresolved interpolations."""
    return composed(f"{group}={name}")[group]


def multiply(grid: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """An entry for every combination of the grid's lists; tasks stay a list."""
    axes = {k: v if isinstance(v, list) and k != "tasks" else [v] for k, v in grid.items()}
    for values in product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def model_option(cfg: DictConfig, name: str, training: int) -> DictConfig:
    """One training of an option of the group model, resolved against this configuration."""
    job = cfg.copy()
    with open_dict(job):
        job.model = option("model", name)
        job.model.training = training
    return job.model


def model_name(cfg: DictConfig) -> str:
    """The model for titles, with its training unless that is the first."""
    return cfg.model.name + (f", training {cfg.model.training}" if cfg.model.training else "")


def checkpoint_of(model: DictConfig) -> str:
    """The digest of a configured model's weights (`check_model`), computed once for all jobs of a
    process unless the files change."""
    path = resolve(model.path)
    stats = [file.stat() for file in weight_files(path) if file.exists()]
    stamp = tuple((stat.st_mtime_ns, stat.st_size) for stat in stats)
    return _digest(path, expected_sha256(model), model.backbone, stamp)


@cache
def _digest(path: Path, sha256: str | None, backbone: str, stamp: Any) -> str:
    return check_model(path, sha256, backbone)


def check_context(cfg: DictConfig) -> None:
    """ValueError if data.length is more than the configured model has positions, or the method is
    not for as many layers."""
    path = resolve(cfg.model.path)
    check_length(path, cfg.data.length, rope_of(cfg), cfg.positions)
    method_of(cfg).check_layers(load_config(path).num_hidden_layers)


def model_of(cfg: DictConfig) -> PreTrainedModel:
    """The configured model, loaded as device, dtype and rope require."""
    return load_model(resolve(cfg.model.path), device_of(cfg), cfg.dtype, rope_of(cfg))


def first_token_of(cfg: DictConfig) -> str:
    """Which tokens of a prompt run under the method after the prefill, as keys and captions name
    it: none ("prefill"), the last one ("decode"), or the question ("split")."""
    return "split" if cfg.data.protocol == "split" else str(cfg.data.first_token)


def resolve(path: str) -> Path:
    """A path of the configuration: absolute, relative to the working directory, or else to the
    repository, where shipped weights are."""
    local = Path(path).expanduser()
    return local if local.exists() or local.is_absolute() else provenance.REPOSITORY / path


def source_of(cfg: DictConfig, tokenizer: Any) -> Ruler:
    """The samples of data.*, its files resolved."""
    others = others_of(cfg)
    squad, hotpotqa = (x and str(resolve(x)) for x in (others.qa.squad, others.qa.hotpotqa))
    others = replace(others, qa=replace(others.qa, squad=squad, hotpotqa=hotpotqa))
    essay = str(resolve(cfg.data.essay)) if cfg.data.essay else None
    return Ruler(tokenizer, cfg.data.length, forms_of(cfg), essay, others)


def model_folder(cfg: DictConfig) -> Path:
    """The folder of the trained model that a stage starts from."""
    if not cfg.stage.init:
        raise ValueError(
            f"stage={cfg.stage.name} starts from a trained model: set stage.init=FOLDER"
        )
    return resolve(cfg.stage.init)


def store_of(cfg: DictConfig) -> Store:
    """The results store; OSError, before any work, if its folder can't be written."""
    root = Path(cfg.results).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    if not os.access(root, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(root))
    return Store(root)


def job_folder() -> Path:
    """Hydra's folder of this job, for logs and tables."""
    return Path(HydraConfig.get().runtime.output_dir)


def show(table: Table, name: str, also: str = "") -> None:
    """Print a table and write it to the job's folder; also: another file written there."""
    table.write(job_folder(), name)
    print(table.to_text())
    print(f"Written to {job_folder()}/{also}{name}.md, .csv and .tex.")


def device_of(cfg: DictConfig) -> torch.device:
    """cfg.device; of several processes on GPUs, each has the one of its local rank. A GPU with a
    number becomes the current device, on which kernels run by default."""
    fastest = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(fastest if cfg.device == "auto" else cfg.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device}: there is no GPU that torch can use; use device=cpu")
    if (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise ValueError(f"device={device}: there is no such GPU; use device=cuda")
    if device.type == "cuda" and world_size() > 1:
        device = torch.device("cuda", local_rank())
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device
