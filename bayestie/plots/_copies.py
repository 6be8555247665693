"""The copies at one strength: a forest of intervals, or a ribbon where there are too many rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bayestie._errors import NameLookupError
from bayestie._results import swept_names
from bayestie.plots._style import (
    ACCENT,
    BAND_50,
    BAND_90,
    GRID,
    WIDE,
    house_style,
    mark_some,
    new_figure,
    quiet_grid,
    short,
)
from bayestie.plots._values import Copies, copies_of

MOST_ROWS = 40
_MOST_ELEMENTS = 4


def plot_copies(
    tree: xr.DataTree,
    var_names: str | Sequence[str] | None = None,
    *,
    width: float = WIDE,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Draw every copy's posterior at one strength: dot for the mean, bars for 50% and 90%.

    Args:
        tree: what ``fit`` or ``select`` returned, without swept dimensions.
        var_names: posterior variables; the tied sites where None.
        width: of the figure, in inches; the height follows from the number of copies.
        limits: ends of the value axis, to compare figures of several strengths.

    Returns:
        The figure. Up to 40 copies stand in rows with their labels; more become a ribbon, in the
        order of a chain or ring, otherwise sorted by mean.

    Raises:
        NameLookupError: the tree still has a swept dimension, or a variable is not in it.
    """
    if names := swept_names(tree):
        raise NameLookupError(
            "tree",
            found=f"a sweep over {names}",
            expected="one strength",
            fix="Take one with select(path, ...).",
        )
    groups = copies_of(tree, var_names)[:_MOST_ELEMENTS]
    heights = [0.42 + (0.165 * len(g.labels) if len(g.labels) <= MOST_ROWS else 1.9) for g in groups]
    with house_style():
        figure = new_figure(width, sum(heights) + 0.1)
        panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, group in zip(panels, groups, strict=True):
            if len(group.labels) <= MOST_ROWS:
                _forest(axes, group, limits)
            else:
                _ribbon(axes, group, limits)
            if len(groups) > 1 or not group.title:
                axes.set_title(group.title)
        return figure


def value_limits(groups: Sequence[Copies]) -> tuple[float, float]:
    """Ends of a value axis that holds the 90% intervals at every strength.

    Where copies are many, a few in a hundred may run off so that one wild copy does not flatten the rest.
    """
    tail = 0.0 if all(len(g.labels) <= MOST_ROWS for g in groups) else 0.01
    low = min(float(np.quantile(g.quantiles[0].min(0), tail)) for g in groups)
    high = max(float(np.quantile(g.quantiles[3].max(0), 1 - tail)) for g in groups)
    room = 0.04 * (high - low) or 1.0
    return low - room, high + room


def _forest(axes: Axes, group: Copies, limits: tuple[float, float] | None) -> None:
    rows = np.arange(len(group.labels))
    low90, low50, high50, high90 = group.quantiles[:, 0]
    axes.hlines(rows, low90, high90, color=BAND_90, lw=3.2, capstyle="round")
    axes.hlines(rows, low50, high50, color=BAND_50, lw=3.2, capstyle="round")
    axes.plot(group.mean[0], rows, "o", color=ACCENT, ms=3.2, mew=0)
    axes.set_yticks(rows, [short(label) for label in group.labels])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(group.title)
    if limits:
        axes.set_xlim(limits)


def _ribbon(axes: Axes, group: Copies, limits: tuple[float, float] | None) -> None:
    order = np.arange(len(group.labels)) if group.ordered else np.argsort(group.mean[0], kind="stable")
    x = np.arange(len(order))
    low90, low50, high50, high90 = (q[0][order] for q in group.quantiles)
    axes.fill_between(x, low90, high90, color=BAND_90, lw=0)
    axes.fill_between(x, low50, high50, color=BAND_50, lw=0)
    axes.plot(x, group.mean[0][order], color=ACCENT, lw=1.2)
    quiet_grid(axes)
    axes.set_xlim(0, len(order) - 1)
    mark_some(axes, [group.labels[i] for i in order], 5 if group.ordered else 3)
    axes.set_xlabel("copies in order" if group.ordered else "copies, sorted by mean")
    axes.set_ylabel(group.title)
    if limits:
        axes.set_ylim(limits)
