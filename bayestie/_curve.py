"""Log evidence as a smooth function of sigma, and its average under a prior on sigma."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.polynomial.legendre import leggauss, legint, legval, legvander
from numpy.typing import NDArray
from scipy.interpolate import CubicHermiteSpline, CubicSpline, PchipInterpolator

from bayestie._errors import CoverageError
from bayestie._strength_prior import StrengthPrior
from bayestie._thermodynamic import RICHARDSON

# Octaves beyond the swept strengths that integrals over sigma reach.
_OCTAVES = 30
_POINTS = 8
# Posterior mass that may lie where nothing was swept.
MASS_OUTSIDE = 0.01
_REPLICATES = 30


@dataclass(frozen=True)
class Curve:
    """log p(y | sigma) between and beyond the swept strengths.

    Between strengths, a cubic Hermite in log sigma; its slopes are the spline's and the thermodynamic
    ones, weighted by their errors. Below the smallest strength, a quadratic in sigma^2 down to the
    value at 0, because the prior of the deviations enters through sigma^2; above the largest, the same
    in 1 / sigma^2 up to the value at inf. Where the end was not swept: flat below, straight above.

    values: strengths > 0 and finite, ascending (m,). log_evidence, error, slope, slope_error: (m,); slopes
    NaN where unknown. hard, free: log evidence and its error at sigma = 0 and inf, if swept.
    """

    values: NDArray[np.float64]
    log_evidence: NDArray[np.float64]
    error: NDArray[np.float64]
    slope: NDArray[np.float64]
    slope_error: NDArray[np.float64]
    hard: tuple[float, float] | None
    free: tuple[float, float] | None

    @staticmethod
    def build(
        values: NDArray, log_evidence: NDArray, error: NDArray, slope: NDArray, slope_error: NDArray
    ) -> "Curve":
        """From arrays (n,) in any order, 0 and inf included; NaN evidence is left out."""
        order = np.argsort(values)
        order = order[np.isfinite(log_evidence[order])]
        ordered = values[order]
        inner = order[(ordered > 0) & np.isfinite(ordered)]
        ends = [
            next(((float(log_evidence[i]), float(error[i])) for i in order if values[i] == end), None)
            for end in (0.0, math.inf)
        ]
        if len(inner) < 2:
            raise CoverageError(
                "strengths swept",
                found=f"{len(inner)} between 0 and inf with a log evidence",
                expected="at least 2, better 8 or more",
                fix="Sweep over bayestie.strengths(low, high, num, hard=True).",
            )
        parts = (x[inner] for x in (values, log_evidence, error, slope, slope_error))
        return Curve(*parts, hard=ends[0], free=ends[1])

    @property
    def _slopes(self) -> NDArray[np.float64]:
        return self._slopes_with_errors[0]

    @cached_property
    def _slopes_with_errors(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        x = np.log(self.values)
        if len(x) > 3:
            spline = CubicSpline(x, self.log_evidence)(x, 1)
            rough = np.interp(x, x[::2], CubicSpline(x[::2], self.log_evidence[::2])(x[::2], 1))
        else:
            spline = np.gradient(self.log_evidence, x)
            rough = np.zeros(len(x))
        gap = np.gradient(x)
        error = np.hypot(self.error / gap, np.abs(spline - rough) / RICHARDSON) + 1e-9
        weight = error**-2.0
        known = np.isfinite(self.slope)
        other = np.where(known, (np.where(known, self.slope_error, 1.0) + 1e-9) ** -2.0, 0.0)
        slopes = (weight * spline + other * np.where(known, self.slope, 0.0)) / (weight + other)
        return slopes, (weight + other) ** -0.5

    @cached_property
    def _inner(self) -> Callable[[NDArray], NDArray]:
        return CubicHermiteSpline(np.log(self.values), self.log_evidence, self._slopes)

    @property
    def at_zero(self) -> float:
        """log p(y | 0): as swept, or as the curve flattens out below the smallest strength."""
        return self.hard[0] if self.hard else float(self.log_evidence[0] - self._slopes[0] / 2)

    @property
    def at_zero_error(self) -> float:
        """Standard error of `at_zero`; where it was not swept, with half the slope as what is not known."""
        if self.hard:
            return self.hard[1]
        return math.hypot(float(self.error[0]), float(self._slopes[0]) / 2)

    def __call__(self, sigma: NDArray) -> NDArray:
        """log p(y | sigma) at any sigma in [0, inf]."""
        sigma = np.asarray(sigma, dtype=float)
        low, high = self.values[0], self.values[-1]
        out = np.empty(sigma.shape)
        below, above = sigma < low, sigma > high
        inner = ~below & ~above
        out[inner] = self._inner(np.log(sigma[inner]))
        slopes, errors = self._slopes_with_errors
        t = (sigma[below] / low) ** 2
        out[below] = _end(t, self.at_zero, self.log_evidence[0], slopes[0], errors[0])
        if self.free:
            t = (high / sigma[above]) ** 2
            out[above] = _end(t, self.free[0], self.log_evidence[-1], -slopes[-1], errors[-1])
        else:
            # The slope falls as sigma grows once the data resist, so a straight line is an upper bound.
            out[above] = self.log_evidence[-1] + self._slopes[-1] * np.log(sigma[above] / high)
        return out

    def thinned(self) -> "Curve | None":
        """The same from every other strength: the change shows the error of interpolation."""
        if len(self.values) < 5:
            return None
        keep = np.arange(0, len(self.values), 2)
        keep = keep if keep[-1] == len(self.values) - 1 else np.append(keep, len(self.values) - 1)
        fields = (self.values, self.log_evidence, self.error, self.slope, self.slope_error)
        return Curve(*(x[keep] for x in fields), hard=self.hard, free=self.free)

    @cached_property
    def replicates(self) -> list["Curve"]:
        """Curves as they might have come out, given the errors of the evidence and of the slopes."""
        generator = np.random.default_rng(0)

        def end(value: tuple[float, float] | None) -> tuple[float, float] | None:
            return value and (value[0] + value[1] * generator.normal(), value[1])

        return [
            Curve(
                self.values,
                self.log_evidence + self.error * generator.normal(size=len(self.error)),
                self.error,
                self.slope + self.slope_error * generator.normal(size=len(self.error)),
                self.slope_error,
                hard=end(self.hard),
                free=end(self.free),
            )
            for _ in range(_REPLICATES)
        ]

    def uncertain(self, functional: Callable[["Curve"], NDArray]) -> tuple[NDArray, NDArray]:
        """A functional of the curve with its standard error, Monte Carlo and interpolation together."""
        value = functional(self)
        spread = np.std([functional(curve) for curve in self.replicates], axis=0)
        rough = self.thinned()
        if rough is not None:
            spread = np.hypot(spread, (value - functional(rough)) / RICHARDSON)
        return value, spread


def _end(t: NDArray, limit: float, value: float, slope: float, error: float) -> NDArray:
    # A quadratic in t = (sigma / sigma_1)^2 with the value at t = 1 and d/dlog sigma = slope there.
    rise = value - limit
    bend = (slope - 2 * rise) / 2
    # It has a peak inside if |bend| > |rise|: believe that only of a slope well above its error.
    if abs(bend) - 1.5 * error <= abs(rise) + 1e-3:
        bend = float(np.clip(bend, -abs(rise), abs(rise)))
    return limit + (rise - bend) * t + bend * t**2


def _partial_sums() -> NDArray[np.float64]:
    # Row i, column j: integral from -1 to x_i of the polynomial that is 1 / w_j at x_j and 0 at the others.
    x, w = leggauss(_POINTS)
    to_coefficients = np.linalg.inv(legvander(x, _POINTS - 1))
    integrals = np.stack([legval(x, legint(column, lbnd=-1)) for column in to_coefficients.T])
    return integrals.T / w


_UP_TO = _partial_sums()


@dataclass(frozen=True)
class Nodes:
    """Quadrature over sigma in (0, inf): Gauss points in log sigma, panels broken at every strength.

    sigma, weight: (n,) ascending. region: -1 below the strengths swept, 0 among them, 1 above.
    """

    sigma: NDArray[np.float64]
    weight: NDArray[np.float64]
    region: NDArray[np.int64]

    @staticmethod
    def build(values: NDArray, prior: StrengthPrior) -> "Nodes":
        low, high = values[0], values[-1]
        octaves = 2.0 ** np.arange(1, _OCTAVES + 1)
        edges = np.concatenate([low / octaves[::-1], values, high * octaves])
        between = [
            np.geomspace(a, b, 1 + math.ceil(math.log2(b / a)))[:-1] for a, b in itertools.pairwise(edges)
        ]
        edges = np.append(np.concatenate(between), edges[-1])
        bounds = [b for b in prior.support if edges[0] < b < edges[-1]]
        edges = np.unique(np.concatenate([edges, bounds]))
        x, w = leggauss(_POINTS)
        logs = np.log(edges)
        half = np.diff(logs)[:, None] / 2
        points = np.exp(logs[:-1, None] + half * (1 + x)).reshape(-1)
        weight = (half * w).reshape(-1) * points
        return Nodes(points, weight, np.where(points < low, -1, np.where(points > high, 1, 0)))

    def cumulative(self, mass: NDArray) -> NDArray:
        """Mass up to each node from the mass of the nodes: exact for polynomials within a panel."""
        panels = mass.reshape(-1, _POINTS)
        before = np.cumsum(panels.sum(1)) - panels.sum(1)
        return np.clip((before[:, None] + panels @ _UP_TO.T).reshape(-1), 0.0, None)

    def invert(self, cumulative: NDArray, levels: NDArray) -> NDArray:
        """sigma at which the cumulative mass reaches each level."""
        # Steps below rounding have no inverse.
        rising = np.concatenate([[True], np.diff(np.maximum.accumulate(cumulative)) > 1e-12])
        known = PchipInterpolator(cumulative[rising], np.log(self.sigma[rising]), extrapolate=False)
        return np.exp(known(np.clip(levels, cumulative[rising][0], cumulative[rising][-1])))


@dataclass(frozen=True)
class Averaged:
    """A curve averaged under a prior on sigma.

    log_soft: log of the prior mean of p(y | sigma) over the continuous part. mass: posterior mass of each
    node, (n,), summing to one over the continuous part. mass_at_zero: posterior probability of sigma = 0.
    """

    nodes: Nodes
    log_soft: float
    mass: NDArray[np.float64]
    mass_at_zero: float

    def outside(self, region: int) -> float:
        """Share of the continuous posterior mass in a region (-1 below, 1 above the strengths)."""
        return float(self.mass[self.nodes.region == region].sum())

    def quantile(self, levels: NDArray) -> NDArray:
        """Quantiles of the posterior of sigma, the point mass included."""
        cumulative = self.mass_at_zero + (1 - self.mass_at_zero) * self.nodes.cumulative(self.mass)
        return np.where(levels <= self.mass_at_zero, 0.0, self.nodes.invert(cumulative, levels))

    def moment(self, power: int) -> float:
        """Posterior mean of sigma^power, the point mass included."""
        return float((1 - self.mass_at_zero) * (self.mass * self.nodes.sigma**power).sum())


@dataclass(frozen=True)
class Averager:
    """Averages curves under one prior; the quadrature is laid out once."""

    nodes: Nodes
    log_weight: NDArray[np.float64]
    point_mass: float

    @staticmethod
    def build(values: NDArray, prior: StrengthPrior) -> "Averager":
        nodes = Nodes.build(values, prior)
        with np.errstate(divide="ignore"):  # a node on the edge of a prior's support weighs nothing
            log_weight = np.log(nodes.weight) + prior.log_density(nodes.sigma)
        # Priors reach beyond the last node by a mass of 1e-12 or so; what is left is normalised.
        return Averager(nodes, log_weight - np.logaddexp.reduce(log_weight), prior.point_mass)

    @property
    def prior_median(self) -> float:
        """Median of the continuous part of the prior."""
        cumulative = self.nodes.cumulative(np.exp(self.log_weight))
        return float(self.nodes.invert(cumulative, np.array([0.5]))[0])

    def __call__(self, curve: Curve) -> Averaged:
        """The posterior of sigma: prior times evidence, on the nodes."""
        log_mass = self.log_weight + curve(self.nodes.sigma)
        log_soft = float(np.logaddexp.reduce(log_mass))
        odds = -math.inf
        if self.point_mass > 0:
            odds = math.log(self.point_mass / (1 - self.point_mass)) + curve.at_zero - log_soft
        at_zero = 1 / (1 + math.exp(-odds)) if odds > -700 else 0.0
        return Averaged(self.nodes, log_soft, np.exp(log_mass - log_soft), at_zero)


def coverage(curve: Curve, averaged: Averaged) -> str:
    """Empty where the swept strengths carry the posterior of sigma; else what is missing, as a sentence."""
    below, above = averaged.outside(-1), averaged.outside(1)
    problems = []
    # Below, the evidence is flat to within half its slope at the smallest strength.
    doubt = min(1.0, curve.at_zero_error)
    needs_zero = averaged.mass_at_zero > MASS_OUTSIDE
    if curve.hard is None and (below * doubt > MASS_OUTSIDE or (needs_zero and doubt > 0.1)):
        problems.append(
            f"{_percent(max(below, averaged.mass_at_zero))} of the posterior mass lies below the smallest "
            f"strength, sigma = {curve.values[0]:.3g}: add sigma = 0 (hard=True) or smaller strengths."
        )
    if curve.free is None and above > MASS_OUTSIDE:
        problems.append(
            f"up to {_percent(above)} of the posterior mass lies above the largest strength, "
            f"sigma = {curve.values[-1]:.3g}: sweep further, or take a prior that ends sooner."
        )
    return " ".join(problems)


def _percent(mass: float) -> str:
    return f"{100 * mass:.2g}%"
