"""Imports go one way: report → analysis → store."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ratplus_exp"
MAY_IMPORT = {
    "store": {"store"},
    "analysis": {"store", "analysis", "budget"},
    "report": {"store", "analysis", "report", "budget"},
}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_no_room_above(room):
    found = set()
    for file in (PACKAGE / room).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                package, *rest = name.split(".")
                if package in ("ratplus_exp", "kernels", "run"):
                    found.add(rest[0] if rest else package)
    assert room in found and found <= MAY_IMPORT[room]
