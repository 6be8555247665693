"""The Gaussian at the mode of a sparse density, by Newton's method with a sparse factor."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bayestie._sparse_factor import NotPositive
from bayestie._sparse_gaussian import Gaussian
from bayestie._sparse_numbers import Likelihood, Numbers
from bayestie._sparse_structure import Structure

MAX_ITERATIONS = 60
# Gauss-Hermite nodes and weights for a standard normal: likelihoods averaged over a predictor's spread.
_NODES, _WEIGHTS = (x.astype(float) for x in np.polynomial.hermite_e.hermegauss(7))
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


@dataclass
class SparseFit:
    """A Gaussian approximation at one point: N(gaussian.mean, Q^-1), and what led to it."""

    structure: Structure
    numbers: Numbers
    gaussian: Gaussian
    eta: np.ndarray
    log_joint: float
    converged: bool

    @property
    def log_evidence(self) -> float:
        """Laplace's: exact where the likelihoods are Gaussian."""
        size = self.structure.size
        return self.log_joint + 0.5 * size * math.log(2 * math.pi) - 0.5 * self.gaussian.log_det


def log_likelihood(numbers: Numbers, eta: np.ndarray) -> float:
    return sum(float(part.value(eta[part.rows]).sum()) + part.constant for part in numbers.likelihoods)


def log_prior(structure: Structure, numbers: Numbers, x: np.ndarray) -> float:
    """With the latents' outside x, at reduced variables x (n,)."""
    step = x - numbers.mean
    total = float(step @ (numbers.prior @ step))
    along = _along(structure, numbers, step)
    soft = numbers.variances != 0
    total += float((along[soft] ** 2 / numbers.variances[soft]).sum())
    return numbers.constant - 0.5 * total


def _along(structure: Structure, numbers: Numbers, step: np.ndarray) -> np.ndarray:
    return (structure.directions.T @ step)[: len(numbers.variances)]


def prior_slope(structure: Structure, numbers: Numbers, x: np.ndarray) -> np.ndarray:
    step = x - numbers.mean
    slope = -(numbers.prior @ step)
    variances = numbers.variances
    if len(variances):
        along = _along(structure, numbers, step)
        with np.errstate(divide="ignore", invalid="ignore"):
            pull = np.where(variances != 0, along / variances, 0.0)
        pull = np.concatenate([pull, np.zeros(len(structure.pins))])
        slope -= structure.directions @ pull
    return slope


@dataclass(frozen=True)
class Smoothed:
    """A likelihood averaged over N(eta, variance) of each predictor: what a variational Gaussian sees."""

    part: Likelihood
    spread: np.ndarray  # sd of each predictor

    @property
    def rows(self) -> slice:
        return self.part.rows

    def _mean(self, function: Callable[[np.ndarray], np.ndarray], eta: np.ndarray) -> np.ndarray:
        total = np.zeros_like(eta)
        for node, weight in zip(_NODES, _WEIGHTS, strict=True):
            total += weight * function(eta + node * self.spread)
        return total

    def value(self, eta: np.ndarray) -> np.ndarray:
        return self._mean(self.part.value, eta)

    def slope(self, eta: np.ndarray) -> np.ndarray:
        return self._mean(self.part.slope, eta)

    def curvature(self, eta: np.ndarray) -> np.ndarray:
        return self._mean(self.part.curvature, eta)


def averaged(numbers: Numbers, spread: np.ndarray | None) -> tuple[Likelihood | Smoothed, ...]:
    """The likelihoods, those that are not Gaussian averaged over each predictor's spread."""
    parts = numbers.likelihoods
    if spread is None:
        return parts
    return tuple(p if p.is_gaussian else Smoothed(p, spread[p.rows]) for p in parts)


def shifted_mean(
    structure: Structure, numbers: Numbers, gaussian: Gaussian, start: np.ndarray, num_steps: int = 3
) -> np.ndarray:
    """The mean at ``numbers`` by Newton steps from ``start`` with the factor of numbers close by."""
    x = start
    for _ in range(num_steps):
        eta = structure.map @ x + numbers.offset
        slope = prior_slope(structure, numbers, x) + structure.transposed @ slopes(numbers.likelihoods, eta)
        x = x + gaussian.solve(slope)
    return x


def find_mode(
    structure: Structure,
    numbers: Numbers,
    start: np.ndarray | None = None,
    spread: np.ndarray | None = None,
) -> SparseFit:
    """Damped Newton ascent from ``start`` (the prior mean where None).

    Args:
        structure: of the point.
        numbers: of the point.
        start: reduced variables.
        spread: sd of each predictor, to average the likelihoods over: then the variational Gaussian's mean
            and precision are found instead of the mode's.
    """
    parts = averaged(numbers, spread)
    x = numbers.mean.copy() if start is None else start.copy()
    fixed = numbers.variances == 0
    if fixed.any() and np.abs(_along(structure, numbers, x - numbers.mean)[fixed]).max() > 1e-9:
        x = numbers.mean.copy()

    def objective(x: np.ndarray, eta: np.ndarray) -> float:
        with np.errstate(over="ignore", invalid="ignore"):
            total = sum(float(part.value(eta[part.rows]).sum()) for part in parts)
            return total + log_prior(structure, numbers, x)

    eta = structure.map @ x + numbers.offset
    value, converged = objective(x, eta), False
    gaussian = None
    for iteration in range(MAX_ITERATIONS):
        if gaussian is None or not numbers.is_gaussian:
            weights = curvatures(parts, eta)
            gaussian = Gaussian(structure, numbers, weights, x)
        slope = prior_slope(structure, numbers, x) + structure.transposed @ slopes(parts, eta)
        step = gaussian.solve(slope)
        decrement = float(step @ slope)
        if not math.isfinite(decrement):
            raise NotPositive
        change = structure.map @ step
        near = abs(decrement) <= 1e-8 * (1.0 + abs(value))
        for halving in range(40):
            length = 0.5**halving
            at, at_eta = x + length * step, eta + length * change
            found = objective(at, at_eta)
            if near or found >= value + 1e-4 * length * decrement:
                break
        x, value = at, found
        eta = structure.map @ x + numbers.offset  # anew: sums of steps collect rounding
        if abs(decrement) <= 1e-13 * (1.0 + abs(value)) and (iteration or not numbers.is_gaussian):
            converged = True
            break
    assert gaussian is not None
    if not numbers.is_gaussian:
        gaussian = Gaussian(structure, numbers, curvatures(parts, eta), x)
    gaussian.mean = x
    log_joint = log_prior(structure, numbers, x) + log_likelihood(numbers, eta)
    return SparseFit(structure, numbers, gaussian, eta, log_joint, converged)


def curvatures(parts: Sequence[Likelihood | Smoothed], eta: np.ndarray) -> np.ndarray:
    """Of all observations."""
    out = np.empty_like(eta)
    for part in parts:
        out[part.rows] = part.curvature(eta[part.rows])
    return out


def slopes(parts: Sequence[Likelihood | Smoothed], eta: np.ndarray) -> np.ndarray:
    """Of all observations."""
    out = np.empty_like(eta)
    for part in parts:
        out[part.rows] = part.slope(eta[part.rows])
    return out
