"""What each head keeps of one prompt: a page to hover over, and the same as a picture."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure

from ratplus_exp.report.drawing import write_figure
from ratplus_exp.report.prose import paragraphs, render
from ratplus_exp.store import write_atomically

COLORS = {
    "kept": "#2f6fb5",
    "hit": "#d9480f",
    "gold": "#f5a623",
    "asked": "#8f7bd6",
    "good": "#2b8a3e",
}


@dataclass(frozen=True)
class Step:
    """What the query at a position selects: kept (layers, heads, candidates) bool.

    gold: of each answer token that this query needs, the token's positions in the prompt.
    """

    query: int
    gold: list[list[int]]
    kept: np.ndarray

    def data(self) -> dict[str, Any]:
        """For the page: `kept` as a list of candidates for each row of the map."""
        return vars(self) | {"kept": [np.flatnonzero(x).tolist() for x in _heads(self.kept)]}


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
class MemoryView:
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
    memories: list[MemoryView] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"What each head keeps of {self.id} at budget {self.budget}"

    @property
    def gold(self) -> list[int]:
        return sorted({token for span in self.values for token in range(*span)})

    @property
    def needles(self) -> list[tuple[int, int]]:
        """The sentence around each value."""
        periods = [i for i, x in enumerate(self.tokens, start=1) if x.rstrip().endswith(".")]
        ends = [0, *periods, self.prompt]
        return [
            (max(e for e in ends if e <= start), min(e for e in ends if e >= end))
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
        write_figure(_picture(self), picture, dpi=130)
        return page, picture

    def _data(self) -> dict[str, Any]:
        """The page's data, a row a head."""
        names = ("tokens", "prompt", "question", "needles", "gold")
        views = [
            vars(view)
            | {"layers": len(view.steps[0].kept) if view.steps else 0}
            | {"steps": [step.data() for step in view.steps]}
            for view in self.views
        ]
        memories = [
            {"model": x.model, "layers": len(x.lengths)}
            | {"lengths": _heads(np.sort(x.lengths)).round(2).tolist()}
            | {"gates": _heads(x.gates).round(2).tolist()}
            for x in self.memories
        ]
        return {x: getattr(self, x) for x in names} | {"views": views, "memories": memories}


def _heads(values: np.ndarray) -> np.ndarray:
    """(layers, heads, n) to (layers · heads, n)."""
    return values.reshape(-1, values.shape[-1])


def _picture(look: Look) -> Figure:
    """A row of maps a method, a column a model; the memory of the last model below."""
    shown = [view for view in look.views if view.steps]
    models = list(dict.fromkeys(view.model for view in look.views))
    methods = list(dict.fromkeys(view.method for view in shown))
    heads = max((view.steps[0].kept[..., 0].size for view in shown), default=8)
    count = len(methods) + bool(look.memories)
    rows, columns = max(1, count), max(2, len(models))
    size = (7.6 * columns, 1.2 + rows * min(6.0, 1.1 + 0.12 * heads))
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for panel in panels.flat:
        panel.axis("off")
    for view in shown:
        _map(panels[methods.index(view.method)][models.index(view.model)], look, view)
    for memory in look.memories[-1:]:
        label = f"{memory.model}: effective memory length, channels sorted"
        norm = LogNorm(1, max(memory.lengths.max(), 2))
        _heat(panels[-1][0], np.sort(memory.lengths), label, "channel", "tokens", norm)
        if memory.gates.size:
            label = f"{memory.model}: gate, mean over channels (1 keeps all)"
            _heat(panels[-1][1], memory.gates, label, "token position", "gate", None)
    lines = (textwrap.fill(line, 150) for line in paragraphs("look", look))
    figure.suptitle("\n".join(lines), fontsize=11)
    return figure


def _map(panel: Any, look: Look, view: View) -> None:
    """Which tokens each head keeps, and a dot for its hits."""
    length = len(look.tokens)
    kept, hits = view.tokens(length), view.hits().ravel()
    golden = np.isin(np.arange(length) // view.size, np.array(look.gold) // view.size)
    ink = np.array([to_rgb(COLORS["hit"] if x else COLORS["kept"]) for x in golden])
    share = np.where(kept > 0, 0.25 + 0.75 * kept, 0).reshape(-1, length, 1)
    panel.imshow(1 - share * (1 - ink), aspect="auto", interpolation="nearest")
    panel.axvspan(look.question - 0.5, look.prompt - 0.5, color=COLORS["asked"], alpha=0.35, lw=0)
    panel.scatter(look.gold, [-1.1] * len(look.gold), marker="v", color=COLORS["gold"], s=36)
    dots: dict[str, Any] = {"x": [length * 1.015] * len(hits), "y": range(len(hits)), "s": 22}
    panel.scatter(**dots, color=COLORS["hit"], alpha=hits, lw=0, clip_on=False)
    panel.scatter(**dots, facecolors="none", edgecolors="#aaaaaa", lw=0.7, clip_on=False)
    panel.set_xlim(-0.5, length - 0.5)
    always = "always " if len(view.steps) > 1 else ""
    held = f"{(hits > 0.999).sum()} of {len(hits)} heads {always}hold the answer"
    # The answer stands below, since it may be as long as the panel is wide.
    _axes(panel, kept.shape, f"{view.method} · {view.model}: {held}\n", "token position")
    answer = f"answer: {view.answer or 'none'} {'✓' if view.right else '✗'}"
    color = COLORS["good" if view.right else "hit"]
    above = {"xy": (0, 1), "xytext": (0, 5), "textcoords": "offset points"}
    panel.annotate(answer, xycoords="axes fraction", fontsize=9, color=color, **above)


def _heat(panel: Any, values: np.ndarray, title: str, label: str, bar: str, norm: Any) -> None:
    """values (layers, heads, n)."""
    rows = _heads(values)
    image = panel.imshow(rows, aspect="auto", interpolation="nearest", cmap="viridis", norm=norm)
    panel.figure.colorbar(image, ax=panel, label=bar, pad=0.01)
    _axes(panel, values.shape, title, label)


def _axes(panel: Any, shape: tuple[int, ...], title: str, label: str) -> None:
    """A row a head, the layers apart; shape (layers, heads, n)."""
    layers, heads, _ = shape
    panel.axis("on")
    for layer in range(1, layers):
        panel.axhline(layer * heads - 0.5, color="#999999", lw=0.6)
    panel.set_yticks([i * heads + (heads - 1) / 2 for i in range(layers)], range(layers))
    panel.set_ylabel("layer (a row a head)", fontsize=9)
    panel.set_xlabel(label, fontsize=9)
    panel.set_title(title, loc="left", fontsize=10)
    panel.tick_params(labelsize=8)
