"""RULER's eight needle-in-a-haystack tasks, and the parts that all tasks share.

The semantics are RULER's (NVIDIA/RULER, scripts/data/synthetic/niah.py and synthetic.yaml), with
three intended differences: a sample depends on its name alone, train and validation share no value,
and the haystack is sized for each prompt instead of once for all.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, repeat
from typing import TYPE_CHECKING, NamedTuple

from ratplus_exp.tasks import prose
from ratplus_exp.tasks.forms import Forms

if TYPE_CHECKING:
    from ratplus_exp.tasks.ruler import Ruler


class Draft(NamedTuple):
    """A sample before its haystack has a size: a prompt is the template, with the context of n
    units of the haystack instead of "{context}"."""

    template: str
    context: Callable[[int], str]
    answers: Sequence[str]
    least: int = 0  # units that the task needs
    most: int | None = None  # units available
    groups: Sequence[Sequence[str]] = ()  # of answers, each in the order of the prompt; () as given

    def prompt(self, n: int) -> str:
        return self.template.replace("{context}", self.context(n))


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

    def draft(self, draw: Draw, name: str, source: Ruler) -> Draft:
        forms, rng = draw.forms, draw.rng
        keys = [draw(self.key) for _ in range(self.keys)]
        values = [[draw(self.value) for _ in range(self.values)] for _ in keys]
        needles = [
            forms.state(key, value, self.value)
            for key, of_key in zip(keys, values, strict=True)
            for value in of_key
        ]
        as_ruler = forms.answer_order == "creation"
        (random.Random(RULERS_SEED) if as_ruler else rng).shuffle(needles)
        queried = rng.sample(range(self.keys), self.queries)
        groups = [values[i] for i in queried]
        answers = [value for group in groups for value in group]
        asked = [keys[i] for i in queried], self.value, len(answers)
        template = forms.ask(forms.template + forms.answer_prefix, *asked)
        more = self._haystack(draw, source.essay)
        units: list[str] = []

        def context(n: int) -> str:
            """The haystack's first n units with the needles, which are placed again for each n."""
            units.extend(islice(more, max(0, n - len(units))))
            places = seeded_random(f"{name}/{n}")
            if self.haystack == "essay":
                return _in_essay(units[:n], needles, places, as_ruler)
            return in_list(units[:n], needles, places, forms.separator)

        order = {"creation": [], "document": [answers], "question": groups}
        return Draft(template, context, answers, groups=order[forms.answer_order])

    def _haystack(self, draw: Draw, essay: str | None) -> Iterator[str]:
        """Its units, without end."""
        if self.haystack == "noise":
            yield from repeat(draw.forms.noise)
        elif self.haystack == "needle":
            while True:
                yield draw.forms.state(draw(self.key), draw(self.value), self.value)
        elif essay is not None:
            yield from cycle(prose.essay_words(essay))
        while True:
            yield from prose.sentence(draw.rng).split()


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
RULER_NAMES = {task: spec.ruler_name for task, spec in TASKS.items()} | {
    name: name for name in ("vt", "cwe", "fwe", "qa_1", "qa_2")
}
"""All tasks, and RULER's names of them."""
GOLDEN = (*TASKS, "vt")
"""Tasks whose answers have places in the prompt. Counts have none (cwe, fwe), and the words of an
answer to a question may occur anywhere or not at all (qa)."""
QA_FILES = {"qa_1": "squad", "qa_2": "hotpotqa"}
"""Tasks one of whose answers is enough, and the data set of each, a field of `QA`."""

SPLITS = ("train", "validation")
RULERS_SEED = 42  # RULER shuffles the needles of every prompt with it: a fixed permutation


def split_of(value: str) -> str:
    """The split of a number or uuid: 'validation' has one value in five, 'train' the rest.

    Every value of a prompt, gold or distractor, belongs to the prompt's split, so no trained answer
    is ever tested.
    """
    return "validation" if sum(map(ord, value)) % 5 == 0 else "train"


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
            f"the prompt needs more than the {len(self.used)} available {kind}s: shorten length,"
            " or raise forms.key_count or number_digits"
        )


def sample_name(task: str, seed: int, index: int, split: str = "validation") -> str:
    """A sample's id, on which alone it depends."""
    return f"{task}/{split}/{seed}/{index}"


def seeded_random(name: str) -> random.Random:
    """A generator seeded by a name, the same in every process (unlike `hash`)."""
    return random.Random(int.from_bytes(hashlib.sha256(name.encode()).digest()))


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
    lines = prose.sentences(" ".join(words))
    bare = len(lines)
    depths = sorted(rng.sample(_DEPTHS, len(needles)), reverse=True)
    for depth, needle in zip(depths, reversed(needles), strict=True):
        lines.insert((bare if as_ruler else len(lines)) * depth // 100, needle)
    return " ".join(lines)
