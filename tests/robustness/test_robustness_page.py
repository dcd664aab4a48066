"""docs/robustness.md names tests that are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_promise_has_its_test():
    named = re.findall(r"`(\w+\.py)::(\w+)`", (ROOT / "docs/robustness.md").read_text("utf-8"))
    assert len(named) > 20
    for file, test in named:
        (path,) = (ROOT / "tests").rglob(file)
        assert f"def {test}(" in path.read_text("utf-8"), (file, test)
