"""NUTS of affine predictors with natural likelihoods and Gaussian priors on the CPU, compiled whole."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bayestie._affine import AffineDensity
from bayestie._density import Density
from bayestie._engines import _affine_kernels
from bayestie._engines._axis_map import REACH, AxisMap
from bayestie._engines._laplace_fit import LaplaceFit
from bayestie._engines._trajectories import Trajectories

if TYPE_CHECKING:
    from bayestie._engines._lanes import Momenta, Slots

_KINDS = {"logistic": _affine_kernels.LOGISTIC, "poisson": _affine_kernels.POISSON}
_MOST_LATENTS = 500  # beyond, products of matrices with many chains at once are the faster
_MOST_ENTRIES = 20_000_000  # of the predictors' map, over all points


@dataclass(frozen=True)
class SparseRows:
    """The likelihoods of an affine density at its points, whatever the coordinates.

    The map's entries are those that are not zero at some point, by rows and by columns (P, entries).
    """

    density: AffineDensity
    places: tuple[np.ndarray, ...]  # first entry of every row, columns; first entry of every column, rows
    by_row: Tensor
    by_column: Tensor
    starts: np.ndarray  # of every likelihood's rows, and their end
    kinds: np.ndarray
    weighted: np.ndarray
    weights: Tensor  # (P, M), or (P, 0) where none is weighted

    def take(self, index: Tensor) -> "SparseRows":
        """Some of the points."""
        kept = {name: getattr(self, name)[index] for name in ("by_row", "by_column", "weights")}
        return replace(self, **kept)


def sparse_rows(density: Density) -> SparseRows | None:
    """The likelihoods of all points; None where ticks are not compiled for the density."""
    if (
        not isinstance(density, AffineDensity)
        or density.quadratic is None
        or density.latent_scale is not None
    ):
        return None
    matrix = density.matrix
    natural = [n for n in density.naturals if n is not None]
    if matrix.device.type != "cpu" or matrix.dtype != torch.float64 or len(natural) < len(density.families):
        return None
    row, column = torch.nonzero((matrix != 0).any(0), as_tuple=True)
    if density.num_latent > _MOST_LATENTS or len(matrix) * len(row) > _MOST_ENTRIES:
        return None
    order = torch.argsort(column, stable=True)
    by_row = matrix[:, row, column]
    sizes = [family.size for family in density.families]
    weighted = [n.weight is not None for n in natural]
    weights = matrix.new_ones(len(matrix), matrix.shape[1] if any(weighted) else 0)
    starts = np.cumsum([0, *sizes])
    for n, begin, size in zip(natural, starts, sizes, strict=False):
        if n.weight is not None:
            weights[:, begin : begin + size] = n.weight
    return SparseRows(
        density,
        (
            *_compressed(row, column, matrix.shape[1]),
            *_compressed(column[order], row[order], matrix.shape[2]),
        ),
        by_row,
        by_row[:, order].contiguous(),
        starts,
        np.array([_KINDS[n.cumulant.name] for n in natural], dtype=np.int64),
        np.array(weighted, dtype=np.bool_),
        weights,
    )


def _compressed(major: Tensor, minor: Tensor, size: int) -> tuple[np.ndarray, np.ndarray]:
    starts = np.concatenate([[0], np.cumsum(np.bincount(major.numpy(), minlength=size))])
    return starts, minor.numpy().astype(np.uint32)


@dataclass(frozen=True)
class NativeAffine:
    """The density at mode + factor T(x) of every point, by x: see `_affine_kernels`."""

    fit: LaplaceFit
    rows: SparseRows
    arrays: tuple[Tensor, ...]  # constant (P,), slope (P, D), bend (P, D, D), offset (P, M)

    def take(self, index: Tensor, fit: LaplaceFit) -> "NativeAffine":
        """Some of the points, whose fit is known already."""
        return NativeAffine(fit, self.rows.take(index), tuple(x[index] for x in self.arrays))

    def density(self, scale: Tensor, map: AxisMap | None) -> tuple:
        """As the kernels take it, at mode + factor T(scale z)."""
        rows, (constant, slope, bend, offset) = self.rows, self.arrays
        quadratic = (constant, slope, bend, self.fit.factor, scale, offset)
        coefficients = np.empty((0, 0, 0, 4)) if map is None else map.coefficients.numpy()
        first, column, start, row = rows.places
        return (
            tuple(x.contiguous().numpy() for x in quadratic),
            (first, column, rows.by_row.numpy(), start, row, rows.by_column.numpy()),
            (rows.starts, rows.kinds, rows.weighted, rows.weights.numpy()),
            (coefficients, REACH),
        )


def native_affine(rows: SparseRows, fit: LaplaceFit) -> NativeAffine:
    """The density of ``rows`` about the fit, whose points it has."""
    density, points = rows.density, fit.points
    assert density.quadratic is not None
    prior = density.quadratic.take(points)
    linear, _, constant = density.natural_sums(points)
    value, slope = (x.squeeze(1) for x in prior.value_and_grad(fit.mode.unsqueeze(1)))
    slope = torch.bmm((slope + linear).unsqueeze(1), fit.factor).squeeze(1)
    bend = fit.factor.mT @ prior.curvature @ fit.factor
    offset = density.offset[points]
    if offset.shape[1]:
        offset = offset + torch.bmm(density.matrix[points], fit.mode.unsqueeze(-1)).squeeze(-1)
    return NativeAffine(fit, rows, (value + constant + (linear * fit.mode).sum(1), slope, bend, offset))


class AffineTicks:
    """A block of ticks, compiled whole: chains of a point side by side."""

    def __init__(self, density: tuple, state: Trajectories, uniforms: Tensor, momenta: "Momenta"):
        self.density, self.state, self.momenta = density, state, momenta
        self.uniforms = uniforms.numpy()
        lanes = len(state.counts)
        self.tick, self.stands = np.zeros(lanes, dtype=np.int64), np.zeros(lanes, dtype=np.int64)
        names = ("last", "drawn", "sub", "ends", "sums", "checkpoints", "numbers", "counts")
        self.trees = tuple(getattr(state, name).numpy() for name in names)

    def run(self, until: int, steps: Tensor, pending: Tensor, tally: Tensor, slots: "Slots") -> int:
        """As `WholeTicks.run`."""
        state, leapfrogs = self.state, 0
        while True:
            leapfrogs += _affine_kernels.block(
                self.trees,
                (state.forward.numpy(), state.diverging.numpy(), state.max_depth),
                (self.uniforms, self.momenta.ready.numpy(), steps.numpy()),
                (self.tick, self.stands, pending.numpy(), self.momenta.used.numpy()),
                (*(x.numpy() for x in slots), tally.numpy()),
                self.density,
                until,
            )
            if (self.stands == _affine_kernels.MOVES).all():
                return leapfrogs
            self.momenta.extend()
