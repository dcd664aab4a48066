"""The style of all figures: panels side by side, lines and bars with intervals."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from ratplus_exp.analysis.bootstrap import Estimate
from ratplus_exp.store import write_atomically

COLORS = {"Attention": "#8a8a8a", "RAT+": "#c23b22"}


@contextmanager
def drawing(
    path: Path,
    title: str,
    names: Mapping[Any, str],
    ylabel: str,
    xlabel: str = "",
    width: float = 3.2,
    height: float = 3.0,
) -> Iterator[dict[Any, Any]]:
    """Named panels side by side, in inches each, by the keys of their names; written in the end to
    path.png and path.pdf, with the last panel's legend beside the panels."""
    size = (width * len(names), height)
    figure, (panels,) = plt.subplots(
        1, len(names), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for panel, name in zip(panels, names.values(), strict=True):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", alpha=0.25)
        panel.set_axisbelow(True)
        panel.set_ylim(0, 103)
        panel.set_title(name, fontsize=11)
        panel.set_xlabel(xlabel)
    panels[0].set_ylabel(ylabel)
    figure.suptitle(textwrap.fill(title, round(13 * size[0])), fontsize=10)
    yield dict(zip(names, panels, strict=True))
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_figure(figure, path.with_suffix(".png"), path.with_suffix(".pdf"), dpi=160)


def write_figure(figure: Figure, *files: Path, dpi: int) -> None:
    """Write a figure in the formats of the files' suffixes, and close it."""
    for file in files:
        content = BytesIO()
        metadata = {"CreationDate": None} if file.suffix == ".pdf" else {}
        figure.savefig(content, format=file.suffix[1:], dpi=dpi, metadata=metadata)
        write_atomically(file, content.getvalue())
    plt.close(figure)


def draw_line(panel: Any, points: Sequence[Estimate], **style: Any) -> None:
    """The measured points with their intervals."""
    places = [i for i, x in enumerate(points) if np.isfinite(x.value)]
    if places:
        values, errors = _errors([points[i] for i in places])
        panel.errorbar(places, values, errors, marker="o", ms=4, capsize=3, **style)


def draw_bars(panel: Any, labels: Sequence[str], sides: dict[str, list[Estimate]]) -> None:
    """Bars of one or both backbones with their intervals."""
    style = {"capsize": 2, "error_kw": {"ecolor": "#333333", "elinewidth": 1}}
    for shift, (backbone, points) in zip(
        (-0.2, 0.2) if len(sides) > 1 else (0,), sides.items(), strict=True
    ):
        values, errors = _errors(points)
        style |= {"color": COLORS[backbone], "label": backbone}
        panel.bar(np.arange(len(labels)) + shift, values, 0.38, yerr=errors, **style)
    panel.set_xticks(range(len(labels)), labels, fontsize=9)


def _errors(points: Sequence[Estimate]) -> tuple[np.ndarray, np.ndarray]:
    """The values (n,) and the lengths of their error bars (2, n)."""
    values, low, high = np.array([(x.value, x.low, x.high) for x in points]).T
    return values, np.stack((values - low, high - values)).clip(0)
