"""A posterior over copies as its Gaussian q times what the likelihoods leave beyond their quadratics."""

from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from bayestie._sparse_factor import variances
from bayestie._sparse_mode import SparseFit, averaged, find_mode, slopes
from bayestie._sparse_numbers import Numbers


class Design:
    """A times rows (batch, n), without a sparse product where every row of A holds one entry."""

    def __init__(self, matrix: Any):
        self.matrix = matrix
        self.single = bool((np.diff(matrix.indptr) == 1).all())
        self.identity = (
            self.single
            and matrix.shape[0] == matrix.shape[1]
            and bool((matrix.data == 1).all())
            and bool((matrix.indices == np.arange(matrix.shape[0])).all())
        )

    def __call__(self, step: np.ndarray) -> np.ndarray:
        if self.identity:
            return step
        if self.single:
            return step[:, self.matrix.indices] * self.matrix.data
        return (self.matrix @ step.T).T


class Remainder:
    """r_i(eta) = log p_i(eta) - e_i (eta - eta_hat) + W_i (eta - eta_hat)^2 / 2, less its value at eta_hat.

    Of steps eta - eta_hat, (batch, M).
    """

    def __init__(self, numbers: Numbers, eta: np.ndarray, slope: np.ndarray, weight: np.ndarray):
        self.numbers, self.eta, self.slope = numbers, eta, slope
        self.half = 0.5 * weight
        self.pull = [part.target - slope[part.rows] for part in numbers.likelihoods]
        self.plain = [bool((part.weight == 1.0).all()) for part in numbers.likelihoods]
        self.at_centre = 0.0
        self.at_centre = self(np.zeros((1, len(eta))))[0]

    def __call__(self, step: np.ndarray) -> np.ndarray:
        out = self.half * step
        whole = len(self.pull) == 1
        for part, pull, plain in zip(self.numbers.likelihoods, self.pull, self.plain, strict=True):
            rows = slice(None) if whole else part.rows
            if part.is_gaussian:
                out[:, rows] = 0.0
                continue
            own = step[:, rows]
            left = out[:, rows]
            left += pull
            left *= own
            size = part.cumulant.value_(torch.from_numpy(own + self.eta[rows])).numpy()
            left -= size if plain else part.weight * size
        out -= self.at_centre
        return out


class Target:
    """q at one point, its remainder, and the terms that no block sees alone."""

    def __init__(self, fit: SparseFit):
        self.structure, self.numbers, self.gaussian = fit.structure, fit.numbers, fit.gaussian
        self.mean = fit.gaussian.mean
        self.log_joint = fit.log_joint
        self.design = Design(fit.structure.map)
        directions = fit.structure.directions[:, : len(fit.numbers.variances)]
        small = directions.shape[1] * directions.shape[0] <= 20_000_000
        self.means: Any = directions.T.toarray() if small else sp.csr_array(directions.T)
        self.spread = self._spread()
        self.log_scale = fit.log_evidence  # log of q's mass times the joint at its mean

    def _spread(self) -> np.ndarray:
        """sd of each predictor under q, from draws: it shapes a proposal alone."""
        rng = np.random.default_rng(11)
        total = np.zeros(self.structure.map.shape[0])
        count = 48
        for _ in range(0, count, 16):
            step = self.gaussian.deviations(rng.standard_normal((16, self.structure.size)).T)
            total += np.square(self.structure.map @ step).sum(1)
        return np.sqrt(total / count)

    def refined(self) -> "Target":
        """About the variational Gaussian: the mean and curvature that q's own draws see."""
        fit = find_mode(self.structure, self.numbers, self.mean, self.spread)
        better = Target(fit)
        better.spread = self.spread
        better.remainder = Remainder(
            self.numbers, fit.eta, slopes(averaged(self.numbers, self.spread), fit.eta), fit.gaussian.weights
        )
        return better

    remainder: Remainder

    def rest(self, step: np.ndarray) -> np.ndarray:
        """Remainders (batch, M) at mean + step (batch, n)."""
        return self.remainder(self.design(step))

    def means_term(self, step: np.ndarray) -> np.ndarray:
        """log of the prior's directions at mean + step, which q has and blocks do not see, (batch,)."""
        return -0.5 * (np.square(step @ self.means.T) / self.numbers.variances).sum(1)

    def sd(self) -> np.ndarray:
        """Of each variable under q: exact where the band is at most 1, else from draws."""
        found = variances(self.gaussian.factor)
        if found is not None:
            if self.gaussian.response is not None:
                response = self.gaussian.response
                found = found - ((response @ self.gaussian.inverse) * response).sum(1)
            return np.sqrt(np.maximum(found, 1e-300))
        rng = np.random.default_rng(12)
        step = self.gaussian.deviations(rng.standard_normal((64, self.structure.size)).T)
        return np.sqrt(np.square(step).mean(1))
