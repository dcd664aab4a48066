"""Samples of all of RULER's thirteen tasks, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ratplus_exp.settings import Settings
from ratplus_exp.tasks import prose
from ratplus_exp.tasks.forms import Forms
from ratplus_exp.tasks.niah import (
    QA_FILES,
    RULER_NAMES,
    SPLITS,
    TASKS,
    Draw,
    sample_name,
    seeded_random,
)
from ratplus_exp.tasks.others import CWE, FWE, VT
from ratplus_exp.tasks.qa import QA
from ratplus_exp.tasks.sample import Sample, make_sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Others(Settings):
    """Texts and sizes of the tasks beyond NIAH; `Others()` is RULER."""

    vt: VT = field(default_factory=VT)
    cwe: CWE = field(default_factory=CWE)
    fwe: FWE = field(default_factory=FWE)
    qa: QA = field(default_factory=QA)

    def of(self, task: str, forms: Forms) -> Any:
        """The texts of a task; those of NIAH are `forms`."""
        return forms if task in TASKS else getattr(self, "qa" if task in QA_FILES else task)


@dataclass(frozen=True, eq=False)
class Ruler:
    """Samples of all tasks for one tokenizer, context length and form of prompts.

    `length` counts the prompt and the task's `reserve` for the answer. `essay` is None (generated
    prose, new for each sample), a text file, or RULER's PaulGrahamEssays.json. Raises ValueError if
    the essay cannot be read or `length` leaves no room for a prompt.
    """

    tokenizer: PreTrainedTokenizerBase
    length: int
    forms: Forms = field(default_factory=Forms)
    essay: str | None = None
    others: Others = field(default_factory=Others)

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise ValueError("tasks need a fast tokenizer, for its offsets: load one with use_fast")
        if self.length <= self.forms.reserve:
            raise ValueError(
                f"length {self.length} leaves no room besides the {self.forms.reserve} tokens of"
                " forms.reserve: raise length or lower reserve"
            )
        if self.essay is not None:
            prose.essay_words(self.essay)  # fails now instead of at the first essay task

    def sample(self, task: str, seed: int, index: int, split: str = "validation") -> Sample:
        """The sample of that name: the same on every machine, in any order of calls.

        It is filled as closely as whole units of the haystack allow (for an essay, words) and never
        truncated. ValueError if even the prompt without a haystack does not fit.
        """
        if task not in RULER_NAMES:
            raise ValueError(f"unknown task {task!r}: use one of {', '.join(RULER_NAMES)}")
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: use train or validation")
        name, forms = sample_name(task, seed, index, split), self.forms
        texts = self.others.of(task, forms)
        draft = TASKS.get(task, texts).draft(Draw(forms, split, seeded_random(name)), name, self)
        style = str.lower if forms.lowercase else str
        capacity = self.length - texts.reserve
        units = self.fit(lambda n: style(draft.prompt(n)), capacity, name, draft.most)
        if units < draft.least:
            raise ValueError(f"{name}: the context is too short for the task: raise data.length")
        if units == draft.most:
            raise ValueError(
                f"{name}: there are too few words to fill the prompt: shorten data.length or raise"
                f" data.{task}.repeats"
            )
        text = style(draft.prompt(units))
        sample = make_sample(name, task, text, draft.answers, self.tokenizer)
        if draft.groups:
            place = sample.gold_spans.__getitem__
            ordered = (value for group in draft.groups for value in sorted(group, key=place))
            sample = replace(sample, answers=tuple(ordered))
        return sample

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def fit(
        self, prompt: Callable[[int], str], capacity: int, name: str, most: int | None = None
    ) -> int:
        """The largest number of units, at most `most`, whose prompt has at most `capacity` tokens.

        Interpolates, and stops when less than an average unit is missing.
        """
        fits = 0
        too_many = capacity + 1 if most is None else most + 1  # a unit has at least one token
        empty = self.count(prompt(0))
        if empty > capacity:
            raise ValueError(
                f"{name}: without any haystack the prompt takes {empty} tokens of {capacity}, which"
                " is the length less the reserve for the answer: raise length"
            )
        n, tokens = 8, empty  # 8: enough for a first rate, without overshooting
        while too_many - fits > 1:
            n = min(max(n, fits + 1), too_many - 1)
            tokens = self.count(prompt(n))
            rate = max((tokens - empty) / n, 1e-3)
            if tokens > capacity:
                too_many = n
            else:
                fits = n
                if capacity - tokens < rate:
                    break
            n += int((capacity - tokens) // rate)
        return fits
