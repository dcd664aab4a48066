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
from ratplus_exp.tasks.others import CWE, FWE, VT, Texts
from ratplus_exp.tasks.qa import QA, QA_FILES
from ratplus_exp.tasks.sample import Sample, make_sample

RULER_NAMES: Mapping[str, str] = MappingProxyType(
    {task: spec.ruler_name for task, spec in TASKS.items()}
    | {name: name for name in ("vt", "cwe", "fwe", "qa_1", "qa_2")}
)
"""All tasks, and RULER's names of them."""
GOLDEN = (*TASKS, "vt")
"""Tasks whose answers have places in the prompt. Counts have none (cwe, fwe), and the words of an
answer to a question may occur anywhere or not at all (qa)."""


@dataclass(frozen=True)
class Others(Settings):
    """Texts and sizes of the tasks beyond NIAH; `Others()` is RULER."""

    vt: VT = field(default_factory=VT)
    cwe: CWE = field(default_factory=CWE)
    fwe: FWE = field(default_factory=FWE)
    qa: QA = field(default_factory=QA)

    def of(self, task: str) -> Texts:
        """The texts of a task beyond NIAH."""
        texts: Texts = getattr(self, "qa" if task in QA_FILES else task)
        return texts

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
        name, texts = sample_name(task, seed, index, split), self.others.of(task)
        draw = Draw(self.forms, split, seeded_random(name))
        if isinstance(texts, QA):
            draft = texts.draft(draw, name, task, seed, index)
        elif isinstance(texts, VT):
            draft = texts.draft(draw, name, self.count)
        else:
            assert isinstance(texts, CWE | FWE)
            draft = texts.draft(draw, name, self.length)
        capacity = self.length - texts.reserve
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
