"""Where samples come from: all of RULER's thirteen tasks, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ratplus_exp.settings import Settings
from ratplus_exp.tasks.forms import Forms
from ratplus_exp.tasks.niah import (
    NIAH,
    TASKS,
    Draw,
    check_split,
    most_units,
    sample_name,
    seeded_random,
)
from ratplus_exp.tasks.others import CWE, FWE, VT, Draft, Texts
from ratplus_exp.tasks.qa import QA, hotpotqa, squad
from ratplus_exp.tasks.sample import Sample, make_sample

RULER_NAMES: Mapping[str, str] = MappingProxyType(
    {task: spec.ruler_name for task, spec in TASKS.items()}
    | {name: name for name in ("vt", "cwe", "fwe", "qa_1", "qa_2")}
)
"""All tasks, and what RULER calls them."""
QA_FILES = {"qa_1": "squad", "qa_2": "hotpotqa"}
"""Where the questions of a task come from: fields of `QA`."""
GOLDEN = (*TASKS, "vt")
"""Tasks whose answers have places of their own in the prompt. Counts have none (cwe, fwe), and a
phrase that answers a question stands anywhere or is worded otherwise (qa)."""


@dataclass(frozen=True)
class Others(Settings):
    """Texts and sizes of the tasks beyond NIAH; `Others()` is RULER."""

    vt: VT = field(default_factory=VT)
    cwe: CWE = field(default_factory=CWE)
    fwe: FWE = field(default_factory=FWE)
    qa: QA = field(default_factory=QA)

    def of(self, task: str) -> Texts:
        """A task's own texts; KeyError for one of NIAH."""
        every = {"vt": self.vt, "cwe": self.cwe, "fwe": self.fwe, "qa_1": self.qa, "qa_2": self.qa}
        return every[task]

    def reserve(self, task: str, forms: Forms) -> int:
        """Tokens that a task's prompts leave free for the answer."""
        return forms.reserve if task in TASKS else self.of(task).reserve


@dataclass(frozen=True, eq=False)
class Ruler(NIAH):
    """`NIAH` and RULER's five other tasks."""

    others: Others = field(default_factory=Others)

    def sample(self, task: str, seed: int, index: int, split: str = "validation") -> Sample:
        if task not in RULER_NAMES:
            raise ValueError(f"unknown task {task!r}: use one of {', '.join(RULER_NAMES)}")
        if task in TASKS:
            return super().sample(task, seed, index, split)
        check_split(split)
        name = sample_name(task, seed, index, split)
        draft = self._draft(task, Draw(self.forms, split, seeded_random(name)), name, seed, index)
        capacity = self.length - self.others.of(task).reserve
        units = most_units(draft.prompt, self.count, capacity, name, draft.most)
        if units < draft.least:
            raise ValueError(f"{name}: the context is too short for the task: raise data.length")
        if units == draft.most:
            raise ValueError(
                f"{name}: there are too few words to fill the prompt: shorten data.length or raise"
                f" data.{task}.repeats"
            )
        text, prefix = draft.prompt(units), draft.prefix
        if self.forms.lowercase:
            text, prefix = text.lower(), prefix.lower()
        golden = task in GOLDEN
        return make_sample(
            name, task, text, draft.answers, self.tokenizer, prefix, golden, draft.one_of
        )

    def _draft(self, task: str, draw: Draw, name: str, seed: int, index: int) -> Draft:
        if task == "vt":
            return self.others.vt.draft(draw, name, self.count)
        if task == "cwe":
            return self.others.cwe.draft(draw, name, self.length)
        if task == "fwe":
            return self.others.fwe.draft(draw, name, self.length)
        field, read = QA_FILES[task], {"squad": squad, "hotpotqa": hotpotqa}[QA_FILES[task]]
        file = getattr(self.others.qa, field)
        if file is None:
            raise ValueError(no_file(task))
        return self.others.qa.draft(draw, name, file, read, seed, index)


def no_file(task: str) -> str:
    """That a task's questions are not there."""
    return f"{task} needs a file: set data.qa.{QA_FILES[task]}=FILE, or leave it out of the tasks"
