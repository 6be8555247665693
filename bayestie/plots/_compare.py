"""Which strengths predict as well as the best: paired differences and stacking weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bayestie._errors import NameLookupError
from bayestie._predict import compare, stored_comparison
from bayestie.plots._axis import along_strength
from bayestie.plots._style import ACCENT, BAD, BAND_90, DATA, MUTED, WIDE, house_style, new_figure, quiet_grid

# Differences of elpd below this decide nothing (Sivula et al. 2025).
SMALL = 4.0


@dataclass(frozen=True)
class Comparison:
    """Every strength, in rising order, against the one that predicts best."""

    best: int
    difference: Float[np.ndarray, " points"]
    error: Float[np.ndarray, " points"]
    weight: Float[np.ndarray, " points"]
    num_bad_k: Int[np.ndarray, " points"]  # observations whose own score is not to be trusted

    @property
    def alike(self) -> np.ndarray:
        """Strengths that nothing tells from the best."""
        return (np.abs(self.difference) < SMALL) | (np.abs(self.difference) <= 2 * self.error)


def comparison_of(path: xr.DataTree, along: str | None = None) -> Comparison | None:
    """Paired differences along one swept keyword; None where observations were not kept one by one."""
    reduced, axis, _ = along_strength(path, along)
    try:
        found = stored_comparison(reduced) if "loo" in reduced.children else compare(reduced)
    except NameLookupError:
        return None
    if "weight" not in found or found["elpd"].size < 2:
        return None
    order = list(axis.order)
    values = [
        found[name].values[order] for name in ("elpd_difference", "elpd_difference_se", "weight", "num_bad_k")
    ]
    return Comparison(int(np.argmax(values[0])), *values)


def plot_compare(path: xr.DataTree, *, along: str | None = None, width: float = WIDE) -> Figure:
    """Draw how much worse than the best each strength predicts, and what stacking gives it.

    Args:
        path: what ``sweep`` returned.
        along: the swept keyword on the axis, as in ``plot_strength_paths``.
        width: of the figure, in inches.

    Returns:
        The figure: above, ``compare``'s paired differences of LOO elpd to the best strength with two of
        their standard errors, the band within which differences decide nothing, and a cross where a Pareto k
        is bad; below, the stacking weights.

    Raises:
        NameLookupError: no swept dimension, a keyword that was not swept, or no score per observation.
    """
    _, axis, remark = along_strength(path, along)
    found = comparison_of(path, along)
    if found is None:
        raise NameLookupError(
            "path",
            found="no predictive score of every observation at two strengths",
            expected="group 'loo' or 'log_likelihood'",
            fix="Sweep again without leaving log_likelihood out by keep=, on a model with an observed site.",
        )
    positions = axis.positions[list(axis.order)]
    step = float(np.min(np.diff(positions)))
    with house_style():
        figure = new_figure(width, 3.2)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1.0))
        above.axhspan(-SMALL, SMALL, color=BAND_90, lw=0, zorder=0)
        above.axhline(0.0, color=MUTED, lw=0.8, zorder=1)
        above.errorbar(
            positions, found.difference, 2 * found.error, fmt="o", color=ACCENT, ms=3.6, lw=1.0, zorder=3
        )
        bad = found.num_bad_k > 0
        above.plot(positions[bad], found.difference[bad], "x", color=BAD, ms=6.0, mew=1.4, zorder=4)
        low = float(np.min(found.difference - 2 * found.error))
        above.set_ylim(min(1.08 * low, -1.3 * SMALL), max(1.3 * SMALL, 0.05 * abs(low)))
        above.yaxis.set_major_locator(MaxNLocator(5))
        above.set_title("LOO elpd less the best strength's, two errors" + (f"  ({remark})" if remark else ""))
        below.bar(positions, found.weight, 0.6 * step, color=DATA, lw=0)
        below.set_ylim(0.0, 1.0)
        below.set_yticks([0.0, 0.5, 1.0])
        below.set_title("Stacking weight")
        for axes in (above, below):
            quiet_grid(axes)
            axis.dress(axes, room=width - 0.6, labels=axes is below)
        return figure
