"""Every command of the pages and of `--help` is one that works."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from ratplus_exp.config import validate, validate_method

REPOSITORY = Path(__file__).parents[1]
CONF = REPOSITORY / "conf"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
PAGES += sorted((REPOSITORY / "docs").glob("*.md"))
COMMAND = re.compile(r"^ {4,8}((?:python run\.py|make) .*?)(?: {2,}.*| #.*)?$", re.MULTILINE)
LINES = {line for page in PAGES for line in COMMAND.findall(page.read_text())}
HELP = set(COMMAND.findall((CONF / "config.yaml").read_text()))
# The method that CONTRIBUTING.md adds is run by tests/stages/test_new_method.py.
RUNS = {x for x in LINES | HELP if x.startswith("python") and not re.search("centroid|--help", x)}
MAKES = {line for line in LINES if line.startswith("make ")}


def test_commands_are_found_in_the_pages():
    assert len(RUNS) > 40 and len(MAKES) > 10 and len(HELP) > 5


@pytest.mark.parametrize("line", sorted(RUNS))
def test_run_commands_compose_and_validate(line):
    check(line)


def check(line: str) -> None:
    """Compose and validate every job of a command line."""
    arguments = shlex.split(line)[2:]
    # The SLURM launcher is a package of its own.
    overrides = [a for a in arguments if a != "-m" and not a.startswith("hydra")]
    jobs = [overrides]
    if "-m" in arguments:
        parsed = OverridesParser.create().parse_overrides(overrides)
        ((*jobs,),) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for job in jobs:
            cfg = compose("config", list(job))
            validate(cfg)
            if cfg.stage.name == "eval":
                validate_method(cfg)


@pytest.mark.parametrize("line", sorted(MAKES))
def test_what_make_would_run_works(line):
    """Its recipe, as `make -n` prints it: commands of run.py compose, tools and scripts exist."""
    command = [*shlex.split(line.replace(" -j2", "")), "-n", "BIN=/venv/bin"]
    made = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    lines = [x for x in made.stdout.splitlines() if x.startswith("/venv/bin/python run.py")]
    for each in sorted({re.sub(r"\bseed=\d+", "seed=0", x) for x in lines}):  # alike for all seeds
        check(each)
    tools = re.findall(r"/venv/bin/(?:python -m )?(\w+)", made.stdout)
    assert all(tool == "python" or importlib.util.find_spec(tool) for tool in tools)
    scripts = re.findall(r"(?<=\s)[\w./-]+\.(?:py|sh)(?=\s)", made.stdout)
    assert all((REPOSITORY / script).is_file() for script in scripts), scripts


def test_help_has_all_groups():
    command = [sys.executable, "run.py", "--help"]
    text = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    for group in ("model", "method", "stage", "data", "pair", "experiment", "tracking"):
        options = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
        assert f"{group}: {', '.join(options)}" in text


def test_the_reference_table_is_of_the_shipped_weights():
    cells = pd.read_csv(REPOSITORY / "outputs/reference/pocket/cells.csv")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        digests = {
            (name, training, digest[:16])
            for name in ("pocket_attention", "pocket_ratplus")
            for training, digest in compose("config", [f"model={name}"]).model.sha256.items()
        }
    assert set(map(tuple, cells[["model", "training", "checkpoint"]].to_numpy())) == digests
    assert (cells.loc[cells["selector"] == "topk", "n"] >= 100).all()


def test_the_readmes_figures_are_those_of_the_reference():
    text = (REPOSITORY / "README.md").read_text()
    found = text[: text.index("## Usage")]
    folder = REPOSITORY / "outputs/reference/pocket"
    cells = pd.read_csv(folder / "cells.csv")
    cells = cells[(cells["selector"] == "topk") & cells["block_size"].isin([1, 16])]
    means = cells.groupby(["backbone", "method", "budget"])["exact"].mean()
    sparse = [(m, b) for m in ("quest", "moba", "snapkv") for b in ("1/4", "1/8", "1/16")]
    for backbone in ("Attention", "RAT+"):
        shown = re.search(rf"^\| {re.escape(backbone)} \| (.*) \|$", found, re.MULTILINE)
        expected = [means[(backbone, *cell)] for cell in (("dense", "1"), *sparse)]
        assert shown.group(1).split(" | ") == [f"{x:.1f}" for x in expected]
    intervals = re.findall(r"[+−][0-9.]+ \[[^\]]+\]", found)
    report = "".join((folder / x).read_text() for x in ("report.md", "protocols/tasks.md"))
    assert len(intervals) >= 2
    assert all(interval in report for interval in intervals)
    pages = [*re.findall(r"\]\(([^)#]+)[)#]", text)]
    assert all((REPOSITORY / page).exists() for page in pages if "://" not in page)
