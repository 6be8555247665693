"""The axis of prior strengths: a log scale with hard (0) and free (inf) sharing set apart at its ends."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from bayestie._errors import NameLookupError
from bayestie._results import select, swept_names, tie_records
from bayestie.plots._style import GRID, number

# Marks the axes that have strengths along x, for whoever draws on a finished figure.
STRENGTH_AXES = "strength-axes"


@dataclass(frozen=True)
class StrengthAxis:
    """Where each strength of a sweep stands on the page."""

    name: str
    values: Float[np.ndarray, " points"]
    positions: Float[np.ndarray, " points"]
    order: tuple[int, ...]
    is_log: bool

    @property
    def inner(self) -> Bool[np.ndarray, " points"]:
        """Points on the scale itself, the set-apart ends left out."""
        return np.isfinite(self.values) & ((self.values > 0) | (not self.is_log))

    def curve(
        self, axes: Axes, values: np.ndarray, color: str, width: float = 1.5, ends: bool = True
    ) -> None:
        """A line through the points of the scale, dots at the ends, dotted lines between the two."""
        inside = [i for i in self.order if self.inner[i]]
        axes.plot(self.positions[inside], values[inside], color=color, lw=width, zorder=3)
        for end, neighbour in self._ends():
            pair = [end, neighbour]
            axes.plot(
                self.positions[pair], values[pair], color=color, lw=0.8 * width, ls=(0, (1, 2)), zorder=3
            )
            if ends:
                axes.plot(self.positions[end], values[end], "o", color=color, ms=2.2 + width, mew=0, zorder=4)

    def band(self, axes: Axes, low: np.ndarray, high: np.ndarray, color: str, width: float) -> None:
        """An interval: a ribbon on the scale, a bar of `width` points at each end."""
        inside = [i for i in self.order if self.inner[i]]
        if len(inside) > 1:
            axes.fill_between(self.positions[inside], low[inside], high[inside], color=color, lw=0, zorder=1)
        elif inside:
            axes.vlines(self.positions[inside], low[inside], high[inside], color=color, lw=width, zorder=1)
        for end, _ in self._ends():
            axes.vlines(self.positions[end], low[end], high[end], color=color, lw=width, zorder=1)

    def dress(self, axes: Axes, *, room: float, labels: bool = True) -> None:
        """Ticks, the marked ends and, with `labels`, the words below; `room` is the axes' width in inches."""
        axes.set_gid(STRENGTH_AXES)
        span = self.positions.max() - self.positions.min() or 1.0
        axes.set_xlim(self.positions.min() - 0.06 * span, self.positions.max() + 0.06 * span)
        ticks = {float(self.positions[i]): self._end_label(i) for i, _ in self._ends()}
        ticks.update(self._inner_ticks(room))
        at = sorted(ticks)
        axes.xaxis.set_major_locator(FixedLocator(at))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([ticks[x] for x in at])
        # Not by empty labels: axes that share x share their labels, but not their visibility.
        axes.tick_params(labelbottom=labels)
        for end, neighbour in self._ends():
            # A break in the frame: the distance between an end and the scale means nothing.
            middle = (self.positions[end] + self.positions[neighbour]) / 2
            axes.axvspan(middle - 0.006 * span, middle + 0.006 * span, color=GRID, lw=0, zorder=0)
        axes.set_xlabel(self.name if labels else "")

    def _ends(self) -> list[tuple[int, int]]:
        inside = [i for i in self.order if self.inner[i]]
        if not inside:
            return [(i, i) for i in self.order]
        ends = []
        if not self.inner[self.order[0]]:
            ends.append((self.order[0], inside[0]))
        if not self.inner[self.order[-1]]:
            ends.append((self.order[-1], inside[-1]))
        return ends

    def _end_label(self, index: int) -> str:
        return "0\nhard" if self.values[index] == 0 else "∞\nfree"

    def _inner_ticks(self, room: float) -> dict[float, str]:
        inside = self.values[self.inner]
        if not inside.size:
            return {}
        low, high = inside.min(), inside.max()
        if not self.is_log:
            chosen = sorted({low, float(np.median(inside)), high})
            return {float(x): number(x) for x in chosen}
        most = max(2, int(room / 0.38))
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0,)):
            marks = [step * 10.0**d for d in decades for step in steps]
            marks = [x for x in marks if low * 0.98 <= x <= high * 1.02]
            if 2 <= len(marks) <= most:
                return {math.log10(x): number(x) for x in marks}
        every = max(1, math.ceil(len(marks) / most)) if marks else 1
        return {math.log10(x): number(x) for x in marks[::every] or [low, high]}


