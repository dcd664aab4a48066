"""The SLURM launcher's settings, against a stand-in where its package is not installed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

CONF = Path(__file__).parents[1] / "conf"


@dataclass
class Slurm:
    """Fields of hydra-submitit-launcher 1.2's SlurmQueueConf that are set here."""

    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    mem_gb: int | None = None
    timeout_min: int = 60
    array_parallelism: int = 256
    partition: str | None = None
    account: str | None = None


@pytest.mark.parametrize("file", sorted((CONF / "hydra/launcher").glob("*.yaml")), ids=str)
def test_launchers_compose_and_can_be_overridden(file):
    ConfigStore.instance().store(group="hydra/launcher", name="submitit_slurm", node=Slurm)
    overrides = [f"hydra/launcher={file.stem}", "hydra.launcher.partition=gpu"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        launcher = compose("config", overrides, return_hydra_config=True).hydra.launcher
    assert launcher.partition == "gpu" and launcher.gpus_per_node == 1
