"""The log joint at many draws (x, h) of one point at once, h the latents that stand outside x.

`SparseDensity.at` reads a model anew for every h, which costs more than a draw. Where no tie depends on h,
the ties' quadratic is the same for all draws, and the model with its copies given says the rest, as lanes.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayestie._copy_coordinates import CopyProgram, GivenCopies
from bayestie._lane import LaneInputs
from bayestie._sparse_density import SparseDensity
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


def _nothing(part: PriorPart) -> PriorPart:
    return replace(part, value=[np.zeros_like(v) for v in part.value], constant=0.0)


def _same(a: PriorPart, b: PriorPart) -> bool:
    pairs = [*zip(a.value, b.value, strict=True), (a.mean, b.mean)]
    return (
        all(np.array_equal(x, y) for x, y in pairs)
        and a.variances == b.variances
        and a.constant == b.constant
    )
