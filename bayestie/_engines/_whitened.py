"""Points of the sparse route in coordinates whitened by their own Gaussians q, for the group `overlap`."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bayestie._sparse_gaussian import Gaussian

# Draws of a strength that are carried over to the others: never more than this, and no more over all
# strengths than one strength stores, so that the table costs about as many evaluations as there are draws.
_MOST, _LEAST = 256, 4
_BUDGET, _WORTH = 100_000_000, 16  # numbers in all positions of the sparse route; fewer draws say too little


def carried(num_points: int, num_chains: int, length: int) -> int:
    """How many draws of a strength are carried over."""
    return min(_MOST, max(_LEAST, num_chains * length // num_points))


def evenly(length: int, num: int) -> np.ndarray:
    """Numbers of about ``num`` draws of a chain, from its first to its last."""
    return np.unique(np.linspace(0, length - 1, max(1, min(length, num))).round().astype(int))


def sparse_rows(num_points: int, num_chains: int, length: int, size: int) -> np.ndarray | None:
    """Which draws of every chain are carried over where n is large; None where it would cost too much."""
    num = min(carried(num_points, num_chains, length), _BUDGET // (num_points * (num_points + 1) * size))
    return None if num < _WORTH else evenly(length, num // num_chains)


@dataclass(frozen=True)
class Whitened:
    """log density of z = F^-1 (x - mean), with F F^T the covariance of q.

    log_evidence: log of q's mass times the joint at its mean, as if the posterior were q.
    rest: steps (batch, n) from the mean to what the joint has beyond q, (batch,); None: nothing.
    noise: z of the draws that are carried over, (chains * rows, n).
    beyond: of every stored draw, log density over the standard normal's, (chains, draws).
    """

    gaussian: Gaussian
    log_evidence: float
    rest: Callable[[np.ndarray], np.ndarray] | None
    noise: np.ndarray
    beyond: np.ndarray

    @property
    def size(self) -> int:
        return self.noise.shape[1]

    def log_density(self, noise: np.ndarray) -> np.ndarray:
        """At z (batch, n or more), (batch,).

        Coordinates beyond the point's own n are standard normal: a hard tie has fewer variables.
        """
        out = self.log_evidence + log_normal(noise)
        if self.rest is not None:
            out += self.rest(self.gaussian.deviations(noise[:, : self.size].T).T)
        return out


def log_normal(noise: np.ndarray) -> np.ndarray:
    """Of the standard normal at z (batch, n)."""
    return -0.5 * np.square(noise).sum(1) - 0.5 * noise.shape[1] * math.log(2.0 * math.pi)
