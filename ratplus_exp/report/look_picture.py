"""The picture beside the page of `report.look`."""

from __future__ import annotations

import textwrap
from io import BytesIO
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm, to_rgb

from ratplus_exp.report.prose import paragraphs

if TYPE_CHECKING:
    from ratplus_exp.report.look import Look, View

COLORS = {
    "kept": "#2f6fb5",
    "hit": "#d9480f",
    "gold": "#f5a623",
    "asked": "#8f7bd6",
    "good": "#2b8a3e",
}


def draw(look: Look) -> bytes:
    """A PNG: a row of maps a method, a column a model; the memory of the last model below."""
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
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=130)
    plt.close(figure)
    return drawn.getvalue()


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
    rows = values.reshape(-1, values.shape[-1])
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
