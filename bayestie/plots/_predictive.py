"""Draws of new data from the posterior against the data that were seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bayestie._errors import NameLookupError
from bayestie._results import SAMPLE_DIMS, select, swept_names, tie_records
from bayestie.plots._axis import along_strength
from bayestie.plots._style import (
    ACCENT,
    BAND_50,
    BAND_90,
    DATA,
    GRID,
    NARROW_BELOW,
    WIDE,
    house_style,
    mark_some,
    new_figure,
    number,
    quiet_grid,
    short,
)

_MOST_ROWS = 40
_MOST_POINTS = 400
_MOST_PANELS = 6
_MOST_SITES = 3
_NUM_BINS = 10


@dataclass(frozen=True)
class Check:
    """Observed values and replicated ones, reduced to what one panel can show."""

    title: str
    labels: tuple[str, ...]
    order: np.ndarray
    observed: Float[np.ndarray, " items"]
    replicated: Float[np.ndarray, "draws items"]
    xlabel: str


def plot_predictive(
    path: xr.DataTree, *, sigma: float | None = None, along: str | None = None, width: float = WIDE
) -> Figure:
    """Draw the observed data over 50% and 90% intervals of data replicated from the posterior.

    Up to 40 observations stand in rows. More are averaged over the groups of the tie where the model
    has them (a dimension of the copies, or an index of the copy per observation), stand in a row of
    their own while there are few enough, and otherwise are binned by predicted value.

    Args:
        path: what ``fit``, ``sweep`` or ``select`` returned.
        sigma: one value of the swept keyword; up to six across the sweep where None.
        along: the swept keyword, as in ``plot_strength_paths``.
        width: of the figure, in inches.

    Returns:
        The figure. About nine in ten of the observed points should lie within the pale bars.

    Raises:
        NameLookupError: the tree holds no posterior_predictive group, or no such strength.
    """
    for group in ("posterior_predictive", "observed_data"):
        if group not in path.children:
            raise NameLookupError(
                "path",
                found=f"no group {group}",
                expected="replicated and observed data",
                fix="See keep= of sweep.",
            )
    if swept_names(path):
        reduced, axis, _ = along_strength(path, along)
        if sigma is None:
            spread = np.unique(np.linspace(0, len(axis.order) - 1, _MOST_PANELS).round().astype(int))
            chosen = [float(axis.values[axis.order[i]]) for i in spread]
        else:
            chosen = [sigma]
        trees = {f"{axis.name} = {number(value)}": select(reduced, **{axis.name: value}) for value in chosen}
    else:
        trees = {"": path}
    return draw_checks([(title, check) for title, tree in trees.items() for check in checks_of(tree)], width)


def draw_checks(
    panels: list[tuple[str, Check]], width: float, limits: tuple[float, float] | None = None
) -> Figure:
    """A panel per check under its title; `limits` fixes the axis of values."""
    columns = min(len(panels), max(1, int(width / 2.3)))
    rows = -(-len(panels) // columns)
    height = max(_height(check, width) for _, check in panels)
    with house_style():
        figure = new_figure(width, rows * height)
        grid = figure.subplots(
            rows, columns, squeeze=False, sharey=_can_share(panels), sharex=_can_share(panels)
        )
        for axes, (title, check) in zip(grid.ravel(), panels, strict=False):
            _draw(axes, check, limits)
            axes.set_title(", ".join(part for part in (title, check.title) if part))
        for axes in grid.ravel()[len(panels) :]:
            axes.remove()
        return figure


def check_limits(checks: Sequence[Check]) -> tuple[float, float]:
    """Ends of a value axis that holds the observed values and 90% intervals of all checks."""
    ends = [np.quantile(check.replicated, (0.05, 0.95), axis=0) for check in checks]
    low = min(float(min(low.min(), c.observed.min())) for (low, _), c in zip(ends, checks, strict=True))
    high = max(float(max(high.max(), c.observed.max())) for (_, high), c in zip(ends, checks, strict=True))
    room = 0.04 * (high - low) or 1.0
    return low - room, high + room


def checks_of(tree: xr.DataTree) -> list[Check]:
    """One check per observed site of a tree at one strength."""
    replicated, observed = tree["posterior_predictive"].to_dataset(), tree["observed_data"].to_dataset()
    sites = [str(name) for name in observed.data_vars if name in replicated][:_MOST_SITES]
    return [_check(tree, site, replicated[site], observed[site], named=len(sites) > 1) for site in sites]


def _check(
    tree: xr.DataTree, site: str, replicated: xr.DataArray, observed: xr.DataArray, named: bool
) -> Check:
    title = site if named else ""
    dims = list(observed.dims)
    draws = replicated.transpose(*SAMPLE_DIMS, *dims).values.astype(float)
    draws = draws.reshape(draws.shape[0] * draws.shape[1], -1)
    seen = observed.values.astype(float).ravel()
    labels, xlabel, ordered = _labels(observed), site, _is_ordered(observed)
    if seen.size > _MOST_ROWS and (grouping := _groups(tree, observed)) is not None:
        codes, labels, what = grouping
        seen, draws, xlabel, ordered = (
            _means(seen, codes),
            _means(draws, codes),
            f"mean of {site} by {what}",
            False,
        )
    elif seen.size > _MOST_POINTS:
        codes = _bins(draws.mean(0))
        labels = tuple(f"{value:.3g}" for value in _means(draws.mean(0), codes))
        seen, draws, xlabel = _means(seen, codes), _means(draws, codes), f"mean of {site} by predicted value"
    if ordered or seen.size <= _MOST_ROWS:
        order = np.arange(seen.size)
    else:
        order = np.argsort(np.median(draws, axis=0), kind="stable")
    return Check(title, labels, order, seen, draws, xlabel)


def _groups(tree: xr.DataTree, observed: xr.DataArray) -> tuple[np.ndarray, tuple[str, ...], str] | None:
    """Which copy each observation belongs to, where the model says so, with the copies' labels."""
    for record in tie_records(tree).values():
        if len(record["copy_dims"]) != 1 or record["kind"] in ("chain", "ring"):
            continue
        (dim,) = record["copy_dims"]
        num_copies = record["num_copies"]
        posterior = tree["posterior"].to_dataset()
        copy_labels = tuple(str(x) for x in posterior[dim].values) if dim in posterior else ()
        if dim in observed.dims and observed.ndim > 1:
            shape = [observed.sizes[d] if d == dim else 1 for d in observed.dims]
            codes = np.broadcast_to(np.arange(num_copies).reshape(shape), observed.shape).ravel()
            return codes, copy_labels, dim
        for name, index in (
            tree["constant_data"].data_vars.items() if "constant_data" in tree.children else ()
        ):
            fits = index.shape == observed.shape and index.dtype.kind in "iu" and index.size > num_copies
            if fits and copy_labels and set(np.unique(index)) == set(range(num_copies)):
                return index.values.ravel(), copy_labels, str(name)
    return None


