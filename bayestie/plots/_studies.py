"""Figures of studies with simulated data: calibration of an engine, and the risk of an estimator."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bayestie._errors import NameLookupError
from bayestie.plots._axis import strength_axis
from bayestie.plots._style import (
    ACCENT,
    BAD,
    BAND_90,
    DATA,
    FAINT,
    INK,
    MUTED,
    WIDE,
    house_style,
    new_figure,
    number,
    quiet_grid,
    short,
)

_MOST_POINTS = 6


def plot_calibration(calibration: xr.Dataset, *, width: float = WIDE) -> Figure:
    """Draw the rank curves of `calibrate` less their expectation, with their simultaneous 95% band.

    Args:
        calibration: what ``calibrate`` returned.
        width: of the figure, in inches.

    Returns:
        The figure: a panel per swept point (at most six, spread over the sweep), a line per quantity. All of
        a line stays in the band with probability 95% if the engine is right; one that leaves it is red and
        named. Above 0 at the left and below at the right: posteriors too narrow; the reverse: too wide;
        all on one side: biased.

    Reference: Säilynoja, Bürkner, Vehtari (2022), Statistics and Computing 32, section 2.
    """
    names = [str(d) for d in calibration["p_value"].dims if d != "quantity"]
    points = calibration.stack(point=names) if names else calibration.expand_dims(point=[0])
    count = points.sizes["point"]
    chosen = np.unique(np.linspace(0, count - 1, min(count, _MOST_POINTS)).round().astype(int))
    columns = min(len(chosen), 3 if width >= 5 else 1)
    rows = -(-len(chosen) // columns)
    at = calibration["rank"].values
    lower, upper, expected = (calibration[x].values for x in ("ecdf_lower", "ecdf_upper", "expected"))
    with house_style():
        figure = new_figure(width, 0.4 + 1.9 * rows)
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for axes in grid[len(chosen) :]:
            axes.set_visible(False)
        for axes, i in zip(grid, chosen, strict=False):
            here = points.isel(point=i)
            axes.fill_between(
                at, lower - expected, upper - expected, color=BAND_90, lw=0, step="mid", zorder=1
            )
            axes.axhline(0.0, color=MUTED, lw=0.6, zorder=2)
            for quantity in here["quantity"].values:
                one = here.sel(quantity=quantity)
                curve = one["ecdf"].values - expected
                outside = bool(one["outside"])
                axes.plot(at, curve, color=BAD if outside else ACCENT, lw=1.3 if outside else 0.7, zorder=3)
                if outside:
                    far = int(np.argmax(np.abs(curve)))
                    axes.annotate(short(quantity, 14), (at[far], curve[far]), color=BAD, size=7)
            title = ", ".join(f"{name} = {number(float(here[name]))}" for name in names)
            axes.set_title(title or "all quantities")
            axes.yaxis.set_major_locator(MaxNLocator(4))
            quiet_grid(axes)
        figure.supxlabel("rank of the true value among posterior draws", color=MUTED, size=8)
        figure.supylabel("share below, less expected", color=MUTED, size=8)
        return figure


def plot_risk(found: xr.Dataset, *, along: str | None = None, width: float = WIDE) -> Figure:
    """Draw bias squared, variance and their sum, the risk, against the prior strength.

    Args:
        found: what ``risk`` returned.
        along: the swept keyword on the axis; needed where several were swept, the others standing at their
            least risk.
        width: of the figure, in inches.

    Returns:
        The figure: risk of the posterior mean with its 95% Monte Carlo band, and dashed its two parts; the
        ring marks the strength of least risk.

    Raises:
        NameLookupError: `along` was not swept.
    """
    names = [str(d) for d in found["risk"].dims]
    along = names[0] if along is None and names else along
    if along not in names:
        raise NameLookupError(
            "along=", found=repr(along), expected=f"one of {names}", fix="Name a swept keyword."
        )
    values = found["risk"].values
    where = np.unravel_index(int(np.argmin(values)), values.shape)
    least = {d: int(i) for d, i in zip(names, where, strict=True)}
    held = {d: i for d, i in least.items() if d != along}
    reduced = found.isel(held)
    axis = strength_axis(along, reduced[along].values)
    curves = (
        ("bias_squared", "bias²", DATA, 1.1),
        ("variance", "variance", INK, 1.1),
        ("risk", "risk", ACCENT, 1.8),
    )
    # Named at the end where they are farther apart: at one end the risk is all bias, at the other variance.
    ends = np.stack(
        [np.sort([reduced[name].values[i] for name, *_ in curves]) for i in (axis.order[0], axis.order[-1])]
    )
    left = bool(np.diff(ends).min(1).argmax() == 0)
    at = axis.order[0] if left else axis.order[-1]
    with house_style():
        figure = new_figure(width, 2.8)
        axes = figure.subplots()
        for name, label, colour, wide in curves:
            value, error = reduced[name].values, 1.96 * reduced[f"{name}_error"].values
            axis.band(axes, value - error, value + error, BAND_90 if name == "risk" else FAINT, 4.0)
            axis.curve(axes, value, colour, wide)
            place = (axis.positions[at], value[at])
            axes.annotate(
                label, place, (0, 5) if left else (5, -2), textcoords="offset points", color=colour, size=7.5
            )
        best = least[along]
        value = float(reduced["risk"].values[best])
        axes.plot(axis.positions[best], value, "o", ms=6.5, mfc="none", mec=DATA, mew=1.6, zorder=5)
        axes.set_ylim(bottom=min(0.0, float(reduced["bias_squared"].min())))
        axes.set_title(
            "Risk of the posterior mean"
            + "".join(f", {d} = {number(float(found[d][i]))}" for d, i in held.items())
        )
        quiet_grid(axes)
        axis.dress(axes, room=width - 0.9)
        return figure
