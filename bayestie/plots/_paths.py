"""Strength paths: how each copy's posterior moves from one shared value to values of their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bayestie.plots._axis import StrengthAxis, along_strength
from bayestie.plots._copies import value_limits
from bayestie.plots._style import (
    ACCENT,
    BAND_50,
    BAND_90,
    FAINT,
    INK,
    NARROW_BELOW,
    WIDE,
    house_style,
    new_figure,
    quiet_grid,
    short,
)
from bayestie.plots._values import Copies, copies_of

MOST_PANELS = 12
MOST_FAINT = 150
MOST_ELEMENTS = 4
_PANEL = 1.25
_OVERVIEW = 2.7


def plot_strength_paths(
    path: xr.DataTree,
    var_names: str | Sequence[str] | None = None,
    *,
    along: str | None = None,
    width: float = WIDE,
) -> Figure:
    """Draw posterior mean, 50% and 90% intervals of every copy against the prior strength.

    Up to twelve copies get a panel each, the others' means faint behind. More copies share one
    panel, where six are picked out: those whose mean moves farthest between the two ends, in
    posterior sds; these six get panels of their own below.

    Args:
        path: what ``sweep`` returned.
        var_names: posterior variables; the tied sites where None.
        along: the swept keyword on the axis, by default the tie's sigma; other swept keywords are
            held where the evidence is highest.
        width: of the figure, in inches; below 5 it is laid out for a narrow page.

    Returns:
        The figure. Hard (0) and free (inf) sharing stand apart from the log scale, at its ends.

    Raises:
        NameLookupError: no swept dimension, or a name that is not in the tree.
    """
    reduced, axis, remark = along_strength(path, along)
    # Copies come in the order of rising strength, so that first and last mean hard-most and free-most.
    groups = copies_of(reduced, var_names, order=axis.order)[:MOST_ELEMENTS]
    axis = _sorted(axis)
    narrow = width < NARROW_BELOW
    with house_style():
        layout = [_rows_of(group, narrow) for group in groups]
        figure = new_figure(width, sum(sum(heights) for heights, _ in layout) + 0.25 * len(groups) + 0.3)
        heights = [sum(h) for h, _ in layout]
        parts = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
        for part, group, (heights, columns) in zip(parts, groups, layout, strict=True):
            part.set_facecolor("none")
            _draw_group(part, group, axis, heights, columns, width)
            title = group.title + (f"  ({remark})" if remark else "")
            part.suptitle(title, x=0.01, ha="left", fontsize=9, fontweight="bold", color=INK)
        return figure


def highlighted(group: Copies, count: int = 6) -> list[int]:
    """The copies that move farthest along the path, in the order of their labels."""
    return sorted(np.argsort(-group.moved, kind="stable")[:count].tolist())


def _sorted(axis: StrengthAxis) -> StrengthAxis:
    order = list(axis.order)
    return StrengthAxis(
        axis.name, axis.values[order], axis.positions[order], tuple(range(len(order))), axis.is_log
    )


def _rows_of(group: Copies, narrow: bool) -> tuple[list[float], int]:
    """Heights of the rows of panels in inches, the overview first where there is one, and the columns."""
    many = len(group.labels) > MOST_PANELS
    num_panels = 6 if many else len(group.labels)
    # Four in a row where that leaves no more gaps in the last row than three.
    broad = 4 if -num_panels % 4 <= -num_panels % 3 else 3
    columns = min(num_panels, 2 if narrow else (3 if many else broad))
    rows = [_PANEL] * -(-num_panels // columns)
    return ([_OVERVIEW, *rows] if many else rows), columns


def _draw_group(
    figure, group: Copies, axis: StrengthAxis, heights: list[float], columns: int, width: float
) -> None:
    many = len(group.labels) > MOST_PANELS
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    shown = highlighted(group) if many else list(range(len(group.labels)))
    limits = _limits(group, shown)
    if many:
        overview = figure.add_subplot(grid[0, :])
        _draw_overview(overview, group, axis, shown, width)
    first = None
    for place, copy in enumerate(shown):
        row, column = divmod(place, columns)
        axes = figure.add_subplot(grid[row + many, column], sharex=first, sharey=first)
        first = first or axes
        _draw_panel(axes, group, axis, copy, faint=() if many else shown)
        axes.set_title(short(group.labels[copy], 22 if width >= NARROW_BELOW else 20))
        lowest = place + columns >= len(shown)
        axis.dress(axes, room=width / columns - 0.3, labels=lowest)
        axes.tick_params(labelleft=column == 0)
        axes.set_ylim(limits)
        axes.yaxis.set_major_locator(MaxNLocator(4))


def _limits(group: Copies, shown: list[int]) -> tuple[float, float]:
    """All of the bundle but for a few strays, and all of the copies that get a panel."""
    low, high = value_limits([group])
    return min(low, float(group.quantiles[0][:, shown].min())), max(
        high, float(group.quantiles[3][:, shown].max())
    )


def _draw_panel(axes: Axes, group: Copies, axis: StrengthAxis, copy: int, faint: Sequence[int]) -> None:
    low90, low50, high50, high90 = group.quantiles[:, :, copy]
    axis.band(axes, low90, high90, BAND_90, 5.0)
    axis.band(axes, low50, high50, BAND_50, 5.0)
    _faint_lines(axes, group, axis, [k for k in faint if k != copy], zorder=2)
    axis.curve(axes, group.mean[:, copy], ACCENT)
    quiet_grid(axes)


def _draw_overview(axes: Axes, group: Copies, axis: StrengthAxis, shown: list[int], width: float) -> None:
    num_copies = len(group.labels)
    # An even sample over the ranks of the means keeps the shape of the whole bundle.
    ranked = np.argsort(group.mean[-1], kind="stable")
    some = ranked[np.unique(np.linspace(0, num_copies - 1, min(MOST_FAINT, num_copies)).round().astype(int))]
    _faint_lines(axes, group, axis, some.tolist(), zorder=1)
    for copy in shown:
        axis.curve(axes, group.mean[:, copy], ACCENT, width=1.3)
    quiet_grid(axes)
    axis.dress(axes, room=width - 0.6)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    low, high = float(group.mean.min()), float(group.mean.max())
    axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) or 1.0)
    right = axes.get_xlim()[1]
    spots = _spread([float(group.mean[-1, copy]) for copy in shown], 0.075 * (high - low))
    for copy, y in zip(shown, spots, strict=True):
        axes.annotate(
            short(group.labels[copy], 16 if width >= NARROW_BELOW else 11),
            (right, y),
            xytext=(2, 0),
            textcoords="offset points",
            va="center",
            color=ACCENT,
            fontsize=7.5,
            annotation_clip=False,
        )
    drawn = (
        f"{len(some)} of {num_copies} copies drawn faint"
        if len(some) < num_copies
        else f"{num_copies} copies"
    )
    axes.set_title(f"Posterior means, {drawn}")


def _faint_lines(axes: Axes, group: Copies, axis: StrengthAxis, copies: list[int], zorder: float) -> None:
    if copies:
        lines = [np.column_stack([axis.positions, group.mean[:, copy]]) for copy in copies]
        axes.add_collection(LineCollection(lines, colors=FAINT, linewidths=0.6, zorder=zorder), autolim=True)


def _spread(values: list[float], gap: float) -> list[float]:
    """Move labels apart until neighbours are `gap` apart, keeping their order and centre."""
    order = np.argsort(values, kind="stable")
    placed = np.asarray(values, dtype=float)[order]
    for _ in range(100):
        close = np.diff(placed) < gap
        if not close.any():
            break
        push = np.where(close, (gap - np.diff(placed)) / 2 + 1e-9 * gap, 0.0)
        placed[:-1] -= push
        placed[1:] += push
    result = np.empty_like(placed)
    result[order] = placed
    return result.tolist()
