"""The wheel, outside the checkout: its command, its configurations, its one-line refusals."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def pip(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """`ratplus_exp OVERRIDES` as the wheel installs it, in an empty folder."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("conf", "kernels", "ratplus_exp"):
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True)
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source))
    (wheel,) = folder.glob("*.whl")
    shutil.rmtree(source)
    installed, empty = folder / "installed", folder / "empty"
    pip("install", "--no-deps", "--no-index", "--target", str(installed), str(wheel))
    empty.mkdir()

    def run(*overrides):
        return subprocess.run(
            [sys.executable, installed / "bin" / "ratplus_exp", *overrides],
            cwd=empty,
            env=os.environ | {"PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
        )

    run.folder = empty
    return run


def test_help_and_an_estimate_need_nothing_but_the_wheel(command):
    assert "pocket_ratplus" in command("--help").stdout
    done = command("experiment=pocket_ratplus", "dry_run=true")
    assert done.returncode == 0 and "Parameters" in done.stdout, done.stderr


def test_the_main_job_runs_from_the_wheel(command, tiny_models):
    model = [f"model.path={tiny_models['ratplus']}", "model.sha256=null"]
    small = ["data.tasks=[S-1]", "data.examples=2", "tracking=disabled", "device=cpu"]
    done = command(*model, "method=quest", "budget=1/16", *small)
    assert done.returncode == 0, done.stderr
    (cell,) = (command.folder / "outputs" / "results" / "eval").iterdir()
    assert len((cell / "samples.jsonl").read_text().splitlines()) == 2
    (provenance,) = json.loads((cell / "config.json").read_text())["provenance"]
    assert provenance["command"].startswith("ratplus_exp model.path=")
    assert provenance["commit"] is None


def test_the_pocket_models_are_not_in_the_wheel(command):
    done = command("tracking=disabled")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: there is no model.safetensors in ")
    assert "set model.path" in line and "clone of the repository" in line
