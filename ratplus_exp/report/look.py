"""What each head keeps of one prompt: a page to hover over, and the same as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ratplus_exp.report.look_picture import COLORS, draw
from ratplus_exp.report.prose import render
from ratplus_exp.store import write_atomically

WHEN = {
    "decode": "at each answer token",
    "step": "at each answer token; what is not kept is gone",
    "once": "once, after the prompt; what is not kept is gone",
    "prefill": "for each token of the question; the answer is decoded densely",
    None: "",
}


@dataclass(frozen=True)
class Step:
    """What the query at a position selects: kept (layers, heads, candidates) bool.

    gold: of each answer token that this query needs, the token's positions in the prompt.
    """

    query: int
    gold: list[list[int]]
    kept: np.ndarray


@dataclass(frozen=True)
class View:
    """One method on one model. size: tokens of a candidate; read: the measured budget."""

    method: str
    model: str
    phase: str | None
    size: int
    answer: str
    right: bool
    read: float
    steps: list[Step]

    def hits(self) -> np.ndarray:
        """The share of the needed answer tokens that each head keeps, mean over steps: (layers,
        heads)."""
        shares = [
            np.mean([step.kept[..., np.array(x) // self.size].any(-1) for x in step.gold], axis=0)
            for step in self.steps
            if step.gold
        ]
        return np.mean(shares or [np.zeros(self.steps[0].kept.shape[:2])], axis=0)

    def tokens(self, length: int) -> np.ndarray:
        """The share of steps in which each head keeps each token: (layers, heads, length)."""
        share = np.zeros((*self.steps[0].kept.shape[:2], length))
        for step in self.steps:
            kept = step.kept.repeat(self.size, -1)[..., : min(step.query + 1, length)]
            share[..., : kept.shape[-1]] += kept / len(self.steps)
        return share


@dataclass(frozen=True)
class Memories:
    """A model's memory on the prompt: effective lengths (layers, heads, channels) in tokens, and
    gates (layers, heads, T), means over the channels."""

    model: str
    lengths: np.ndarray
    gates: np.ndarray


@dataclass(frozen=True)
class Look:
    """A prompt and its right answer as `tokens`: the first `prompt` of them are the prompt, and the
    question begins at `question`. values: [start, end) of each gold value."""

    id: str
    budget: str
    tokens: list[str]
    prompt: int
    question: int
    values: list[tuple[int, int]]
    answers: Sequence[str]
    views: list[View] = field(default_factory=list)
    memories: list[Memories] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"What each head keeps of {self.id} at budget {self.budget}"

    @property
    def gold(self) -> list[int]:
        return sorted({token for span in self.values for token in range(*span)})

    @property
    def needles(self) -> list[tuple[int, int]]:
        """The sentence around each value."""
        ends = [
            -1,
            *(i for i, x in enumerate(self.tokens) if x.rstrip().endswith(".")),
            self.prompt,
        ]
        return [
            (max(e for e in ends if e < start) + 1, min(e for e in ends if e >= end - 1) + 1)
            for start, end in self.values
        ]

    def text(self, start: int, end: int) -> str:
        return "".join(self.tokens[start:end]).strip()

    def write(self, folder: Path) -> tuple[Path, Path]:
        """look.html, which needs no other file, and look.png."""
        folder.mkdir(parents=True, exist_ok=True)
        page, picture = folder / "look.html", folder / "look.png"
        data = json.dumps(self._data(), ensure_ascii=False, separators=(",", ":"))
        data = data.replace("<", "\\u003c")
        write_atomically(page, render("look.html.j2", look=self, data=data, colors=COLORS))
        write_atomically(picture, draw(self))
        return page, picture

    def _data(self) -> dict[str, Any]:
        """The page's data, a row a head, with the indices of the candidates that are kept."""
        views = [
            vars(view)
            | {
                "when": WHEN[view.phase],
                "layers": len(view.steps[0].kept) if view.steps else 0,
                "steps": [
                    vars(step) | {"kept": [np.flatnonzero(x).tolist() for x in _heads(step.kept)]}
                    for step in view.steps
                ],
            }
            for view in self.views
        ]
        memories = [
            {
                "model": memory.model,
                "layers": len(memory.lengths),
                "lengths": _heads(np.sort(memory.lengths)).round(2).tolist(),
                "gates": _heads(memory.gates).round(2).tolist(),
            }
            for memory in self.memories
        ]
        own = {x: getattr(self, x) for x in ("tokens", "prompt", "question", "needles", "gold")}
        return own | {"views": views, "memories": memories}


def _heads(values: np.ndarray) -> np.ndarray:
    """(layers, heads, n) to (layers · heads, n)."""
    return values.reshape(-1, values.shape[-1])
