"""dry_run=true: every configuration there is composes and is estimated, the largest included.

All of it together takes some 15 seconds on one core, and is to stay under a minute.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CONF = Path(__file__).parents[2] / "conf"


def options(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def estimate(job, capsys, *overrides):
    job(*overrides, "dry_run=true")
    text = capsys.readouterr().out
    assert not any(job.folder.iterdir()), "a dry run writes nothing"
    return text


JOBS = [
    *(f"model={name}" for name in options("model")),
    # Sweeps and trials say what they run together with an experiment alone.
    *(f"stage={name}" for name in options("stage") if name not in ("ablation", "sweep")),
    *(f"experiment={name}" for name in options("experiment") if name != "small_trial_training"),
    *(f"method={name}" for name in options("method")),
    *(f"data={name}" for name in options("data")),
    *(f"tracking={name}" for name in options("tracking")),
    *(f"experiment=table3 pair={name}" for name in options("pair")),
    *(f"experiment=[{name},small_trial_training]" for name in ("small_ratplus", "small_attention")),
    *(f"stage=tokenize corpus={name}" for name in options("corpus")),
    *(f"budget=1/{part}" for part in (1, 4, 16, 64)),
]


@pytest.mark.parametrize("line", JOBS)
def test_every_configuration_is_estimated(job, capsys, line):
    extra = []
    if line == "budget=1/64":
        extra = ["method=snapkv"]  # Quest's two forced blocks are more than 1/64
    if "corpus=local" in line:
        extra = ["corpus.path=texts"]
    if line.startswith("model=hf"):
        extra = ["model.path=outputs/reference/pocket/models/attention/0"]
    text = estimate(job, capsys, *line.split(), *extra)
    assert "Parameters" in text and "KV cache" in text and "too much" not in text


DOCS = CONF.parent / "docs"
GPUS_A_NODE = 4  # of docs/cluster.md's train.sh


def documented():
    """The commands of the paper's tier in the pages, each with the number of its GPUs; of a sweep,
    the largest setting."""
    pages = [DOCS / "cluster.md", DOCS / "models.md"]
    text = "\n".join(page.read_text() for page in pages)
    found = set()
    for line in re.findall(r"^ {4}((?:python run\.py|torchrun|sbatch) .*)$", text, re.MULTILINE):
        processes, nodes = (
            re.search(rf"--{name}=(\d+)", line) for name in ("nproc-per-node", "nodes")
        )
        gpus = int(processes[1]) if processes else GPUS_A_NODE * int(nodes[1]) if nodes else 1
        rest = line.partition("train.sh" if nodes else "run.py")[2].split()
        words = [w.split(",")[0] for w in rest if w not in ("-m", "dry_run=true", "…")]
        words = [w for w in words if not w.startswith(("hydra", "cluster.gpus"))]
        stages = ("stage=tokenize", "stage=convert", "stage=report")  # work without a GPU
        if not any(w in stages or w.startswith("model=hf") for w in words):
            at = re.search(r"cluster\.gpus=(\d+)", line)
            found.add((" ".join(words), int(at[1]) if at else gpus))
    return sorted(found)


@pytest.mark.parametrize(("line", "gpus"), documented())
def test_what_the_pages_say_fits_on_their_gpus(job, capsys, line, gpus):
    assert "(fits)" in estimate(job, capsys, *line.split(), f"cluster.gpus={gpus}")


def number(text, what):
    [found] = re.findall(rf"^{re.escape(what)}  +([\d.,]+)", text, re.MULTILINE)
    return float(found.replace(",", ""))


P2_7B = [
    "model=ratplus_7b",
    "model.path=nowhere",
    "stage=continued_pretrain",
]


def test_the_papers_training_of_a_7b_model(job, capsys):
    """P1: 10B tokens on 64 GH200 in ≈10 h; P2's 7B has 7.6B parameters."""
    text = estimate(job, capsys, *P2_7B, "cluster.gpus=64", "cluster.mfu=0.4")
    assert number(text, "Parameters") == pytest.approx(7649, rel=0.001)
    assert number(text, "Hours") == pytest.approx(10, rel=0.25)
    assert "fits" in text and "2: dilated and dense" in text
    olmo2 = [
        "model=olmo2_7b_ratplus",
        "model.path=nowhere",
        "stage=continued_pretrain",
        "cluster.gpus=64",
    ]
    memory = estimate(job, capsys, *olmo2)
    assert number(memory, "Parameters") == pytest.approx(7298.6 + 537.0, rel=0.001)
    assert number(memory, "Hours") == pytest.approx(10, rel=0.25)
    halved = estimate(job, capsys, *P2_7B, "cluster.gpus=64", "cluster.mfu=0.2")
    assert number(halved, "Hours") == pytest.approx(2 * number(text, "Hours"), rel=0.01)
    few = estimate(job, capsys, *P2_7B, "cluster.gpus=16")
    rest = ("GPU memory: activations", "GPU memory: logits")  # of a pass, on any number of GPUs
    assert [number(few, what) for what in rest] == [number(text, what) for what in rest]
    alone = estimate(job, capsys, *P2_7B, "cluster.gpus=1")
    assert "too much" in alone
    turns = estimate(job, capsys, *P2_7B, "cluster.gpus=64", "stage.alternate=true")
    assert number(turns, "FLOPs") == pytest.approx(number(text, "FLOPs") / 2, rel=0.01)
    options = ("stage.alternate=true", "stage.sparse_only_tokens=1000")  # of joint training alone
    dense, ignored = (estimate(job, capsys, *P2_7B, "stage.joint=null", *x) for x in ((), options))
    assert number(ignored, "FLOPs") == number(dense, "FLOPs")


def test_a_decoding_step_reads_as_each_layers_method_does(job, capsys):
    def hours(*words):
        text = estimate(job, capsys, "data=ruler", "cluster.bandwidth_tb=1e-5", *words)
        return number(text, "Hours for the answers")

    def layers(names):
        return "method=layers", f"method.layers=[{names}]"

    dense, quest = hours("method=dense"), hours("method=quest")
    assert hours(*layers("quest,quest")) == quest < dense / 5
    assert hours(*layers("dense,quest")) == pytest.approx((dense + quest) / 2, rel=0.01)
    assert hours("method=moba") == dense
    assert quest < hours("method=sparq") < dense / 2
    assert hours("method=streaming") < quest


def test_what_the_job_would_refuse_the_estimate_refuses(job):
    with pytest.raises(ValueError, match="cannot be shared by 5 processes"):
        job(*P2_7B, "cluster.gpus=5", "dry_run=true")
    with pytest.raises(ValueError, match="budget 1/3"):
        job("budget=1/3", "dry_run=true")