def _means(values: np.ndarray, codes: np.ndarray) -> np.ndarray:
    weights = np.eye(int(codes.max()) + 1)[codes]
    return values @ (weights / weights.sum(0))


def _bins(predicted: np.ndarray) -> np.ndarray:
    """Ten bins with about as many observations each, fewer where predictions repeat."""
    edges = np.unique(np.quantile(predicted, np.linspace(0, 1, _NUM_BINS + 1)[1:-1]))
    return np.unique(np.searchsorted(edges, predicted, side="right"), return_inverse=True)[1]


def _labels(observed: xr.DataArray) -> tuple[str, ...]:
    if not observed.dims:
        return (str(observed.name),)
    grids = np.meshgrid(*[observed[dim].values.astype(str) for dim in observed.dims], indexing="ij")
    return tuple(", ".join(parts) for parts in zip(*(grid.ravel().tolist() for grid in grids), strict=True))


def _is_ordered(observed: xr.DataArray) -> bool:
    """Whether the only dimension counts something, such as years: then its order is the reader's."""
    if observed.ndim != 1:
        return False
    values = observed[observed.dims[0]].values
    if values.dtype.kind not in "iufM" or len(values) < 2:
        return False
    numbered = np.array_equal(values, np.arange(len(values)))
    return not numbered and bool((values[1:] > values[:-1]).all())


def _can_share(panels: list[tuple[str, Check]]) -> bool:
    return (
        len({check.title for _, check in panels}) == 1
        and len({len(check.labels) for _, check in panels}) == 1
    )


def _height(check: Check, width: float) -> float:
    num_items = len(check.labels)
    return 0.5 + 0.15 * num_items if num_items <= _MOST_ROWS and width < NARROW_BELOW else 2.3


def _draw(axes: Axes, check: Check, limits: tuple[float, float] | None) -> None:
    low90, low50, high50, high90 = np.quantile(
        check.replicated[:, check.order], (0.05, 0.25, 0.75, 0.95), axis=0
    )
    observed = check.observed[check.order]
    labels = [check.labels[i] for i in check.order]
    places = np.arange(len(labels))
    if len(labels) <= _MOST_ROWS:
        axes.hlines(places, low90, high90, color=BAND_90, lw=3.2, capstyle="round")
        axes.hlines(places, low50, high50, color=BAND_50, lw=3.2, capstyle="round")
        axes.plot(observed, places, "D", color=DATA, ms=2.8, mew=0)
        axes.set_yticks(places, [short(label, 18) for label in labels])
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.grid(axis="x", color=GRID, linewidth=0.6)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(check.xlabel)
        axes.set_xlim(limits)
        return
    axes.fill_between(places, low90, high90, color=BAND_90, lw=0, step="mid")
    axes.fill_between(places, low50, high50, color=BAND_50, lw=0, step="mid")
    axes.plot(places, np.median(check.replicated[:, check.order], axis=0), color=ACCENT, lw=0.8)
    axes.plot(places, observed, "o", color=DATA, ms=2.0, mew=0)
    quiet_grid(axes)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    mark_some(axes, labels, 3)
    axes.set_ylabel(check.xlabel)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylim(limits)
