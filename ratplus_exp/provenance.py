"""Provenance of results: command, commit, versions, machine, time."""

import errno
import hashlib
import os
import platform
import re
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
FOLDERS = re.compile(r"(?<![\w~.…/])/(?:[^/\s,'\"\]]+/)+")


def provenance(config: dict[str, Any]) -> dict[str, Any]:
    """The record that is stored with every result. Its command has no folder of this machine: of
    those outside the checkout and the home only the last name stays, as in …/results."""
    name = Path(sys.argv[0]).name
    program = f"python {name}" if name.endswith(".py") else name
    cpu = f"{platform.processor() or platform.machine()} CPU"
    command = " ".join((program, *sys.argv[1:])).replace(f"{REPOSITORY}/", "")
    command = command.replace(str(Path.home()), "~")
    return {
        "config": config,
        "command": FOLDERS.sub("…/", command),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "threads": torch.get_num_threads(),
    }


@cache
def commit() -> str | None:
    """The environment's COMMIT, for a copy of the code; else that of the checkout, with "+"
    appended if tracked files have changed, or None."""
    given = os.environ.get("COMMIT")
    if given or not (REPOSITORY / ".git").exists():  # git would search the folders above
        return given
    commands = ("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")
    pipes: Any = {"capture_output": True, "text": True, "check": True}
    try:
        head, changes = (
            subprocess.run(["git", "-C", str(REPOSITORY), *command], **pipes).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changes else "")


def sha256(path: Path) -> str:
    """OSError if it cannot be read or is not a regular file (a device may never end)."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a file", str(path))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
