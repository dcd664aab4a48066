"""The stages of `run.py`: each a function of the composed configuration."""

from multiprocessing import set_forkserver_preload

import torch
from hydra.utils import get_method
from omegaconf import DictConfig

from ratplus_exp.config import command_line_fields, validate_method
from ratplus_exp.distributed import world_size

STAGES = {
    "eval": "evaluate.run",
    "hit_rate": "hit_rate.run",
    "sweep": "sweep.run",
    "random_selector": "sweep.one_table",
    "ablation": "sweep.one_table",
    "loss": "sweep.one_table",
    "methods": "sweep.one_table",
    "reads": "sweep.one_table",
    "look": "look.run",
    "report": "report.run",
    "pretrain": "train.pretrain",
    "continued_pretrain": "train.continued_pretrain",
    "sft": "train.sft",
    "tokenize": "tokenize.run",
    "convert": "convert.run",
}
"""Where the function of each stage is in this package, imported when it runs."""

SHARED = ("pretrain", "continued_pretrain", "sft", "eval", "hit_rate")
"""The stages that several processes can share; the others run in one."""


def run(cfg: DictConfig) -> None:
    """Run the stage of a valid configuration, or estimate its cost with dry_run."""
    if world_size() > 1 and (cfg.dry_run or cfg.stage.name not in SHARED):
        job = "dry_run=true" if cfg.dry_run else f"stage={cfg.stage.name}"
        raise ValueError(
            f"{job} runs in one process: start it with python run.py; torchrun is for stage="
            + ", ".join(SHARED)
        )
    if cfg.stage.name in ("eval", "hit_rate"):  # the others set method and budget of each job
        validate_method(cfg)  # before the seconds of imports
    measures = STAGES[cfg.stage.name].partition(".")[0] in ("evaluate", "hit_rate", "sweep", "look")
    if measures and not cfg.dry_run and (fields := command_line_fields("model.architecture")):
        raise ValueError(
            f"model.architecture.{fields[0]} has no effect, since stage={cfg.stage.name} measures "
            "a trained model: leave it out, or train one with it (docs/pocket-training.md)"
        )
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    function = "dry_run.run" if cfg.dry_run else STAGES[cfg.stage.name]
    function = f"ratplus_exp.stages.{function}"
    set_forkserver_preload([function.rpartition(".")[0]])  # what workers need too
    get_method(function)(cfg)
