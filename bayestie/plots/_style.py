"""One look for all figures: few colours, thin axes, text that stays text in SVG."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Solid tints, no transparency: the report maps each to its own variable for dark screens.
INK = "#22262b"
MUTED = "#66707c"
FAINT = "#c8ced6"
GRID = "#e7eaee"
ACCENT = "#1b6e8c"
BAND_50 = "#9cc5d3"
BAND_90 = "#d8e9ef"
DATA = "#b4500b"
BAD = "#b3141d"
PAPER = "#ffffff"

WIDE = 7.2
NARROW_BELOW = 5.0

_RC: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.0,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelsize": 8.0,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "figure.facecolor": PAPER,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.size": 2.5,
    "ytick.major.size": 0.0,
    "xtick.major.width": 0.6,
    "xtick.minor.size": 0.0,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    # The same figure gives the same file.
    "svg.hashsalt": "bayestie",
    "text.parse_math": False,
    "text.usetex": False,
}


@contextlib.contextmanager
def house_style() -> Iterator[None]:
    """Draw inside this block in the house style, whatever the user's own settings are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_RC)
        yield


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own: not in pyplot's list, so that nothing leaks and no backend is touched."""
    return Figure(figsize=(width, height), layout="constrained")


def mark_some(axes: Axes, labels: Sequence[str], count: int) -> None:
    """Label `count` places of 0 .. len(labels) - 1 on the x axis, the outer labels kept inside the page."""
    marks = np.unique(np.linspace(0, len(labels) - 1, count).round().astype(int))
    axes.set_xticks(marks, [short(labels[i], 10) for i in marks])
    for label, side in zip(axes.get_xticklabels()[:: len(marks) - 1], ("left", "right"), strict=False):
        label.set_horizontalalignment(side)


def quiet_grid(axes: Axes) -> None:
    """Faint horizontal lines and no vertical spine: values are read across."""
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.spines["left"].set_visible(False)


def short(label: object, length: int = 24) -> str:
    """A label cut to fit, with an ellipsis in the middle: labels often differ only at their end."""
    text = " ".join(str(label).split())
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return text[:head].rstrip() + "…" + text[head + 1 - length :].lstrip()


def number(value: float) -> str:
    """A strength as a reader writes it: 0, 0.1, 4.48, ∞."""
    if value == float("inf"):
        return "∞"
    return f"{value:.3g}"