def strength_axis(name: str, values: np.ndarray) -> StrengthAxis:
    """Place the values of one swept keyword: logarithmic for strengths, linear where signs differ."""
    values = np.asarray(values, dtype=float)
    order = tuple(int(i) for i in np.argsort(values, kind="stable"))
    inside = values[np.isfinite(values) & (values > 0)]
    if (values < 0).any():
        return StrengthAxis(name, values, values.copy(), order, is_log=False)
    positions = np.zeros_like(values)
    with np.errstate(divide="ignore"):
        logs = np.log10(values)
    low, high = (logs[np.isfinite(logs)].min(), logs[np.isfinite(logs)].max()) if inside.size else (0.0, 0.0)
    gap = max(0.2, 0.15 * (high - low))
    positions = np.where(values == 0, low - gap, np.where(np.isinf(values), high + gap, logs))
    return StrengthAxis(name, values, positions, order, is_log=True)


def along_strength(tree: xr.DataTree, along: str | None) -> tuple[xr.DataTree, StrengthAxis, str]:
    """Reduce a tree to one swept keyword: the others are held where the evidence is highest.

    Returns:
        The reduced tree, its axis, and a remark that says where the other keywords are held.
    """
    names = swept_names(tree)
    if not names:
        raise NameLookupError(
            "path",
            found="the tree of a single strength",
            expected="a sweep, with at least one swept keyword as a dimension",
            fix="Use plot_copies or arviz_plots.plot_forest on it, or sweep a range of strengths.",
        )
    if along is None:
        wanted = [record.get("sigma_from") for record in tie_records(tree).values()]
        chosen = next((name for name in names if name in wanted), names[0])
    elif along in names:
        chosen = along
    else:
        raise NameLookupError(
            "along=", found=repr(along), expected=f"one of {names}", fix="Name a swept keyword."
        )
    held = {name: value for name, value in best_point(tree).items() if name != chosen}
    remark = ", ".join(f"{name} = {number(value)}" for name, value in held.items())
    reduced = select(tree, **held) if held else tree
    return reduced, strength_axis(chosen, reduced["sweep"].to_dataset()[chosen].values), remark


def best_point(tree: xr.DataTree) -> dict[str, float]:
    """The swept point with the highest evidence, as keyword values; empty for a fit.

    Among points that no error of theirs tells from the highest it is the first, where sharing is strongest.
    """
    names = swept_names(tree)
    if not names:
        return {}
    sweep = tree["sweep"].to_dataset()
    sweep = sweep.sortby(names)
    where = np.unravel_index(
        best_index(sweep["log_evidence"].values.ravel(), 1.96 * sweep["log_evidence_error"].values.ravel()),
        sweep["log_evidence"].shape,
    )
    dims = [str(dim) for dim in sweep["log_evidence"].dims]
    return {dim: float(sweep[dim].values[i]) for dim, i in zip(dims, where, strict=True)}


def best_index(values: np.ndarray, spread: np.ndarray) -> int:
    """Where the highest value stands, or the first that its and their own spread cannot tell from it.

    The first of all where none is known.
    """
    if not np.isfinite(values).any():
        return 0
    finite = np.where(np.isfinite(values), values, -np.inf)
    best = int(np.argmax(finite))
    known = np.where(np.isfinite(spread), spread, 0.0)
    return int(np.argmax(finite[best] - finite <= np.hypot(known, known[best])))
