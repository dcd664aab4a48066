"""What each head keeps of one prompt: a page to hover over, and the same as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm

from ratplus_exp.analysis.frame import LABELS
from ratplus_exp.report.prose import METHODS, render
from ratplus_exp.store import write_atomically

WHEN = {
    "decode": "at each answer token",
    "step": "at each answer token; what is not kept is gone",
    "once": "once, after the prompt; what is not kept is gone",
    "prefill": "for each token of the question; the answer is decoded densely",
}
KEPT, HIT, GOLD, ASKED = "#2f6fb5", "#d9480f", "#f5a623", "#8f7bd6"


@dataclass(frozen=True)
class Step:
    """A selection: of the query at a position, kept (layers, heads, candidates) bool.

    gold: for each answer token that it should serve the positions where that stands.
    """

    label: str
    query: int
    gold: list[list[int]]
    kept: np.ndarray

    def share(self, size: int) -> np.ndarray:
        """Of `gold`, the share that each head holds: (layers, heads), NaN where there is none."""
        if not self.gold:
            return np.full(self.kept.shape[:2], np.nan)
        held = [self.kept[..., np.array(x) // size].any(-1) for x in self.gold]
        return np.mean(held, axis=0)


@dataclass(frozen=True)
class View:
    """One method on one model; size: tokens of a candidate; read: the measured budget."""

    method: str
    phase: str | None
    model: str
    backbone: str
    size: int
    answer: str
    right: bool
    read: float
    steps: list[Step]

    @property
    def name(self) -> str:
        return f"{METHODS.get(self.method, self.method)} · {LABELS[self.backbone]}"

    def hits(self) -> np.ndarray:
        """The mean over steps of the share of golden positions that each head holds."""
        return np.nanmean([step.share(self.size) for step in self.steps], axis=0)

    def tokens(self, length: int) -> np.ndarray:
        """The share of steps in which each head keeps each token: (layers, heads, length)."""
        whole = np.zeros((*self.steps[0].kept.shape[:2], length))
        for step in self.steps:
            kept = step.kept.repeat(self.size, -1)[..., : min(step.query + 1, length)]
            whole[..., : kept.shape[-1]] += kept / len(self.steps)
        return whole


@dataclass(frozen=True)
class Memories:
    """A model's memory on the prompt: effective lengths (layers, heads, channels) in tokens, and
    gates (layers, heads, T), means over the channels."""

    model: str
    lengths: np.ndarray
    gates: np.ndarray


@dataclass(frozen=True)
class Look:
    """A prompt and its right answer as `tokens`, the first `prompt` being the prompt's, whose
    question begins at `question`; needles: [start, end) of each sentence with a gold value."""

    id: str
    budget: str
    tokens: list[str]
    prompt: int
    question: int
    needles: list[tuple[int, int]]
    gold: list[int]
    answers: Sequence[str]
    views: list[View]
    memories: list[Memories]

    @property
    def title(self) -> str:
        return f"What each head keeps of {self.id} at budget {self.budget}"

    def asked(self) -> str:
        return "".join(self.tokens[self.question : self.prompt]).strip()

    def sentences(self) -> list[str]:
        return ["".join(self.tokens[start:end]).strip() for start, end in self.needles]

    def write(self, folder: Path) -> tuple[Path, Path]:
        """look.html, which needs no other file, and look.png."""
        folder.mkdir(parents=True, exist_ok=True)
        page, picture = folder / "look.html", folder / "look.png"
        data = json.dumps(self._data(), ensure_ascii=False, separators=(",", ":"))
        colors = {"KEPT": KEPT, "HIT": HIT, "GOLD": GOLD, "ASKED": ASKED}
        write_atomically(
            page, render("look.html.j2", look=self, data=data.replace("<", "\\u003c"), **colors)
        )
        drawn = BytesIO()
        figure = draw(self)
        figure.savefig(drawn, format="png", dpi=130)
        plt.close(figure)
        write_atomically(picture, drawn.getvalue())
        return page, picture

    def _data(self) -> dict[str, Any]:
        """What the page draws; what a head keeps as candidates' numbers, heads in order."""
        views = [
            {
                **{x: getattr(view, x) for x in ("name", "method", "size", "answer", "right")},
                "when": WHEN.get(view.phase or "", ""),
                "read": round(view.read, 4),
                "layers": len(view.steps[0].kept) if view.steps else 0,
                "steps": [
                    {
                        "label": step.label,
                        "query": step.query,
                        "gold": step.gold,
                        "kept": [np.flatnonzero(x).tolist() for x in np.concatenate(step.kept)],
                    }
                    for step in view.steps
                ],
            }
            for view in self.views
        ]
        memories = [
            {
                "model": memory.model,
                "lengths": [np.sort(x).round(2).tolist() for x in np.concatenate(memory.lengths)],
                "gates": [x.round(3).tolist() for x in np.concatenate(memory.gates)],
                "layers": len(memory.lengths),
            }
            for memory in self.memories
        ]
        own = ("tokens", "prompt", "question", "needles", "gold")
        return {x: getattr(self, x) for x in own} | {"views": views, "memories": memories}


