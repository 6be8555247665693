"""What the strength and the latents outside x decide at a point: numbers of the prior and the likelihood."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bayestie._copy_coordinates import Reading
from bayestie._families import Cumulant
from bayestie._sparse_prior import Level


@dataclass(frozen=True)
class Likelihood:
    """log p of one site = sum of target eta - weight A(eta) + constant, at one point and h."""

    rows: slice
    cumulant: Cumulant
    target: np.ndarray
    weight: np.ndarray
    constant: float
    is_gaussian: bool

    def value(self, eta: np.ndarray) -> np.ndarray:
        """Elementwise, without the constant; eta (..., M) of this site."""
        size = self.cumulant.value(torch.from_numpy(eta)).numpy()
        return self.target * eta - self.weight * size

    def slope(self, eta: np.ndarray) -> np.ndarray:
        return self.target - self.weight * mean_slope(self.cumulant, eta)

    def curvature(self, eta: np.ndarray) -> np.ndarray:
        return self.weight * self.cumulant.curvature(torch.from_numpy(eta)).numpy()


@dataclass(frozen=True)
class Numbers:
    """Everything that the strength and h decide: prior and likelihood of one structure."""

    precision: np.ndarray  # P on the structure's pattern
    prior: Any  # P itself
    mean: np.ndarray  # m
    variances: np.ndarray  # D of each direction
    constant: float
    offset: np.ndarray  # of the predictors, known levels included
    shift: np.ndarray  # of x: known levels where sigma = 0
    likelihoods: tuple[Likelihood, ...]
    levels: dict[str, Level]
    reading: Reading

    @property
    def is_gaussian(self) -> bool:
        return all(part.is_gaussian for part in self.likelihoods)


def mean_slope(cumulant: Cumulant, eta: np.ndarray) -> np.ndarray:
    """A'(eta)."""
    with np.errstate(over="ignore"):
        out = torch.from_numpy(eta).clone()
        cumulant.value_and_slope_(out, torch.empty_like(out))
    return cumulant.limit - out.numpy()
