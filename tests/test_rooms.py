"""Imports go one way."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "ratplus_exp"
MAY_IMPORT = {
    "distributed": set(),
    "tasks": {"tasks", "settings", "workers"},
    "text": {"text", "tasks", "training", "settings", "store", "workers"},
    "training": {
        "training",
        "cost",
        "distributed",
        "memory",
        "methods",
        "settings",
        "store",
        "workers",
    },
    "store": {"store"},
    "analysis": {"store", "analysis", "tasks"},
    "report": {"store", "analysis", "report"},
}
COMMANDS = {"main.py", "harness.py"}
HYDRA = {"config.py", "tracking.py", "stages"} | COMMANDS


def imported(file: Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module} if isinstance(node, ast.ImportFrom) and node.module else set()
    return names


def rooms(file: Path) -> set[str]:
    """The rooms of this project that a file imports."""
    parts = [name.split(".") for name in imported(file)]
    return {x[1] if x[0] == "ratplus_exp" and x[1:] else x[0] for x in parts}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_one_way(room):
    all_rooms = {"kernels", "ratplus_kernels", "run"} | {x.stem for x in PACKAGE.iterdir()}
    files = [*PACKAGE.glob(f"{room}.py"), *(PACKAGE / room).glob("*.py")]
    assert files and set().union(*map(rooms, files)) & all_rooms <= MAY_IMPORT[room]


def test_only_commands_import_stages_and_only_few_import_hydra():
    files = sorted(PACKAGE.rglob("*.py"))
    for file in files:
        top = file.relative_to(PACKAGE).parts[0]
        found = rooms(file)
        assert "stages" not in found or top in {"stages"} | COMMANDS, file
        assert "hydra" not in found or top in HYDRA, file
        assert "wandb" not in found or top == "tracking.py", file
    assert any("stages" in rooms(file) for file in files)


def test_kernels_import_no_room():
    files = sorted((REPOSITORY / "kernels" / "ratplus_kernels").rglob("*.py"))
    assert files and not any("ratplus_exp" in name for file in files for name in imported(file))
