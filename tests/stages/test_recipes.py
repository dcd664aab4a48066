"""Recipes: two backbones on equal terms; the small tier from nothing to a measured cell."""

import json
from itertools import pairwise

import pytest
from omegaconf import OmegaConf

from ratplus_exp.analysis import tidy
from ratplus_exp.config import validate, validate_method
from ratplus_exp.store import Store

POCKET = ["pocket_{}", "pocket_{}_sft", "pocket_{}_sft2", "pocket_{}_sft3"]


@pytest.mark.parametrize("phase", ["small_{}", "small_{}_sft", *POCKET[2:]])
def test_attention_takes_as_many_optimizer_steps_on_the_same_batches(job, phase):
    ratplus, attention = (
        job.compose(f"experiment={phase.format(backbone)}") for backbone in ("ratplus", "attention")
    )
    assert ratplus.stage.joint and ratplus.stage.alternate and attention.stage.joint is None
    own = ("folder", "joint", "init")
    rest = [
        {k: v for k, v in OmegaConf.to_container(cfg.stage, resolve=True).items() if k not in own}
        for cfg in (ratplus, attention)
    ]
    assert rest[0] == rest[1]
    assert ratplus.stage.init.replace("ratplus", "attention") == attention.stage.init


@pytest.mark.parametrize("backbone", ["attention", "ratplus"])
def test_each_phase_goes_on_from_the_one_before(job, backbone):
    phases = ["pocket_base", *(phase.format(backbone) for phase in POCKET)]
    numbers = ["seed=3", "model.training=3"]
    stages = [job.compose(f"experiment={phase}", *numbers).stage for phase in phases]
    assert stages[0].init is None
    for before, stage in pairwise(stages):
        assert stage.init == f"{before.folder}/model"


@pytest.mark.parametrize("method", ["quest", "moba", "snapkv"])
def test_the_geometry_is_the_papers(job, method):
    with job.ready("model=small_ratplus", f"method={method}", "budget=1/16") as cfg:
        validate(cfg)
    assert validate_method(cfg).top_k == {"quest": 4, "moba": 4, "snapkv": 256}[method]
    assert (cfg.data.length, cfg.data.block_size, cfg.data.examples) == (4096, 64, 500)


def test_from_nothing_to_a_cell(job):
    """What `make small DRY=1` runs, but for worker processes and the report."""
    for name in ("small_base", "small_ratplus", "small_ratplus_sft"):
        drills = ["stage.drill_tokens=1024"] if name == "small_base" else []
        job(f"experiment=[{name},small_trial_training]", "stage.workers=0", *drills)
    log = (job.folder / "training/small_base/log.jsonl").read_text().splitlines()
    assert [json.loads(row)["length"] for row in log] == [480, 480, 512, 512]
    job("model=small_ratplus", "experiment=small_trial", "method=quest", "budget=1/16")
    cells = tidy(Store(job.folder / "results"))
    assert list(cells["tier"].unique()) == ["small"] and len(cells) == 2
