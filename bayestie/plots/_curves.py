"""What the data say of each strength: evidence, predictive score and effective number of parameters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bayestie._errors import NameLookupError
from bayestie._evidence import evidence
from bayestie._pooling import pooling
from bayestie._psis import good_k
from bayestie._results import tie_records
from bayestie.plots._axis import StrengthAxis, along_strength, best_index
from bayestie.plots._style import (
    ACCENT,
    BAD,
    BAND_90,
    DATA,
    MUTED,
    NARROW_BELOW,
    PAPER,
    WIDE,
    house_style,
    new_figure,
    quiet_grid,
)

# A strength this many nats or score units below the best is out for certain: the axis ends there,
# so that the range in question stays readable, and what lies below is marked at its edge.
DEEPEST = 25.0


@dataclass(frozen=True)
class Score:
    """One judgement of every strength; `best` is the highest, as far as Monte Carlo errors can tell."""

    title: str
    values: Float[np.ndarray, " points"]
    spread: Float[np.ndarray, " points"]
    trusted: Bool[np.ndarray, " points"]
    best: int


def scores_of(path: xr.DataTree) -> list[Score]:
    """Log evidence with 95% Monte Carlo intervals and LOO elpd with one standard error."""
    sweep, estimates = path["sweep"].to_dataset(), evidence(path)
    certified = sweep["certified"].values.astype(bool)
    error = estimates["combined_error"].values
    trusted = certified & ~estimates["disagreement"].values.astype(bool) & np.isfinite(error)
    # In rising order, so that of strengths that are as good as each other the strongest sharing counts.
    values, spread = estimates["combined"].values, 1.96 * np.nan_to_num(error)
    order = np.argsort(sweep[estimates["combined"].dims[0]].values, kind="stable")
    where = int(order[best_index(values[order], spread[order])])
    found = [Score("Log evidence", values, spread, trusted, where)]
    if "elpd" in sweep and np.isfinite(sweep["elpd"].values).any():
        trusted = certified & _good_pareto_k(path)
        values = sweep["elpd"].values
        where = int(np.argmax(np.where(np.isfinite(values), values, -np.inf)))
        found.append(Score("Predictive score (LOO elpd)", values, sweep["elpd_se"].values, trusted, where))
    return found


def plot_evidence(path: xr.DataTree, *, along: str | None = None, width: float = WIDE) -> Figure:
    """Draw log evidence and LOO score of every strength, as differences from the best, with errors.

    Args:
        path: what ``sweep`` returned.
        along: the swept keyword on the axis, as in ``plot_strength_paths``.
        width: of the figure, in inches.

    Returns:
        The figure: above, log evidence (``evidence``, combined) with 95% Monte Carlo intervals; below,
        PSIS-LOO elpd, where stored, with one standard error over observations. Three nats less
        evidence are odds of 1 to 20. The standard errors of elpd are largely shared between strengths,
        so that differences are surer than the bars suggest. A red cross marks a number that must not
        be trusted.

    Raises:
        NameLookupError: no swept dimension, or a keyword that was not swept.
    """
    reduced, axis, remark = along_strength(path, along)
    panels = scores_of(reduced)
    with house_style():
        figure = new_figure(width, 0.25 + 1.75 * len(panels))
        for axes, score in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            _draw_score(axes, axis, score)
            lowest = score is panels[-1]
            axes.set_title(
                f"{score.title}, below the best" + (f"  ({remark})" if remark and not lowest else "")
            )
            axis.dress(axes, room=width - 0.6, labels=lowest)
        return figure


@dataclass(frozen=True)
class Pooled:
    """Effective number of parameters at every strength; `most` is what it can reach, where known."""

    title: str
    values: Float[np.ndarray, " points"]
    spread: Float[np.ndarray, " points"]
    most: float | None
    trusted: Bool[np.ndarray, " points"]


def pooled_of(path: xr.DataTree) -> list[Pooled]:
    """`pooling` of each tied site with 95% Monte Carlo intervals, else the model's p_loo, if stored."""
    sweep = path["sweep"].to_dataset()
    certified = np.atleast_1d(sweep["certified"].values).astype(bool)
    found = []
    for name, record in tie_records(path).items():
        if name not in path["posterior"] or f"{name}_z" not in path["posterior"]:
            continue
        pooled = pooling(path)[name].to_dataset()
        # A fit counts as one point.
        values = np.atleast_1d(pooled["p_eff"].values)
        spread = 1.96 * np.atleast_1d(pooled["p_eff_error"].values)
        title = f"Effective number of parameters of {name} ({record['num_copies']} copies)"
        found.append(Pooled(title, values, spread, float(pooled["p_eff_max"]), certified))
    if not found and "p_loo" in sweep and np.isfinite(sweep["p_loo"].values).any():
        trusted = certified & _good_pareto_k(path)
        values = np.atleast_1d(sweep["p_loo"].values)
        title = "Effective number of parameters of the model (p_loo)"
        found.append(Pooled(title, values, np.zeros_like(values), None, trusted))
    return found


