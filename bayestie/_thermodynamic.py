"""The slope of the log evidence along log sigma, and its integral from the hard end upward."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

from bayestie._draws import mean_error
from bayestie._path import SAMPLE, holds, sites_along, swept_values
from bayestie._results import swept_names

# The spline's error falls like h^4, so a grid of every other point errs 16 times as much as the whole
# one; dividing their difference by 5 instead of 15 leaves room for grids that are not there yet.
RICHARDSON = 5.0


def slope(path: xr.DataTree, axis: str) -> tuple[xr.DataArray, xr.DataArray] | None:
    """d log p(y | sigma) / d log sigma along one swept keyword, with its Monte Carlo error.

    The posterior mean of d log p(theta, level | sigma) / d log sigma, summed over the ties whose sigma
    this keyword is; None where it is no tie's sigma, or the energies were not kept.

    Returns:
        Slope and error over the swept dims; exactly 0 at sigma = 0 and sigma = inf.
    """
    sites = sites_along(path, axis)
    if not sites or not all(holds(path, "tie_energy", site.name) for site in sites):
        return None
    names = swept_names(path)
    values = swept_values(path, axis)
    position = names.index(axis)
    total: xr.DataArray | None = None
    for site in sites:
        energy, level = site.statistics(path)
        lanes = np.moveaxis(energy.values, position, 0)
        levels = [None] * len(values) if level is None else list(np.moveaxis(level, position, 0))
        rows = [site.score(float(s), q, x) for s, q, x in zip(values, lanes, levels, strict=True)]
        score = energy.isel(event=0, drop=True).copy(data=np.moveaxis(np.stack(rows), 0, position))
        total = score if total is None else total + score
    assert total is not None and total.dims[-2:] == SAMPLE
    return mean_error(path, total)


# Powers of sigma that a slope is supposed to fall with towards an end; far inside it is 2.
_POWERS = (0.5, 4.0)


@dataclass(frozen=True)
class _End:
    """The integral over log sigma from the outermost strength out to sigma = 0 or inf.

    nearest, next: the two outermost strengths; log_ratio between them; weights (n,) of the slopes in the
    integral; beyond (n,), the strengths whose value it is part of.
    """

    nearest: int
    next: int
    log_ratio: float
    weights: NDArray[np.float64]
    beyond: NDArray[np.bool_]

    def error(self, slope: NDArray, error: NDArray) -> NDArray:
        """Error (...) of the integral: what it would be if the slope fell with the power seen last.

        Of the slope only what is beyond two of its Monte Carlo errors counts.
        """
        last, before = slope[self.nearest], slope[self.next]
        seen = np.maximum(np.abs(last) - 2.0 * error[self.nearest], 0.0)
        safe = np.where(seen > 0, last, 1.0)
        ratio = np.maximum(before / safe, 0.0)
        with np.errstate(divide="ignore"):
            power = np.log(ratio) / self.log_ratio if self.log_ratio > 0 else np.full_like(ratio, -np.inf)
        closed = np.tensordot(self.weights, slope, 1) / safe
        return seen * np.abs(1.0 / np.clip(power, *_POWERS) - closed)


@dataclass(frozen=True)
class Rule:
    """Integration along log sigma from the smallest strength: relative log evidence = weights @ slopes.

    order: sorts the strengths. weights, coarse: (n, n) in sorted order, for all points, and for every other
    one; a share of what these miss is the quadrature error. ends: the integrals out to sigma = 0 and inf,
    which no other strength checks.
    """

    order: NDArray[np.intp]
    weights: NDArray[np.float64]
    coarse: tuple[NDArray[np.float64], ...]
    share: float
    ends: tuple[_End, ...] = ()

    def integrate(self, slope: NDArray, error: NDArray) -> tuple[NDArray, NDArray]:
        """Slopes and errors (n, ...) in the tree's order -> relative log evidence and its error, alike."""
        slope, error = slope[self.order], error[self.order]
        value = np.tensordot(self.weights, slope, 1)
        gap = np.max([np.abs(value - np.tensordot(c, slope, 1)) for c in self.coarse], 0) * self.share
        # Rules may agree at one point by chance: its neighbours then know better.
        quadrature = np.maximum(gap, np.maximum(_shift(gap, 1), _shift(gap, -1)))
        # Every rule is right where it starts.
        quadrature[0] = 0.0
        variance = np.tensordot(self.weights**2, error**2, 1) + quadrature**2
        for end in self.ends:
            variance[end.beyond] += end.error(slope, error) ** 2
        back = np.argsort(self.order)
        return value[back], np.sqrt(variance)[back]


