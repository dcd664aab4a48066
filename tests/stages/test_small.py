"""The small tier: two backbones on equal terms, and its path from nothing to a measured cell."""

import json

import pytest
from omegaconf import OmegaConf

from ratplus_exp.analysis import tidy
from ratplus_exp.config import validate, validate_method
from ratplus_exp.store import Store


def test_the_attention_twin_has_twice_the_tokens_in_every_phase(job):
    """RAT+ takes two optimizer steps a batch, so both take as many, at the same lengths."""
    ratplus = job.compose("experiment=small_ratplus").stage
    attention = job.compose("experiment=small_attention").stage
    assert ratplus.joint.dilation == 64 and attention.joint is None
    assert attention.drill_tokens == 2 * ratplus.drill_tokens
    assert list(attention.schedule) == [[2 * tokens, n] for tokens, n in ratplus.schedule]
    own = ("folder", "joint", "drill_tokens", "schedule")
    rest = [
        {k: v for k, v in OmegaConf.to_container(stage).items() if k not in own}
        for stage in (ratplus, attention)
    ]
    assert rest[0] == rest[1]


@pytest.mark.parametrize("method", ["quest", "moba", "snapkv"])
def test_the_geometry_is_the_papers(job, method):
    with job.ready("model=small_ratplus", f"method={method}", "budget=1/16") as cfg:
        validate(cfg)
    assert validate_method(cfg).top_k == {"quest": 4, "moba": 4, "snapkv": 256}[method]
    assert (cfg.data.length, cfg.data.block_size, cfg.data.examples) == (4096, 64, 500)


def test_from_nothing_to_a_cell(job):
    """What `make small DRY=1` runs, but for worker processes and the report."""
    drills = "stage.drill_tokens=1024"
    job("experiment=[small_ratplus,small_trial_training]", "stage.workers=0", drills)
    tuned = "experiment=[small_sft,small_trial_training]"
    job(tuned, "model=small_ratplus", "stage.workers=0")
    log = (job.folder / "training/small_ratplus/log.jsonl").read_text().splitlines()
    assert [json.loads(row)["length"] for row in log] == [480, 480, 512, 512]
    job("model=small_ratplus", "experiment=small_trial", "method=quest", "budget=1/16")
    cells = tidy(Store(job.folder / "results"))
    assert list(cells["tier"].unique()) == ["small"] and len(cells) == 2
