"""A stored command shows what was run, without folders of the machine."""

import sys
from pathlib import Path

from ratplus_exp.provenance import REPOSITORY, provenance


def test_a_command_has_no_folder_of_the_machine(monkeypatch):
    words = ["run.py", f"results={REPOSITORY}/outputs/x", f"model.path={Path.home()}/models/7b"]
    words += ["stage.folder=/scratch/user/report", "budget=1/16,1/8", "data.essay=outputs/a/b"]
    monkeypatch.setattr(sys, "argv", words)
    assert provenance({})["command"] == (
        "python run.py results=outputs/x model.path=~/models/7b stage.folder=…/report "
        "budget=1/16,1/8 data.essay=outputs/a/b"
    )
