"""Whether the estimates of the evidence agree: each against what they are joined to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bayestie._errors import NameLookupError
from bayestie._evidence import evidence
from bayestie.plots._axis import along_strength
from bayestie.plots._style import ACCENT, DATA, INK, MUTED, WIDE, house_style, new_figure, quiet_grid

# Name in `evidence`, name for readers, marker, colour.
_KINDS = (
    ("laplace", "importance sampling", "o", ACCENT),
    ("bridge", "bridge sampling", "s", INK),
    ("mbar", "MBAR over all strengths", "D", DATA),
    ("thermodynamic", "thermodynamic", "^", MUTED),
)


@dataclass(frozen=True)
class Estimates:
    """One estimate at every strength, in rising order: its difference from the joined one, and 95% of it."""

    title: str
    difference: Float[np.ndarray, " points"]
    spread: Float[np.ndarray, " points"]
    marker: str
    colour: str


def estimates_of(path: xr.DataTree, along: str | None = None) -> list[Estimates]:
    """Those estimates of the log evidence that the sweep allows at two strengths or more."""
    reduced, axis, _ = along_strength(path, along)
    found = evidence(reduced)
    order = list(axis.order)
    kept = []
    for name, title, marker, colour in _KINDS:
        difference = (found[name] - found["combined"]).values[order]
        spread = 1.96 * found[f"{name}_error"].values[order]
        known = np.isfinite(difference) & np.isfinite(spread)
        if known.sum() >= 2:
            held = [np.where(known, x, np.nan) for x in (difference, spread)]
            kept.append(Estimates(title, held[0], held[1], marker, colour))
    return kept


def plot_estimates(path: xr.DataTree, *, along: str | None = None, width: float = WIDE) -> Figure:
    """Draw every estimate of the log evidence as its difference from the joined one, with 95% intervals.

    Args:
        path: what ``sweep`` returned.
        along: the swept keyword on the axis, as in ``plot_strength_paths``.
        width: of the figure, in inches.

    Returns:
        The figure: ``evidence``'s estimates less ``combined``, in nats. Intervals that miss 0 at many
        strengths mean that an estimate, or its error, is wrong there.

    Raises:
        NameLookupError: no swept dimension, a keyword that was not swept, or no estimate of the evidence.
    """
    _, axis, remark = along_strength(path, along)
    drawn = estimates_of(path, along)
    if not drawn:
        raise NameLookupError(
            "path",
            found="no estimate of the evidence at two strengths",
            expected="one of them",
            fix="Use engine='auto' or 'laplace', and see keep= of sweep.",
        )
    positions = axis.positions[list(axis.order)]
    step = np.min(np.diff(positions)) if len(positions) > 1 else 1.0
    with house_style():
        figure = new_figure(width, 2.5)
        axes = figure.subplots()
        axes.axhline(0.0, color=MUTED, lw=0.8, zorder=1)
        for i, one in enumerate(drawn):
            # Side by side, so that intervals do not hide one another.
            x = positions + 0.18 * step * (i - (len(drawn) - 1) / 2)
            axes.errorbar(
                x,
                one.difference,
                one.spread,
                fmt=one.marker,
                color=one.colour,
                ms=3.2,
                lw=1.0,
                label=one.title,
            )
        # A few wide intervals may leave the panel; what all of them say stays readable.
        reach = np.concatenate([np.abs(one.difference) + one.spread for one in drawn])
        limit = 1.3 * max(float(np.nanquantile(reach, 0.85)), 1e-3)
        axes.set_ylim(-limit, limit)
        quiet_grid(axes)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_title("Each estimate less the joined one, nats" + (f"  ({remark})" if remark else ""))
        axis.dress(axes, room=width - 0.6)
        figure.legend(loc="outside lower center", ncols=2 if width < 5 else 4, handletextpad=0.3)
        return figure