def _shift(x: NDArray, by: int) -> NDArray:
    out = np.roll(x, by, axis=0)
    out[0 if by > 0 else -1] = 0.0
    return out


def rule(values: NDArray) -> Rule:
    """The integration rule for a grid of strengths, 0 and inf included.

    Between strengths the slope is a cubic spline in log sigma. Below the smallest, slope = a sigma^2 +
    b sigma^4 (the prior of the deviations enters through sigma^2); above the largest the same in
    1 / sigma^2. Both ends are fitted to the two outermost strengths.
    """
    order = np.argsort(values)
    ordered = values[order]
    positive = np.flatnonzero((ordered > 0) & np.isfinite(ordered))
    if len(positive) == 0:  # an interrupted sweep may hold the hard end alone: there is nothing to integrate
        return Rule(order, np.zeros((len(values),) * 2), (np.zeros((len(values),) * 2),), 1.0)
    full = _weights(ordered, positive)
    if len(positive) == 1:
        coarse = (0.5 * full,)
    else:
        # Of few points one thinning may come close by chance: both are tried.
        starts, ends = ((0, 1) if len(positive) < 8 else (0,)), positive[[0, -1]]
        coarse = tuple(_weights(ordered, np.union1d(positive[start::2], ends)) for start in starts)
    # Of fewer points than five nothing says that the error falls at all yet.
    share = 1.0 if len(positive) < 5 else 1.0 / RICHARDSON
    return Rule(order, full, coarse, share, tuple(_ends(ordered, positive)))


def _ends(ordered: NDArray, nodes: NDArray) -> Iterator[_End]:
    n, x = len(ordered), np.log(ordered[nodes])
    if ordered[0] == 0:
        inner = _end(n, nodes[:2], ordered[nodes[:2]] ** 2)
        yield _End(nodes[0], nodes[:2][-1], float(x[:2][-1] - x[0]), inner, ordered > 0)
    if math.isinf(ordered[-1]):
        outer = _end(n, nodes[:-3:-1], ordered[nodes[:-3:-1]] ** -2.0)
        yield _End(nodes[-1], nodes[-2:][0], float(x[-1] - x[-2:][0]), outer, np.isinf(ordered))


def _weights(ordered: NDArray, nodes: NDArray) -> NDArray:
    n = len(ordered)
    weights = np.zeros((n, n))
    x = np.log(ordered[nodes])
    at = np.isfinite(ordered) & (ordered > 0)
    if len(nodes) > 1:
        spline = CubicSpline(x, np.eye(len(nodes))).antiderivative()
        weights[np.ix_(at, nodes)] = spline(np.log(ordered[at]))
    if ordered[0] == 0:
        weights[1:] += _end(n, nodes[:2], ordered[nodes[:2]] ** 2)
    if math.isinf(ordered[-1]):
        weights[-1] = weights[nodes[-1]] + _end(n, nodes[:-3:-1], ordered[nodes[:-3:-1]] ** -2.0)
    return weights


def _end(n: int, nodes: NDArray, t: NDArray) -> NDArray:
    # slope(t) = a t + b t^2 through the two outermost points; its integral over log sigma from t = 0 to
    # t_0 is a t_0 / 2 + b t_0^2 / 4 = slope_0 / 2 - b t_0^2 / 4.
    weights = np.zeros(n)
    weights[nodes[0]] = 0.5
    if len(nodes) > 1:
        weights[nodes[0]] += 0.25 * t[0] / (t[1] - t[0])
        weights[nodes[1]] -= 0.25 * t[0] ** 2 / (t[1] * (t[1] - t[0]))
    return weights
