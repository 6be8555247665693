"""A Gaussian over the copies: sparse precision, and levels that are means as a low-rank part."""

import math
from typing import Any

import numpy as np
import scipy.linalg
import scipy.linalg.blas

from bayestie._sparse_factor import NotPositive
from bayestie._sparse_numbers import Numbers
from bayestie._sparse_structure import Structure

blas: Any = scipy.linalg.blas  # its names are made at run time


class Gaussian:
    """N(mean, Q^-1) with Q = P + A^T W A + U D^-1 U^T, by Woodbury's formula around the sparse part.

    Q^-1 = S - S U G U^T S with S the sparse inverse, C = U^T S U, G = (D + C)^-1; D = 0 is a constraint.
    """

    def __init__(self, structure: Structure, numbers: Numbers, weights: np.ndarray, mean: np.ndarray):
        self.structure, self.mean, self.weights = structure, mean, weights
        data = self.unpinned = numbers.precision + structure.curvature(weights)
        variances = numbers.variances
        if structure.pins:
            diagonal = data[structure.pattern.row == structure.pattern.col]
            pin = np.full(len(structure.pins), float(np.median(diagonal)))
            data = data.copy()
            np.add.at(data, structure.pin_places, pin)
            variances = np.concatenate([variances, -1.0 / pin])
        self.data, self.variances = data, variances
        self.factor = structure.pattern.factor(data)
        self.log_det = self.factor.log_det
        if not structure.directions.shape[1]:
            self.response = None
            return
        u = structure.directions
        dense = u.toarray(order="F")
        self.across = dense.T
        self.response = self.factor.solve(dense)  # S U
        inner = self.across @ self.response
        inner = 0.5 * (inner + inner.T)
        both = np.diag(variances) + inner
        sign, log_det = np.linalg.slogdet(both)
        negative = int((variances < 0).sum())
        if sign * (-1) ** negative <= 0:
            raise NotPositive
        self.inverse = np.linalg.inv(both)
        self.log_det += log_det - float(np.log(np.abs(variances[variances != 0])).sum())
        lower = np.linalg.cholesky(inner)
        shrink = np.eye(len(inner)) - lower.T @ self.inverse @ lower
        values, vectors = np.linalg.eigh(0.5 * (shrink + shrink.T))
        half = np.eye(len(inner)) - (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
        back = scipy.linalg.solve_triangular(lower, half, lower=True, trans=1)
        self.correction = scipy.linalg.solve_triangular(lower, back.T, lower=True, trans=1).T

    def solve(self, right: np.ndarray) -> np.ndarray:
        out = self.factor.solve(right)
        if self.response is not None:
            out = out - self.response @ (self.inverse @ (self.response.T @ right))
        return out

    def deviations(self, noise: np.ndarray) -> np.ndarray:
        """Standard normals (n, batch) to draws about the mean."""
        out = self.factor.whiten_back(noise)
        if self.response is not None:
            out = self._without(out, self.correction @ (self.across @ out))
        return out

    def _without(self, out: np.ndarray, moved: np.ndarray) -> np.ndarray:
        """out (n, batch) less S U moved (c, batch), in the place of out where it is laid out by columns."""
        return blas.dgemm(-1.0, self.response, moved, 1.0, out, overwrite_c=1)

    def whitened(self, step: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Standard normals (n, batch) that `deviations` makes ``step`` of.

        Where directions are known, some normals do not move x: these are drawn.
        """
        if self.response is None:
            return self.factor.whiten(step)
        u = self.structure.directions
        kept = np.eye(u.shape[1]) - (u.T @ self.response) @ self.correction
        left, values, right = np.linalg.svd(kept)
        seen = values > 1e-9
        inverse = (right[seen].T / values[seen]) @ left[:, seen].T
        out = self.factor.whiten(step + self.response @ (self.correction @ (inverse @ (u.T @ step))))
        if not seen.all():
            still = self.factor.whiten(self.response @ (self.correction @ right[~seen].T))
            still = np.linalg.qr(still)[0]
            out += still @ (rng.standard_normal((still.shape[1], step.shape[1])) - still.T @ out)
        return out

    def draw(self, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`deviations` and their `square`, which costs nothing here: (n, batch) and (batch,)."""
        out = self.factor.whiten_back(noise)
        square = np.einsum("nb,nb->b", noise, noise)
        if self.response is None:
            return out, square
        along = self.across @ out
        moved = self.correction @ along
        out = self._without(out, moved)
        inner = self.across @ self.response
        square = square - 2 * (moved * along).sum(0) + (moved * (inner @ moved)).sum(0)
        soft = self.variances != 0
        at = (along - inner @ moved)[soft]
        return out, square + (at**2 / self.variances[soft, None]).sum(0)

    @property
    def log_height(self) -> float:
        """Log density at the mean; the normaliser of the variables less their constraints."""
        return 0.5 * self.log_det - 0.5 * len(self.mean) * math.log(2 * math.pi)
