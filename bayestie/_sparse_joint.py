"""The log joint at many draws (x, h) of one point at once, h the latents that stand outside x.

`SparseDensity.at` reads a model anew for every h, which costs more than a draw. Where h does nothing but
scale normal likelihoods, a draw's sum of squares is a quadratic of x, and rows of the data need not be seen
again. Where no tie depends on h, the ties' quadratic is the same for all draws, and the model with its copies
given says the rest, as lanes.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayestie._copy_coordinates import CopyProgram, GivenCopies
from bayestie._lane import LaneInputs
from bayestie._sparse_density import SparseDensity
from bayestie._sparse_mode import SparseFit, curvatures, log_likelihood, log_prior, slopes
from bayestie._sparse_numbers import Numbers
from bayestie._sparse_prior import PriorPart
from bayestie._sparse_structure import Structure

_ELEMENTS = 4_000_000  # numbers in the largest tensors of a batch of lanes


@dataclass
class SparseJoint:
    """log p(y, x, h) at a point: ties by their precision, everything else by the model."""

    copies: CopyProgram
    inputs: LaneInputs
    precision: Any  # of the ties, over reduced variables
    mean: np.ndarray
    directions: np.ndarray  # (n, those with a variance)
    variances: np.ndarray
    constant: float

    @classmethod
    def of(cls, density: SparseDensity, point: int, structure: Structure) -> "SparseJoint | None":
        """None where a tie depends on h."""
        copies = density.copies
        first, second = (density.parts(point, copies.hyper_probe(i)) for i in (0, 1))
        ties = [block.tied for block in copies.blocks]
        if not all(_same(a, b) for a, b, tied in zip(first, second, ties, strict=True) if tied):
            return None
        parts = [part if tied else _nothing(part) for part, tied in zip(first, ties, strict=True)]
        variances = np.array([v for part in parts for v in part.variances])
        soft = np.flatnonzero(variances != 0)
        return cls(
            copies,
            copies.inputs(point),
            structure.matrix(structure.prior_precision(parts)),
            np.concatenate([part.mean for part in parts]),
            structure.directions[:, soft].toarray(),
            variances[soft],
            sum(part.constant for part in parts),
        )

    def __call__(self, x: np.ndarray, full: np.ndarray, hyper: np.ndarray) -> np.ndarray:
        """At reduced variables (batch, n), the same as copies and Gaussian latents (batch, num_x), and h."""
        step = x - self.mean
        square = (step * (self.precision @ step.T).T).sum(1)
        square += (np.square(step @ self.directions) / self.variances).sum(1)
        program = self.copies.program
        rows = sum(value.numel() for value in program.observed_values.values()) + full.shape[1]
        width = max(1, _ELEMENTS // rows)
        rest = [
            self._rest(torch.from_numpy(full[i : i + width]), torch.from_numpy(hyper[i : i + width])).numpy()
            for i in range(0, len(x), width)
        ]
        return self.constant - 0.5 * square + np.concatenate(rest)

    def _rest(self, full: Tensor, hyper: Tensor) -> Tensor:
        copies = self.copies

        def one(x: Tensor, h: Tensor) -> Tensor:
            with GivenCopies(copies.given(x)):
                return copies.program.run_lane(copies.position(x, h), self.inputs).log_joint()

        with torch.no_grad(), copies.program.quiet():
            return torch.vmap(one)(full, hyper)


@dataclass
class ScaledJoint:
    """log p(y, x, h) at a point where h scales the precisions of all observations, by exp(rate h), alone.

    Of the likelihoods at x = centre and h = hyper: ``least`` is -1/2 the sum of squares, slope (n,) and
    curvature (n, n) its derivatives, ``normaliser`` the rest; ``count`` is of the observations.
    """

    copies: CopyProgram
    inputs: LaneInputs
    structure: Structure
    numbers: Numbers  # at ``hyper``
    centre: np.ndarray
    hyper: np.ndarray
    rate: np.ndarray
    least: float
    slope: np.ndarray
    curvature: Any
    normaliser: float
    count: float

    @classmethod
    def of(
        cls, density: SparseDensity, point: int, fit: SparseFit, hyper: np.ndarray
    ) -> "ScaledJoint | None":
        """About a fit at ``hyper``; None where the model is not of this kind."""
        structure, numbers, copies = fit.structure, fit.numbers, density.copies
        if not numbers.is_gaussian:
            return None
        steps = [hyper + step for step in np.eye(len(hyper))]
        probes = [copies.hyper_probe(index).numpy() for index in (0, 1)]
        others = [density.at(point, torch.from_numpy(h)) for h in (*steps, *probes)]
        ratios = [_ratio(numbers, other) for _, other in others]
        if any(there is not structure for there, _ in others) or None in ratios:
            return None
        log_ratio = np.log(np.array(ratios, dtype=float))
        # Residuals alone: of the sum of squares in its natural form, what does not depend on x.
        parts = numbers.likelihoods
        own = sum(_half_squares(part.target, part.weight) for part in parts)
        constant = [sum(part.constant for part in each.likelihoods) for each in (numbers, others[-1][1])]
        if log_ratio[-1] == 0.0:
            return None
        joint = cls(
            copies,
            copies.inputs(point),
            structure,
            numbers,
            fit.gaussian.mean,
            hyper,
            log_ratio[: len(hyper)],
            log_likelihood(numbers, fit.eta) - constant[0] - own,
            structure.transposed @ slopes(parts, fit.eta),
            structure.matrix(structure.curvature(curvatures(parts, fit.eta))),
            constant[0] + own,
            2.0 * (constant[1] - constant[0] + math.expm1(log_ratio[-1]) * own) / log_ratio[-1],
        )
        noise = np.random.default_rng(14).standard_normal((structure.size, len(probes)))
        x = fit.gaussian.mean + fit.gaussian.deviations(noise).T
        found = joint(x, x, np.stack(probes))
        for value, at, (_, other) in zip(found, x, others[-2:], strict=True):
            expected = log_prior(structure, other, at)
            expected += log_likelihood(other, structure.map @ at + other.offset)
            if not abs(value - expected) <= 1e-9 * (1.0 + abs(expected)):
                return None
        return joint

    def __call__(self, x: np.ndarray, full: np.ndarray, hyper: np.ndarray) -> np.ndarray:
        """As `SparseJoint`."""
        numbers = self.numbers
        step = x - numbers.mean
        square = (step * (numbers.prior @ step.T).T).sum(1)
        soft = np.flatnonzero(numbers.variances != 0)
        if len(soft):
            along = self.structure.directions[:, soft].T @ step.T
            square += (np.square(along).T / numbers.variances[soft]).sum(1)
        prior = numbers.constant - numbers.reading.log_hyper - 0.5 * square
        step = x - self.centre
        likelihood = self.least + step @ self.slope - 0.5 * (step * (self.curvature @ step.T).T).sum(1)
        log_ratio = (hyper - self.hyper) @ self.rate
        likelihood = np.exp(log_ratio) * likelihood + 0.5 * self.count * log_ratio + self.normaliser
        return prior + likelihood + self._hyper_prior(torch.from_numpy(hyper)).numpy()

    def _hyper_prior(self, hyper: Tensor) -> Tensor:
        copies, names = self.copies, self.copies.hyper

        def one(h: Tensor) -> Tensor:
            x = h.new_zeros(copies.num_x)
            with GivenCopies(copies.given(x)):
                lane = copies.program.run_lane(
                    copies.position(x, h),
                    self.inputs,
                    without=copies.program.latent.keys() - names | set(copies.program.observed),
                    until=set(names),
                )
            return lane.log_joint()

        with torch.no_grad(), copies.program.quiet():
            return torch.vmap(one)(hyper)


def _ratio(numbers: Numbers, other: Numbers) -> float | None:
    """Of the precisions of all observations at other latents h; None where there is none, or more changes."""
    same = (
        np.array_equal(numbers.offset, other.offset)
        and np.array_equal(numbers.precision, other.precision)
        and np.array_equal(numbers.mean, other.mean)
        and np.array_equal(numbers.variances, other.variances)
        and len(numbers.likelihoods) > 0
    )
    if not same or not other.is_gaussian:
        return None
    before, after = (
        np.concatenate([x for part in each.likelihoods for x in (part.weight, part.target)])
        for each in (numbers, other)
    )
    largest = int(np.abs(before).argmax())
    ratio = after[largest] / before[largest]
    close = np.abs(after - ratio * before) <= 1e-12 * np.abs(after)
    return float(ratio) if ratio > 0 and close.all() else None


def _half_squares(target: np.ndarray, weight: np.ndarray) -> float:
    seen = weight > 0
    return 0.5 * float((target[seen] ** 2 / weight[seen]).sum())


def _nothing(part: PriorPart) -> PriorPart:
    return replace(part, value=[np.zeros_like(v) for v in part.value], constant=0.0)


def _same(a: PriorPart, b: PriorPart) -> bool:
    pairs = [*zip(a.value, b.value, strict=True), (a.mean, b.mean)]
    return (
        all(np.array_equal(x, y) for x, y in pairs)
        and a.variances == b.variances
        and a.constant == b.constant
    )
