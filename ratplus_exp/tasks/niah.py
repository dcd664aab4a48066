"""RULER's eight needle-in-a-haystack tasks, sampled one prompt at a time as a pure function.

The semantics are RULER's (NVIDIA/RULER, scripts/data/synthetic/niah.py and synthetic.yaml), with
three intended differences: a sample depends on its name alone, train and validation share no value,
and the haystack is sized for each prompt instead of once for all.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ratplus_exp.tasks import prose
from ratplus_exp.tasks.forms import Forms, singular
from ratplus_exp.tasks.sample import Sample, make_sample
from ratplus_exp.tasks.sentences import sentences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TaskSpec:
    """One row of the papers' task table; kinds are named as in `Forms.draw`."""

    ruler_name: str
    haystack: str  # 'noise', 'essay' or 'needle'
    key: str  # 'word' or 'uuid'
    value: str  # 'number' or 'uuid'
    keys: int = 1
    values: int = 1  # of each key
    queries: int = 1  # keys in the question


TASKS: dict[str, TaskSpec] = {
    "S-1": TaskSpec("niah_single_1", "noise", "word", "number"),
    "S-2": TaskSpec("niah_single_2", "essay", "word", "number"),
    "S-3": TaskSpec("niah_single_3", "essay", "word", "uuid"),
    "MK-1": TaskSpec("niah_multikey_1", "essay", "word", "number", keys=4),
    "MK-2": TaskSpec("niah_multikey_2", "needle", "word", "number"),
    "MK-3": TaskSpec("niah_multikey_3", "needle", "uuid", "uuid"),
    "MV": TaskSpec("niah_multivalue", "essay", "word", "number", values=4),
    "MQ": TaskSpec("niah_multiquery", "essay", "word", "number", keys=4, queries=4),
}

SPLITS = ("train", "validation")
RULERS_SEED = 42  # RULER shuffles the needles of every prompt with it: a fixed permutation


def split_of(value: str) -> str:
    """The split of a number or uuid: 'validation' has one value in five, 'train' the rest.

    Every value of a prompt, gold or distractor, belongs to the prompt's split, so no trained answer
    is ever tested.
    """
    return "validation" if sum(map(ord, value)) % 5 == 0 else "train"


