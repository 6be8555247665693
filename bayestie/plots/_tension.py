"""Which ties the data pull against, at one strength."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from scipy.stats import norm

from bayestie._errors import NameLookupError
from bayestie._results import swept_names
from bayestie._tension import tension
from bayestie.plots._axis import best_point
from bayestie.plots._style import (
    ACCENT,
    BAD,
    BAND_90,
    FAINT,
    MUTED,
    WIDE,
    house_style,
    new_figure,
    number,
    short,
)

MOST_EDGES = 16


@dataclass(frozen=True)
class Pulls:
    """The strongest statistics of one tied site, in falling size; `limit` is Bonferroni's at 5%."""

    title: str
    labels: tuple[str, ...]
    statistic: np.ndarray
    num_edges: int
    limit: float
    where: str  # the strength, in words


def pulls_of(path: xr.DataTree) -> list[Pulls]:
    """Statistics at the strength of highest evidence; of strength 0, where all is 0, at the next one."""
    found = []
    nodes = tension(path)
    names = swept_names(path)
    point = best_point(path)
    for name, node in nodes.children.items():
        data = node.to_dataset()
        where = []
        for key in names:
            values = data[key].values
            wanted = point[key]
            if wanted == 0 and (values > 0).any():
                wanted = float(values[values > 0].min())
            data = data.sel({key: wanted})
            where.append(f"{key} = {number(wanted)}")
        statistic = data["statistic"].transpose("edge", ...)
        edges = [str(x) for x in statistic["edge"].values]
        flat = statistic.values.reshape(len(edges), -1)
        worst = np.argmax(np.abs(flat), 1)
        value = flat[np.arange(len(edges)), worst]
        order = np.argsort(-np.abs(value), kind="stable")[:MOST_EDGES]
        limit = float(norm.isf(0.025 / max(1, flat.size)))
        labels = tuple(edges[i] for i in order)
        found.append(
            Pulls(name, labels, value[order], len(edges), limit, ", ".join(where) or "the strength fitted")
        )
    return found


def plot_tension(path: xr.DataTree, *, width: float = WIDE) -> Figure:
    """Draw the ties that the data pull against most, at the strength of highest evidence.

    Args:
        path: what ``sweep`` returned, or a fit whose tie has a recorded strength.
        width: of the figure, in inches.

    Returns:
        The figure: for each tied site the edges (copies, for exchangeable and complete ties) with the largest
        statistic of ``tension``, at most 16. The band holds a standard normal with probability 95%; the
        dashed lines all edges together. A red dot is beyond them.

    Raises:
        NameLookupError: no tied site with a known strength.
    """
    sites = pulls_of(path)
    if not sites:
        raise NameLookupError(
            "path",
            found="no tied site with a recorded strength",
            expected="at least one",
            fix="Sweep a tie's sigma, or give it as a number.",
        )
    rows = [len(site.labels) for site in sites]
    with house_style():
        figure = new_figure(width, 0.5 + 0.17 * sum(rows) + 0.35 * len(sites))
        grid = figure.subplots(len(sites), 1, squeeze=False, height_ratios=rows)[:, 0]
        for axes, site in zip(grid, sites, strict=True):
            reach = 1.1 * max(float(np.abs(site.statistic).max()), site.limit)
            axes.axvspan(-1.96, 1.96, color=BAND_90, lw=0, zorder=0)
            axes.axvline(0.0, color=FAINT, lw=0.8, zorder=1)
            for side in (-site.limit, site.limit):
                axes.axvline(side, color=MUTED, lw=0.8, ls=(0, (4, 3)), zorder=1)
            at = np.arange(len(site.labels))[::-1]
            beyond = np.abs(site.statistic) > site.limit
            axes.hlines(at, 0, site.statistic, color=FAINT, lw=1.0, zorder=2)
            axes.plot(site.statistic[~beyond], at[~beyond], "o", color=ACCENT, ms=4, mew=0, zorder=3)
            axes.plot(site.statistic[beyond], at[beyond], "o", color=BAD, ms=5, mew=0, zorder=3)
            axes.set_yticks(at, [short(label, 26 if width > 5 else 16) for label in site.labels])
            axes.set_ylim(-0.7, len(at) - 0.3)
            axes.set_xlim(-reach, reach)
            axes.spines["left"].set_visible(False)
            axes.set_title(site.title)
        grid[-1].set_xlabel("pull, in standard deviations expected if the tie holds")
        return figure
