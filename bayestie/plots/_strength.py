"""What the data say of the strength itself: its posterior, and how hard against soft moves with the prior."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from bayestie._errors import CoverageError
from bayestie._path import swept_values
from bayestie._results import tie_records
from bayestie._strength import hard_vs_soft, strength_posterior
from bayestie._verdict import default_prior
from bayestie.plots._axis import along_strength
from bayestie.plots._style import (
    ACCENT,
    BAND_90,
    DATA,
    GRID,
    MUTED,
    WIDE,
    house_style,
    new_figure,
    number,
    quiet_grid,
)

_LINES = ("-", (0, (5, 2)), (0, (2, 1.5)), (0, (6, 1.5, 1, 1.5)))


def plot_strength(
    path: xr.DataTree, *, prior: Any = None, along: str | None = None, width: float = WIDE
) -> Figure:
    """Draw the posterior of a strength, and the Bayes factor of hard sharing against the prior's median.

    Args:
        path: what ``sweep`` returned.
        prior: of the strength, as in ``strength_posterior``; left out, half-Cauchy with its median at the
            geometric middle of the strengths swept.
        along: the swept strength, as in ``plot_strength_paths``.
        width: of the figure, in inches.

    Returns:
        The figure: left, density of log strength under the posterior (filled) and the prior (line), with
        the central 95% marked below; right, log Bayes factor of sigma = 0 against soft sharing for four
        families of priors of the strength, against their median (above 0 the data favour hard sharing).

    Raises:
        CoverageError: too few strengths between 0 and inf, or hard sharing neither swept nor near.
        NameLookupError: the keyword was not swept, or is no tie's strength.
    """
    reduced, axis, remark = along_strength(path, along)
    factors = _factors(reduced, axis.name, prior)
    with house_style():
        narrow = width < 5.0
        figure = new_figure(width, 4.4 if narrow else 2.3)
        left, right = figure.subplots(2 if narrow else 1, 1 if narrow else 2)
        _draw_posterior(left, factors.posterior, axis.name)
        left.set_title("Posterior of the strength" + (f"  ({remark})" if remark else ""))
        _draw_factor(right, factors.factor, axis.name)
        right.set_title("Hard against soft sharing")
        return figure


@dataclass(frozen=True)
class Factors:
    """What the figure shows: `strength_posterior` and `hard_vs_soft` under one prior."""

    posterior: xr.Dataset
    factor: xr.Dataset


def factors_of(tree: xr.DataTree, prior: Any = None) -> Factors | None:
    """The numbers of `plot_strength`, or None where the sweep does not hold them."""
    reduced, axis, _ = along_strength(tree, None)
    swept_ties = [record.get("sigma_from") for record in tie_records(reduced).values()]
    if axis.name not in swept_ties or not axis.inner.any():
        return None
    try:
        return _factors(reduced, axis.name, prior)
    except CoverageError:
        return None


def _factors(reduced: xr.DataTree, name: str, prior: Any) -> Factors:
    if isinstance(prior, Mapping):
        prior = prior.get(name)
    prior = default_prior(swept_values(reduced, name)) if prior is None else prior
    return Factors(strength_posterior(reduced, prior, name=name), hard_vs_soft(reduced, prior, name=name))


def _draw_posterior(axes: Axes, posterior: xr.Dataset, name: str) -> None:
    sigma = posterior[name].values
    density, prior = posterior["density"].values * sigma, posterior["prior_density"].values * sigma
    # What is left of the axis holds next to nothing of either.
    weight = np.gradient(np.log(sigma)) * density
    reach = np.cumsum(weight) / max(weight.sum(), 1e-300)
    inside = (reach > 1e-4) & (reach < 1 - 1e-4)
    low, high = sigma[inside].min() / 2, sigma[inside].max() * 2
    keep = (sigma >= low) & (sigma <= high)
    x = np.log10(sigma[keep])
    axes.fill_between(x, density[keep], color=BAND_90, lw=0, zorder=1)
    axes.plot(x, density[keep], color=ACCENT, lw=1.5, zorder=3)
    axes.plot(x, prior[keep], color=MUTED, lw=1.0, ls=(0, (4, 3)), zorder=2)
    peak = int(np.argmax(density[keep]))
    axes.annotate(
        "posterior",
        (x[peak], density[keep][peak]),
        (4, 2),
        textcoords="offset points",
        color=ACCENT,
        size=7.5,
    )
    axes.annotate("prior", (x[0], prior[keep][0]), (2, 3), textcoords="offset points", color=MUTED, size=7.5)
    ends = np.log10([float(posterior["quantiles"].sel(quantile=q)) for q in (0.025, 0.975)])
    axes.plot(ends, [0, 0], color=DATA, lw=3.0, zorder=4, clip_on=False, solid_capstyle="butt")
    axes.set_ylim(0, 1.18 * float(density[keep].max()))
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    _log_ticks(axes, low, high)
    axes.set_xlabel(name)


def _draw_factor(axes: Axes, factor: xr.Dataset, name: str) -> None:
    medians = factor["prior_median"].values
    table = factor["sensitivity"].values
    for three_to_one in (-np.log(3.0), np.log(3.0)):
        axes.axhline(three_to_one, color=MUTED, lw=0.7, ls=(0, (2, 2)), zorder=1)
    axes.axhline(0.0, color=MUTED, lw=0.8, zorder=1)
    for kind, row, style in zip(factor["kind"].values, table, _LINES, strict=False):
        label = str(kind).replace("_", "-")
        axes.plot(np.log10(medians), row, color=ACCENT, lw=1.2, ls=style, label=label, zorder=3)
    axes.plot(
        [np.log10(medians[len(medians) // 2])],
        [float(factor["log_bayes_factor"])],
        "o",
        color=DATA,
        ms=5,
        mew=0,
        zorder=4,
    )
    low, high = min(float(table.min()), -1.3), max(float(table.max()), 1.3)
    room = 0.12 * (high - low)
    axes.set_ylim(low - room, high + room)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    quiet_grid(axes)
    axes.grid(axis="y", color=GRID, linewidth=0.4)
    axes.legend(loc="best", handlelength=2.6)
    _log_ticks(axes, float(medians.min()), float(medians.max()))
    axes.set_xlabel(f"median of the prior of {name}")
    axes.set_ylabel("log Bayes factor for hard")


def _log_ticks(axes: Axes, low: float, high: float) -> None:
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for steps in ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0,)):
        marks = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
        if len(marks) <= 6:
            break
    marks = marks or [low, high]
    axes.xaxis.set_major_locator(FixedLocator([float(np.log10(x)) for x in marks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([number(x) for x in marks])
