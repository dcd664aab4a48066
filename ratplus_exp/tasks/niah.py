"""RULER's eight needle-in-a-haystack tasks, sampled one prompt at a time as a pure function.

The semantics are RULER's (NVIDIA/RULER, scripts/data/synthetic/niah.py and synthetic.yaml); what
differs is on purpose: every sample depends on its own name alone, train and validation share no
value, and the haystack is sized for each prompt rather than once for all.
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
    queries: int = 1  # keys asked for


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
    """The split that owns a number or uuid: 'validation' has one value in five, 'train' the rest.

    Every value of a prompt, gold or distractor, comes from the prompt's own split, so that no
    trained answer can be a tested one.
    """
    return "validation" if sum(map(ord, value)) % 5 == 0 else "train"


@dataclass(frozen=True, eq=False)
class NIAH:
    """Samples of the NIAH tasks for one tokenizer, context length and form of prompts.

    `length` counts prompt and answer, of which `forms.reserve` tokens stay free. `essay` is None
    (generated prose, fresh for each sample), a text file, or RULER's PaulGrahamEssays.json.
    Raises ValueError when the essay cannot be read or `length` leaves no room for a prompt.
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
            prose.essay_words(self.essay)  # fails now rather than at the first essay task

    def sample(self, task: str, seed: int, index: int, split: str = "validation") -> Sample:
        """The sample of that name: the same on every machine, in any order of calls.

        It is filled as closely as whole units allow (essay: words; noise and needles: RULER's
        units) and never truncated. ValueError if even the needles alone do not fit.
        """
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}: use one of {', '.join(TASKS)}")
        check_split(split)
        spec, name = TASKS[task], sample_name(task, seed, index, split)
        rng = seeded_random(name)
        draw = Draw(self.forms, split, rng)

        keys = [draw(spec.key) for _ in range(spec.keys)]
        values = [[draw(spec.value) for _ in range(spec.values)] for _ in keys]
        needles = [
            self._needle(spec, key, value)
            for key, own in zip(keys, values, strict=True)
            for value in own
        ]
        rulers = self.forms.answer_order == "creation"
        (random.Random(RULERS_SEED) if rulers else rng).shuffle(needles)
        asked = rng.sample(range(spec.keys), spec.queries)
        answers = [value for i in asked for value in values[i]]
        frame, prefix = self._question(spec, [keys[i] for i in asked])
        units = self._units(spec, draw, rng)

        def prompt(n: int) -> str:
            """The prompt with the haystack's first n units; needles placed anew for each n."""
            places = seeded_random(f"{name}/{n}")
            if spec.haystack == "essay":
                context = _in_essay(units(n), needles, places, rulers)
            else:
                context = in_list(units(n), needles, places, self.forms.separator)
            text = frame.replace("{context}", context) + prefix
            return text.lower() if self.forms.lowercase else text

        capacity = self.length - self.forms.reserve
        filled = prompt(most_units(prompt, self.count, capacity, name))
        prefix = prefix.lower() if self.forms.lowercase else prefix
        sample = make_sample(name, task, filled, answers, self.tokenizer, prefix)
        if self.forms.answer_order != "creation":
            by_key = self.forms.answer_order == "question"
            groups = [values[i] for i in asked] if by_key else [answers]
            place = sample.gold_spans.__getitem__
            ordered = tuple(value for group in groups for value in sorted(group, key=place))
            sample = replace(sample, answers=ordered)
        return sample

    def _needle(self, spec: TaskSpec, key: str, value: str) -> str:
        return self.forms.needle.format(type_needle_v=f"{spec.value}s", key=key, value=value)

    def _question(self, spec: TaskSpec, queries: Sequence[str]) -> tuple[str, str]:
        """Template (its '{context}' still open) and answer prefix for the queried keys."""
        kind = f"{spec.value}s"
        template, prefix = self.forms.template, self.forms.answer_prefix
        if spec.queries * spec.values == 1:
            kind, template, prefix = spec.value, singular(template), singular(prefix)
        query = queries[-1]
        if len(queries) > 1:
            query = ", ".join(queries[:-1]) + self.forms.query_joiner + query
        return (
            template.format(type_needle_v=kind, query=query, context="{context}"),
            prefix.format(type_needle_v=kind, query=query),
        )

    def _units(
        self, spec: TaskSpec, draw: Draw, rng: random.Random
    ) -> Callable[[int], Sequence[str]]:
        """The haystack as a function of its size; a larger one begins with the smaller."""
        if spec.haystack == "noise":
            return lambda n: [self.forms.noise] * n
        if spec.haystack == "needle":
            return _growing(lambda: [self._needle(spec, draw(spec.key), draw(spec.value))])
        if self.essay is None:
            return _growing(lambda: prose.sentence(rng).split())
        words = prose.essay_words(self.essay)
        return lambda n: (words * -(-n // len(words)))[:n]  # from the beginning, repeated

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
    """The largest haystack whose prompt has at most `capacity` tokens; most: units that there are.

    Interpolates, and stops when less than an average unit is missing.
    """
    fits = 0
    too_many = capacity + 1 if most is None else most + 1  # a unit is one token at least
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
        """Something new that `make` makes; of_split: which belongs to the sample's split."""
        for _ in range(10_000):  # many more than a prompt needs: then there is none left
            text = make()
            if text not in self.used and (not of_split or split_of(text) == self.split):
                self.used.add(text)
                return text
        raise ValueError(
            f"the prompt needs more than the {len(self.used)} {kind}s there are: shorten length,"
            " or raise forms.key_count or number_digits"
        )


def sample_name(task: str, seed: int, index: int, split: str = "validation") -> str:
    """A sample's id, which is all that it depends on."""
    return f"{task}/{split}/{seed}/{index}"


def seeded_random(name: str) -> random.Random:
    """A generator seeded by a name, alike in every process (unlike `hash`)."""
    return random.Random(int.from_bytes(hashlib.sha256(name.encode()).digest()))


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use train or validation")


def _growing(more: Callable[[], Sequence[str]]) -> Callable[[int], Sequence[str]]:
    """`f(n)`: the first n of an endless list, made as far as it has been asked for."""
    units: list[str] = []

    def first(n: int) -> Sequence[str]:
        while len(units) < n:
            units.extend(more())
        return units[:n]

    return first


def in_list(
    units: Sequence[str], needles: Sequence[str], rng: random.Random, separator: str
) -> str:
    """Needles in front of distinct units of a noise or needle haystack."""
    lines = list(units)
    # With fewer units than needles, `insert` appends those that point beyond the end.
    spots = rng.sample(range(max(len(units), len(needles))), len(needles))
    for spot, needle in zip(sorted(spots, reverse=True), needles, strict=True):
        lines.insert(spot, needle)
    return separator.join(lines)


_DEPTHS = tuple(round(100 * i / 39) for i in range(40))  # per cent of an essay's sentences


def _in_essay(
    words: Sequence[str], needles: Sequence[str], rng: random.Random, rulers: bool
) -> str:
    """Needles between the sentences of an essay, at as many of 40 depths, in their order.

    rulers: all places are counted in the essay without needles, as RULER does; otherwise a depth is
        one of the essay with the deeper needles. Unlike RULER, which then has two spaces, a depth
        of 0 or two needles in one place leave one.
    """
    found = sentences(" ".join(words))
    bare = len(found)
    depths = sorted(rng.sample(_DEPTHS, len(needles)), reverse=True)
    for depth, needle in zip(depths, reversed(needles), strict=True):
        found.insert((bare if rulers else len(found)) * depth // 100, needle)
    return " ".join(found)
