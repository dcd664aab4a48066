"""Where a number came from: command, commit, versions, machine, time."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "numpy", "hydra-core", "tokenizers")
REPOSITORY = Path(__file__).resolve().parents[1]


def provenance(config: dict[str, Any]) -> dict[str, Any]:
    """What is stored beside every result."""
    return {
        "config": config,
        "command": _public(" ".join((*_program(sys.argv[0]), *sys.argv[1:]))),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
        "device": device_name(),
        "threads": torch.get_num_threads(),
    }


def _program(path: str) -> tuple[str, ...]:
    """Of a script, "python script.py"; of an installed command, its name."""
    name = Path(path).name
    return ("python", name) if name.endswith(".py") else (name,)


def _public(text: str) -> str:
    """Without the folders of this machine."""
    return text.replace(f"{REPOSITORY}/", "").replace(str(Path.home()), "~")


@cache
def commit() -> str | None:
    """The commit of the code, with "+" behind it where tracked files were changed since; outside a
    checkout what COMMIT in the environment says, or None."""
    if not (REPOSITORY / ".git").exists():  # git would look for one further up
        return os.environ.get("COMMIT")
    git = ["git", "-C", str(REPOSITORY)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()} CPU"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