def draw(look: Look) -> Any:
    """A row of maps a method, a column a model; the memory below."""
    models = list(dict.fromkeys(view.model for view in look.views))
    shown = [view for view in look.views if view.steps]
    methods = list(dict.fromkeys(view.method for view in shown))
    heads = max((view.steps[0].kept[..., 0].size for view in shown), default=8)
    count = len(methods) + bool(look.memories)
    size = (7.6 * len(models), 1.6 + count * min(6.0, 1.1 + 0.12 * heads))
    grid: dict[str, Any] = {"squeeze": False, "layout": "constrained", "figsize": size}
    figure, panels = plt.subplots(count, len(models), **grid)
    for view in shown:
        _map(panels[methods.index(view.method)][models.index(view.model)], look, view)
    if look.memories:
        memory = look.memories[0]
        lengths = np.sort(np.concatenate(memory.lengths))
        title = f"{memory.model}: effective memory length"
        _heat(panels[-1][0], lengths, len(memory.lengths), title, "channel, sorted", "tokens", True)
        if memory.gates.size and len(models) > 1:
            gates = np.concatenate(memory.gates)
            title = f"{memory.model}: gate, mean over channels (1: keeps all)"
            _heat(panels[-1][-1], gates, len(memory.gates), title, "token position", "gate", False)
    words = (
        f"The prompt ends “{look.asked()}”; the right answer is {', '.join(look.answers)}, from the "
        f"needle “{' '.join(look.sentences())}”\nBlue: kept (paler: at some of the steps). Red: kept, "
        "and holds a token of the answer. Orange ▼: where the answer stands. Violet: the question. "
        "● at the right of a row: the head holds the answer."
    )
    figure.suptitle(f"{look.title}\n{words}", fontsize=11)
    return figure


def _map(panel: Any, look: Look, view: View) -> None:
    """Which tokens each head keeps, and a dot for its hits."""
    kept, length = view.tokens(len(look.tokens)), len(look.tokens)
    layers, heads = kept.shape[:2]
    golden = np.isin(np.arange(length) // view.size, np.array(look.gold) // view.size)
    ink = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in (KEPT, HIT)])
    share = kept.reshape(-1, length, 1)
    share = np.where(share > 0, 0.25 + 0.75 * share, 0)
    panel.imshow(1 - share * (1 - ink[golden.astype(int)]), aspect="auto", interpolation="nearest")
    panel.axvspan(look.question - 0.5, look.prompt - 0.5, color=ASKED, alpha=0.35, lw=0)
    for token in look.gold:
        panel.plot(token, -1.1, marker="v", color=GOLD, ms=6, clip_on=False)
    hits = view.hits().ravel()
    places = (np.full(len(hits), length * 1.015), np.arange(len(hits)))
    panel.scatter(*places, s=22, color=HIT, alpha=hits, lw=0, clip_on=False)
    panel.scatter(*places, s=22, facecolors="none", edgecolors="#aaaaaa", lw=0.7, clip_on=False)
    panel.set_xlim(-0.5, length - 0.5)
    _rows(panel, layers, heads)
    where = " at every step" if len(view.steps) > 1 else ""
    held = f"{view.name}: {(hits == 1).sum()} of {len(hits)} heads hold the answer{where}"
    panel.set_title(held, loc="left", fontsize=10)
    said = f"answers {view.answer or 'nothing'} {'✓' if view.right else '✗'}"
    panel.set_title(said, loc="right", fontsize=10, color="#2b8a3e" if view.right else HIT)
    panel.set_xlabel("token position", fontsize=9)


def _heat(
    panel: Any, values: np.ndarray, layers: int, title: str, x: str, bar: str, log: bool
) -> None:
    norm = LogNorm() if log else None
    image = panel.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis", norm=norm)
    panel.figure.colorbar(image, ax=panel, label=bar, pad=0.01)
    _rows(panel, layers, len(values) // layers)
    panel.set_title(title, loc="left", fontsize=10)
    panel.set_xlabel(x, fontsize=9)


def _rows(panel: Any, layers: int, heads: int) -> None:
    """A row a head, the layers apart."""
    for layer in range(1, layers):
        panel.axhline(layer * heads - 0.5, color="#999999", lw=0.6)
    panel.set_yticks([i * heads + (heads - 1) / 2 for i in range(layers)], range(layers))
    panel.set_ylabel("layer (a row a head)", fontsize=9)
    panel.tick_params(labelsize=8)
