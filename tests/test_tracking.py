"""W&B may fail in any way: it costs a warning, and the run continues offline where it can."""

from functools import partial

import pytest
import wandb

from ratplus_exp.report import Table
from ratplus_exp.store.files import warn
from ratplus_exp.tracking import Tracker


@pytest.fixture(autouse=True)
def clear_warnings():
    warn.cache_clear()


class Run:
    def __init__(self):
        self.logged = []

    def log(self, values):
        if "bad" in values:
            raise PermissionError("no staging folder")
        self.logged.append(values)

    def finish(self, exit_code):
        raise OSError("no space")


@pytest.mark.parametrize("works", [("online", "offline"), ("offline",), ()])
def test_what_fails_is_said_in_one_line_and_fails_no_job(capsys, works):
    run, asked = Run(), []

    def start(mode):
        asked.append(mode)
        if mode not in works:
            raise wandb.Error("no\nAPI key")
        return run

    tracker = Tracker(start, "online")
    table = Table("A title", "", ("x",), (("1",),))
    tracker.log({"loss": 1.0})
    tracker.log({"bad": 1.0})
    tracker.log({table.title: table})
    tracker.finish(0)
    assert asked == ["online", "offline"][: 1 + ("online" not in works)]
    assert [list(values) for values in run.logged] == ([["loss"], ["A_title"]] if works else [])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(asked) - bool(works) + 2 * bool(works)
    assert all(line.startswith("warning: W&B: ") for line in lines)


def test_disabled_starts_nothing():
    Tracker(pytest.fail, "disabled").log({"loss": 1.0})


@pytest.mark.slow
@pytest.mark.parametrize("key", [None, "a" * 40])
def test_without_a_server_or_a_key_the_run_is_offline(tmp_path, monkeypatch, capsys, key):
    for name in ("HOME", "XDG_CONFIG_HOME", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    settings = wandb.Settings(silent=True, console="off", init_timeout=2)
    tracker = Tracker(partial(wandb.init, project="p", dir=tmp_path, settings=settings), "online")
    tracker.log({"loss": 1.0})
    tracker.finish(0)
    assert "tracking continues offline" in capsys.readouterr().err
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
