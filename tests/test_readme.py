"""Every command of README.md and docs/ is one that works: composed and validated here."""

import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from ratplus_exp.config import validate, validate_method

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
PAGES += sorted((REPOSITORY / "docs").glob("*.md"))
LINES = sorted(
    {
        line.partition(" #")[0].strip()
        for page in PAGES
        for line in re.findall(
            r"^ {4}((?:python run\.py|make) .*)$", page.read_text(), re.MULTILINE
        )
    }
)


# The method that CONTRIBUTING.md adds is run by tests/stages/test_new_method.py.
RUNS = [line for line in LINES if line.startswith("python run.py") and "centroid" not in line]


@pytest.mark.parametrize("line", RUNS)
def test_run_commands_compose_and_validate(line):
    arguments = shlex.split(line)[2:]
    if arguments == ["--help"]:
        return
    sweep = "-m" in arguments
    # The SLURM launcher is a package of its own: tests/test_launcher.py.
    overrides = [a for a in arguments if a != "-m" and not a.startswith("hydra")]
    jobs = [overrides]
    if sweep:
        parsed = OverridesParser.create().parse_overrides(overrides)
        ((*jobs,),) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        for job in jobs:
            cfg = compose("config", list(job))
            validate(cfg)
            if cfg.stage.name == "eval":
                validate_method(cfg)


def test_make_targets_exist():
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE))
    named = {word for line in LINES if line.startswith("make ") for word in line.split()[1:2]}
    assert named and named <= targets


NEEDS = {  # what must be set beside it
    "corpus": ["stage=tokenize"],
    "corpus=local": ["corpus.path=texts"],
    "optimizer": ["stage=pretrain"],
    "model=hf": ["model.path=models/mine"],
    "model=hf_ratplus": ["model.path=models/mine"],
    "stage=ablation": ["stage.models=[a,b]"],
    "stage=sweep": ["experiment=table3"],
}


def test_every_configuration_composes_and_validates():
    conf = REPOSITORY / "conf"
    with initialize_config_dir(str(conf), version_base="1.3"):
        for file in sorted(conf.glob("*/**/*.yaml")):
            group, _, option = str(file.relative_to(conf).with_suffix("")).partition("/")
            if group != "hydra":  # needs the SLURM launcher: tests/test_launcher.py
                if option == "small_trial_training":  # beside another one
                    continue
                words = NEEDS.get(group, []) + NEEDS.get(f"{group}={option}", [])
                group = "optimizer@stage.optimizer" if group == "optimizer" else group
                validate(compose("config", [*words, f"{group}={option}"]))


def test_the_reference_table_is_of_the_shipped_weights():
    cells = pd.read_csv(REPOSITORY / "outputs/reference/pocket/cells.csv")
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        digests = {
            name: compose("config", [f"model={name}"]).model.sha256[:16]
            for name in ("pocket_attention", "pocket_ratplus")
        }
    assert dict(cells[["model", "checkpoint"]].drop_duplicates().to_numpy()) == digests
    assert len(cells[["model", "checkpoint"]].drop_duplicates()) == 2
    assert (cells.loc[cells["selector"] == "topk", "n"] >= 200).all()


def test_the_readmes_figures_are_those_of_the_reference():
    text = (REPOSITORY / "README.md").read_text()
    found = text[text.index("## What it shows") : text.index("## Going on")]
    folder = REPOSITORY / "outputs/reference/pocket"
    cells = pd.read_csv(folder / "cells.csv")
    cells = cells[(cells["selector"] == "topk") & (cells["block_size"] != 2)]
    cells = cells[~((cells["method"] == "moba") & (cells["block_size"] == 16))]
    means = cells.groupby(["backbone", "method", "budget"])["accuracy"].mean()
    sparse = [(m, b) for m in ("quest", "moba", "snapkv") for b in ("1/4", "1/8", "1/16")]
    for backbone in ("Attention", "RAT+"):
        shown = re.search(rf"^\| {re.escape(backbone)} \| (.*) \|$", found, re.MULTILINE)
        expected = [means[(backbone, *cell)] for cell in (("dense", "1"), *sparse)]
        assert shown.group(1).split(" | ") == [f"{x:.1f}" for x in expected]
    intervals = re.findall(r"[+−][0-9.]+ \[[^\]]+\]", found)
    report = (folder / "report.md").read_text()
    assert len(intervals) >= 4
    assert all(interval in report for interval in intervals)
    pages = [*re.findall(r"\]\(([^)#]+)[)#]", text)]
    assert all((REPOSITORY / page).exists() for page in pages if "://" not in page)