@dataclass(frozen=True, eq=False)
class NIAH:
    """Samples of the NIAH tasks for one tokenizer, context length and form of prompts.

    `length` counts the prompt and `forms.reserve` tokens for the answer. `essay` is None (generated
    prose, new for each sample), a text file, or RULER's PaulGrahamEssays.json. Raises ValueError if
    the essay cannot be read or `length` leaves no room for a prompt.
    """

    tokenizer: PreTrainedTokenizerBase
    length: int
    forms: Forms = field(default_factory=Forms)
    essay: str | None = None

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise ValueError("NIAH needs a fast tokenizer, for its offsets: load one with use_fast")
        if self.length <= self.forms.reserve:
            raise ValueError(
                f"length {self.length} leaves nothing beside the {self.forms.reserve} tokens of"
                " forms.reserve: raise length or lower reserve"
            )
        if self.essay is not None:
            prose.essay_words(self.essay)  # fails now instead of at the first essay task

    def sample(self, task: str, seed: int, index: int, split: str = "validation") -> Sample:
        """The sample of that name: the same on every machine, in any order of calls.

        It is filled as closely as whole units allow (essay: words; noise and needles: RULER's
        units) and never truncated. ValueError if even the needles alone do not fit.
        """
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}: use one of {', '.join(TASKS)}")
        check_split(split)
        spec, name, forms = TASKS[task], sample_name(task, seed, index, split), self.forms
        rng = seeded_random(name)
        draw = Draw(forms, split, rng)

        keys = [draw(spec.key) for _ in range(spec.keys)]
        values = [[draw(spec.value) for _ in range(spec.values)] for _ in keys]
        needles = [
            forms.state(key, value, spec.value)
            for key, of_key in zip(keys, values, strict=True)
            for value in of_key
        ]
        as_ruler = forms.answer_order == "creation"
        (random.Random(RULERS_SEED) if as_ruler else rng).shuffle(needles)
        queried = rng.sample(range(spec.keys), spec.queries)
        answers = [value for i in queried for value in values[i]]
        template, prefix = forms.template, forms.answer_prefix
        if len(answers) == 1:
            template, prefix = singular(template), singular(prefix)
        kind = spec.value if len(answers) == 1 else f"{spec.value}s"
        filled = {"type_needle_v": kind, "query": forms.query([keys[i] for i in queried])}
        template = template.format(context="{context}", **filled)
        prefix = prefix.format(**filled)
        units = self._units(spec, draw, rng)

        def prompt(n: int) -> str:
            """The prompt with the haystack's first n units; needles placed anew for each n."""
            places = seeded_random(f"{name}/{n}")
            if spec.haystack == "essay":
                context = _in_essay(units(n), needles, places, as_ruler)
            else:
                context = in_list(units(n), needles, places, forms.separator)
            text = template.replace("{context}", context) + prefix
            return text.lower() if forms.lowercase else text

        text = prompt(most_units(prompt, self.count, self.length - forms.reserve, name))
        prefix = prefix.lower() if forms.lowercase else prefix
        sample = make_sample(name, task, text, answers, self.tokenizer, prefix)
        if not as_ruler:
            by_key = forms.answer_order == "question"
            groups = [values[i] for i in queried] if by_key else [answers]
            place = sample.gold_spans.__getitem__
            ordered = tuple(value for group in groups for value in sorted(group, key=place))
            sample = replace(sample, answers=ordered)
        return sample

    def _units(
        self, spec: TaskSpec, draw: Draw, rng: random.Random
    ) -> Callable[[int], Sequence[str]]:
        """The haystack as a function of its size; a larger one begins with the smaller."""
        if spec.haystack == "noise":
            return lambda n: [self.forms.noise] * n
        if self.essay is not None and spec.haystack == "essay":
            words = prose.essay_words(self.essay)
            return lambda n: (words * -(-n // len(words)))[:n]  # from the beginning, repeated
        units: list[str] = []

        def first(n: int) -> Sequence[str]:
            while len(units) < n:
                if spec.haystack == "essay":
                    units.extend(prose.sentence(rng).split())
                else:
                    units.append(self.forms.state(draw(spec.key), draw(spec.value), spec.value))
            return units[:n]

        return first

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def most_units(
    prompt: Callable[[int], str],
    count: Callable[[str], int],
    capacity: int,
    name: str,
    most: int | None = None,
) -> int:
    """The largest number of units, at most `most`, whose prompt has at most `capacity` tokens.

    Interpolates, and stops when less than an average unit is missing.
    """
    fits = 0
    too_many = capacity + 1 if most is None else most + 1  # a unit has at least one token
    empty = count(prompt(0))
    if empty > capacity:
        raise ValueError(
            f"{name}: without any haystack the prompt takes {empty} tokens of {capacity}, which is"
            " the length less the reserve for the answer: raise length"
        )
    n, tokens = 8, empty  # 8: enough for a first rate, without overshooting
    while too_many - fits > 1:
        n = min(max(n, fits + 1), too_many - 1)
        tokens = count(prompt(n))
        rate = max((tokens - empty) / n, 1e-3)
        if tokens > capacity:
            too_many = n
        else:
            fits = n
            if capacity - tokens < rate:
                break
        n += int((capacity - tokens) // rate)
    return fits


class Draw:
    """Keys and values of one sample: none twice, numbers and uuids of the sample's split."""

    def __init__(self, forms: Forms, split: str, rng: random.Random) -> None:
        self.forms, self.split, self.rng = forms, split, rng
        self.used: set[str] = set()

    def __call__(self, kind: str) -> str:
        """A 'word', 'number' or 'uuid'."""
        return self.fresh(kind, lambda: self.forms.draw(kind, self.rng), kind != "word")

    def fresh(self, kind: str, make: Callable[[], str], of_split: bool = True) -> str:
        """A new text from `make`; of_split: one of the sample's split."""
        for _ in range(10_000):  # many more than a prompt needs
            text = make()
            if text not in self.used and (not of_split or split_of(text) == self.split):
                self.used.add(text)
                return text
        raise ValueError(
            f"the prompt needs more than the {len(self.used)} {kind}s there are: shorten length,"
            " or raise forms.key_count or number_digits"
        )


def sample_name(task: str, seed: int, index: int, split: str = "validation") -> str:
    """A sample's id, on which alone it depends."""
    return f"{task}/{split}/{seed}/{index}"


def seeded_random(name: str) -> random.Random:
    """A generator seeded by a name, the same in every process (unlike `hash`)."""
    return random.Random(int.from_bytes(hashlib.sha256(name.encode()).digest()))


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use train or validation")


def in_list(
    units: Sequence[str], needles: Sequence[str], rng: random.Random, separator: str
) -> str:
    """Needles in front of distinct units of a noise or needle haystack."""
    lines = list(units)
    # With fewer units than needles, `insert` appends the needles beyond the end.
    spots = rng.sample(range(max(len(units), len(needles))), len(needles))
    for spot, needle in zip(sorted(spots, reverse=True), needles, strict=True):
        lines.insert(spot, needle)
    return separator.join(lines)


_DEPTHS = tuple(round(100 * i / 39) for i in range(40))  # per cent of an essay's sentences


def _in_essay(
    words: Sequence[str], needles: Sequence[str], rng: random.Random, as_ruler: bool
) -> str:
    """Needles in their order between the sentences of an essay, each at another of 40 depths.

    as_ruler: depths refer to the essay without needles, as in RULER; otherwise to the essay with
        the deeper needles. A depth of 0 and two needles in one place leave one space; RULER, two.
    """
    lines = sentences(" ".join(words))
    bare = len(lines)
    depths = sorted(rng.sample(_DEPTHS, len(needles)), reverse=True)
    for depth, needle in zip(depths, reversed(needles), strict=True):
        lines.insert((bare if as_ruler else len(lines)) * depth // 100, needle)
    return " ".join(lines)