def plot_pooling(path: xr.DataTree, *, along: str | None = None, width: float = WIDE) -> Figure:
    """Draw the effective number of parameters against the prior strength.

    Args:
        path: what ``sweep`` returned.
        along: the swept keyword on the axis, as in ``plot_strength_paths``.
        width: of the figure, in inches.

    Returns:
        The figure: a panel per tied site with ``pooling``'s p_eff, its 95% Monte Carlo interval and, dashed,
        the most it can be; without tied sites, PSIS-LOO's p_loo of the whole model.

    Raises:
        NameLookupError: no swept dimension, a keyword that was not swept, or nothing stored to count with.
    """
    reduced, axis, remark = along_strength(path, along)
    panels = pooled_of(reduced)
    if not panels:
        raise NameLookupError(
            "path",
            found="neither the coefficients of a tied site nor p_loo",
            expected="one of them",
            fix="See keep= of sweep.",
        )
    with house_style():
        figure = new_figure(width, 0.2 + 1.9 * len(panels))
        for axes, pooled in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            axis.band(axes, pooled.values - pooled.spread, pooled.values + pooled.spread, BAND_90, 5.0)
            axis.curve(axes, pooled.values, ACCENT)
            _mark(axes, axis, pooled.values, pooled.trusted)
            quiet_grid(axes)
            top = float(np.nanmax(pooled.values + pooled.spread))
            if pooled.most is not None and pooled.most < 3 * top:
                axes.axhline(pooled.most, color=MUTED, lw=0.8, ls=(0, (4, 3)))
                top = max(top, pooled.most)
            axes.set_ylim(0, 1.08 * max(top, 0.5))
            axes.yaxis.set_major_locator(MaxNLocator(5))
            lowest = pooled is panels[-1]
            title = (
                pooled.title
                if width >= NARROW_BELOW
                else pooled.title.replace("number of parameters", "number")
            )
            axes.set_title(title + (f"  ({remark})" if remark else ""))
            axis.dress(axes, room=width - 0.6, labels=lowest)
        return figure


def _good_pareto_k(path: xr.DataTree) -> Bool[np.ndarray, " points"]:
    num_draws = path["posterior"].sizes["chain"] * path["posterior"].sizes["draw"]
    worst = np.atleast_1d(path["sweep"].to_dataset()["max_pareto_k"].values)
    return worst <= good_k(max(num_draws, 10))


def _draw_score(axes: Axes, axis: StrengthAxis, score: Score) -> None:
    values, spread = score.values, score.spread
    best = score.best
    below = np.where(np.isfinite(values), values - values[best], -1e3 * DEEPEST)
    axis.band(axes, below - spread, below + spread, BAND_90, 5.0)
    axis.curve(axes, below, ACCENT)
    inside = below >= -DEEPEST
    axes.plot(axis.positions[inside], below[inside], "o", color=ACCENT, ms=2.6, mew=0, zorder=4)
    axes.plot(axis.positions[best], below[best], "o", ms=6.5, mfc=PAPER, mec=DATA, mew=1.6, zorder=5)
    drawn = np.maximum(below, -DEEPEST)
    axes.plot(axis.positions[~inside], drawn[~inside], "v", color=MUTED, ms=4, mew=0, zorder=4)
    _mark(axes, axis, drawn, score.trusted)
    quiet_grid(axes)
    low = max(float(np.min(below - spread)), -1.04 * DEEPEST)
    high = float(np.max((below + spread)[inside]))
    room = 0.08 * (high - low) or 1.0
    axes.set_ylim(low - (room if low > -DEEPEST else 0.0), high + room)
    axes.yaxis.set_major_locator(MaxNLocator(4))


def _mark(axes: Axes, axis: StrengthAxis, values: np.ndarray, trusted: np.ndarray) -> None:
    axes.plot(axis.positions[~trusted], values[~trusted], "x", color=BAD, ms=5.5, mew=1.5, zorder=6)
