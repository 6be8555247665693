"""Cholesky factors of sparse precisions that share a pattern: banded or SuperLU, with a dense border.

Variables that many others see (a level, an effect of every row, the smaller side of a crossed design) form
the border: they are eliminated last, in a dense Schur complement. The rest, the core, is banded after a
reverse Cuthill-McKee ordering (chains, trees, groups: LAPACK pbtrf) or else left to SuperLU in symmetric mode
(grids).
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.linalg
import scipy.linalg.lapack
import scipy.sparse as sp
import scipy.sparse.linalg
from scipy.sparse.csgraph import reverse_cuthill_mckee

lapack: Any = scipy.linalg.lapack  # its names are made at run time
MAX_BAND = 48  # beyond, SuperLU's fill is the smaller
MAX_BORDER = 2500


class NotPositive(Exception):
    """A precision that is not positive definite."""


@dataclass
class Pattern:
    """Where a symmetric n x n matrix may differ from zero, and how it is eliminated.

    row, col: its lower triangle, each place once, the whole diagonal among them; data follow this order.
    border: variables eliminated last.
    """

    size: int
    row: np.ndarray
    col: np.ndarray
    border: np.ndarray

    def __post_init__(self) -> None:
        is_border = np.zeros(self.size, dtype=bool)
        is_border[self.border] = True
        self.core = np.flatnonzero(~is_border)
        place = np.empty(self.size, dtype=np.int64)
        order = self._band_order(is_border)
        self.core = self.core[order]
        self._in_order = bool((np.diff(self.core) > 0).all())
        place[self.core] = np.arange(len(self.core))
        place[self.border] = np.arange(len(self.border))
        inner = ~is_border[self.row] & ~is_border[self.col]
        outer = is_border[self.row] & is_border[self.col]
        crossing = ~inner & ~outer
        self._inner, self._outer = np.flatnonzero(inner), np.flatnonzero(outer)
        self._crossing = np.flatnonzero(crossing)
        low, high = place[self.row[inner]], place[self.col[inner]]
        self._low, self._high = np.maximum(low, high), np.minimum(low, high)
        self.band = int((self._low - self._high).max(initial=0))
        self._outer_at = place[self.row[outer]], place[self.col[outer]]
        of_core = np.where(is_border[self.row[crossing]], self.col[crossing], self.row[crossing])
        of_border = np.where(is_border[self.row[crossing]], self.row[crossing], self.col[crossing])
        self._crossing_at = place[of_core], place[of_border]

    def _band_order(self, is_border: np.ndarray) -> np.ndarray:
        inner = ~is_border[self.row] & ~is_border[self.col]
        place = np.cumsum(~is_border) - 1
        low, high = place[self.row[inner]], place[self.col[inner]]
        count = int((~is_border).sum())
        if not len(low) or int(np.abs(low - high).max()) <= 2:  # a chain in its own order
            return np.arange(count)
        graph = sp.csr_array(
            (np.ones(2 * len(low), np.int8), (np.r_[low, high], np.r_[high, low])), (count,) * 2
        )
        return np.asarray(reverse_cuthill_mckee(sp.csr_matrix(graph), symmetric_mode=True))

    @property
    def whole(self) -> bool:
        """Whether the core is everything, in its own order."""
        return not len(self.border) and self._in_order

    @property
    def is_banded(self) -> bool:
        return self.band <= MAX_BAND

    def factor(self, data: np.ndarray) -> "Factor":
        """The factor of the matrix with these entries.

        Raises:
            NotPositive: it is not positive definite.
        """
        core = self._core_factor(data[self._inner])
        if not len(self.border):
            return Factor(self, core, None, None, None)
        shape = (len(self.core), len(self.border))
        crossing = sp.csr_array((data[self._crossing], self._crossing_at), shape)
        schur = np.zeros((shape[1], shape[1]))
        i, j = self._outer_at
        schur[i, j] = data[self._outer]
        schur[j, i] = data[self._outer]
        if isinstance(core, BandCore) and core.band == 0:
            solved = sp.csr_array(crossing / np.square(core.banded[0])[:, None])
            schur -= (crossing.T @ solved).toarray()
        else:
            solved = core.solve(crossing.toarray(order="F")) if shape[0] else crossing.toarray()
            schur -= crossing.T @ solved
        try:
            lower = scipy.linalg.cholesky(schur, lower=True)
        except (np.linalg.LinAlgError, ValueError) as error:
            raise NotPositive from error
        return Factor(self, core, crossing, solved, lower)

    def _core_factor(self, data: np.ndarray) -> "BandCore | SuperCore":
        count = len(self.core)
        if self.is_banded:
            banded = np.zeros((self.band + 1, count), order="F")
            banded[self._low - self._high, self._high] = data
            return BandCore.of(banded)
        off = self._low != self._high
        rows = np.concatenate([self._low, self._high[off]])
        cols = np.concatenate([self._high, self._low[off]])
        return SuperCore.of(sp.csc_matrix((np.concatenate([data, data[off]]), (rows, cols)), (count, count)))


@dataclass
class BandCore:
    """L of a banded matrix, in LAPACK's lower band storage."""

    banded: np.ndarray

    @classmethod
    def of(cls, banded: np.ndarray) -> "BandCore":
        if not banded.shape[1]:
            return cls(banded)
        if len(banded) == 1:
            if not (banded > 0).all():
                raise NotPositive
            return cls(np.sqrt(banded))
        factor, info = lapack.dpbtrf(banded, lower=1, overwrite_ab=1)
        if info != 0 or not np.isfinite(factor[0]).all():
            raise NotPositive
        return cls(factor)

    @property
    def band(self) -> int:
        return len(self.banded) - 1

    @cached_property
    def log_det(self) -> float:
        return 2.0 * float(np.log(self.banded[0]).sum())

    def variances(self) -> np.ndarray | None:
        """diag of (L L^T)^-1 where the band is at most 1, else None.

        S_jj = 1 / l_jj^2 + (l_j+1,j / l_jj)^2 S_j+1,j+1 (Takahashi's equations), a bidiagonal system.
        """
        if self.band > 1:
            return None
        start = self.banded[0] ** -2.0
        if self.band == 0:
            return start
        system = np.ones_like(self.banded)
        system[1] = -((self.banded[1] / self.banded[0]) ** 2)
        return lapack.dtbtrs(system, start, uplo="L", trans="T")[0].reshape(-1)

    def solve(self, right: np.ndarray) -> np.ndarray:
        if self.band == 0:
            return right / np.square(self.banded[0]).reshape(-1, *(1,) * (right.ndim - 1))
        return lapack.dpbtrs(self.banded, right, lower=1)[0].reshape(right.shape)

    def whiten_back(self, noise: np.ndarray) -> np.ndarray:
        """Noise (n, batch) -> draws of covariance (L L^T)^-1."""
        if self.band == 0:
            return noise / self.banded[0].reshape(-1, *(1,) * (noise.ndim - 1))
        return lapack.dtbtrs(self.banded, noise, uplo="L", trans="T")[0].reshape(noise.shape)

    def whiten(self, step: np.ndarray) -> np.ndarray:
        """The noise (n, batch) that `whiten_back` makes ``step`` of: L^T step."""
        out = self.banded[0][:, None] * step
        for below in range(1, self.band + 1):
            out[:-below] += self.banded[below, :-below, None] * step[below:]
        return out


@dataclass
class SuperCore:
    """SuperLU's factor of a symmetric matrix: P A P^T = L D L^T."""

    factor: Any
    order: np.ndarray
    lower: Any
    pivots: np.ndarray

    @classmethod
    def of(cls, matrix: Any) -> "SuperCore":
        try:
            factor = scipy.sparse.linalg.splu(
                matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True}
            )
        except RuntimeError as error:
            raise NotPositive from error
        pivots = factor.U.diagonal()
        if not (pivots > 0).all() or not np.array_equal(factor.perm_r, factor.perm_c):
            raise NotPositive
        return cls(factor, factor.perm_r, factor.L, pivots)

    @property
    def log_det(self) -> float:
        return float(np.log(self.pivots).sum())

    def solve(self, right: np.ndarray) -> np.ndarray:
        return self.factor.solve(np.ascontiguousarray(right) if right.ndim == 1 else np.asfortranarray(right))

    def whiten_back(self, noise: np.ndarray) -> np.ndarray:
        # A^-1 P^T L D^1/2 z = P^T L^-T D^-1/2 z: a product and a solve, as SuperLU solves with both factors.
        scale = np.sqrt(self.pivots).reshape(-1, *(1,) * (noise.ndim - 1))
        return self.solve((self.lower @ (scale * noise))[self.order])

    def whiten(self, step: np.ndarray) -> np.ndarray:
        """The noise (n, batch) that `whiten_back` makes ``step`` of: D^1/2 L^T P step."""
        permuted = np.empty_like(step)
        permuted[self.order] = step
        return np.sqrt(self.pivots)[:, None] * (self.lower.T @ permuted)


@dataclass
class Factor:
    """Q = L L^T in the order core, border; vectors are (n,) or (n, batch) in the pattern's own order."""

    pattern: Pattern
    core: BandCore | SuperCore
    crossing: Any  # Q_cb
    solved: Any  # Q_cc^-1 Q_cb
    schur: np.ndarray | None  # lower factor of Q_bb - Q_bc Q_cc^-1 Q_cb

    @cached_property
    def log_det(self) -> float:
        border = 0.0 if self.schur is None else 2.0 * float(np.log(self.schur.diagonal()).sum())
        return self.core.log_det + border

    def solve(self, right: np.ndarray) -> np.ndarray:
        """Q^-1 right."""
        if self.pattern.whole:
            return self.core.solve(right)
        core, border = self.pattern.core, self.pattern.border
        out = np.empty_like(right)
        inner = self.core.solve(right[core]) if len(core) else right[core]
        if self.schur is not None:
            rest = right[border] - self.crossing.T @ inner
            outer = scipy.linalg.cho_solve((self.schur, True), rest)
            inner = inner - self.solved @ outer
            out[border] = outer
        out[core] = inner
        return out

    def whiten_back(self, noise: np.ndarray) -> np.ndarray:
        """Standard normals to draws of N(0, Q^-1)."""
        if self.pattern.whole:
            return self.core.whiten_back(noise)
        core, border = self.pattern.core, self.pattern.border
        out = np.empty_like(noise)
        inner = self.core.whiten_back(noise[core]) if len(core) else noise[core]
        if self.schur is not None:
            outer = scipy.linalg.solve_triangular(self.schur, noise[border], lower=True, trans=1)
            inner = inner - self.solved @ outer
            out[border] = outer
        out[core] = inner
        return out

    def whiten(self, step: np.ndarray) -> np.ndarray:
        """The standard normals (n, batch) that `whiten_back` makes ``step`` of."""
        core, border = self.pattern.core, self.pattern.border
        out, inner = np.empty_like(step), step[core]
        if self.schur is not None:
            inner = inner + self.solved @ step[border]
            out[border] = self.schur.T @ step[border]
        out[core] = self.core.whiten(inner) if len(core) else inner
        return out


def variances(factor: Factor) -> np.ndarray | None:
    """diag Q^-1 where it is cheap: a core of band 0 or 1 and a small border; else None."""
    core = factor.core.variances() if isinstance(factor.core, BandCore) else None
    pattern = factor.pattern
    if core is None:
        return None
    out = np.empty(pattern.size)
    if factor.schur is not None:
        inverse = scipy.linalg.cho_solve((factor.schur, True), np.eye(len(pattern.border)))
        spread = factor.solved @ inverse
        through = (
            factor.solved * spread
            if isinstance(factor.solved, np.ndarray)
            else factor.solved.multiply(spread)
        )
        core = core + np.asarray(through.sum(1)).reshape(-1)
        out[pattern.border] = inverse.diagonal()
    out[pattern.core] = core
    return out


def lower_pattern(size: int, row: np.ndarray, col: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places of the lower triangle with the whole diagonal, once each, and their keys row * size + col."""
    low, high = np.maximum(row, col), np.minimum(row, col)
    diagonal = np.arange(size, dtype=np.int64) * (size + 1)
    keys = np.unique(np.concatenate([diagonal, low.astype(np.int64) * size + high]))
    return keys // size, keys % size, keys


def choose_pattern(size: int, row: np.ndarray, col: np.ndarray, blocks: list[slice]) -> Pattern:
    """The elimination of least estimated cost.

    Args:
        size: n.
        row: of the lower triangle.
        col: of the lower triangle.
        blocks: ranges of variables that belong together: one of them may be the core.
    """
    degree = np.bincount(row, minlength=size) + np.bincount(col, minlength=size) - 2
    busy = np.flatnonzero(degree > max(64, 8 * math.sqrt(size)))
    candidates = [np.zeros(0, np.int64)] if size <= 300 or not len(busy) else []
    if 0 < len(busy) <= MAX_BORDER:
        candidates.append(busy)
    inside = np.ones(size, dtype=bool)
    for block in sorted(blocks, key=lambda b: b.start - b.stop)[:3]:
        inside[:] = True
        inside[block] = False
        rest = np.flatnonzero(inside)
        both = np.union1d(rest, busy)
        for border in (rest, both) if len(both) > len(rest) else (rest,):
            if 0 < len(border) <= MAX_BORDER:
                candidates.append(border)
    if size <= MAX_BORDER:
        candidates.append(np.arange(size))  # dense
    if not candidates:
        candidates.append(np.zeros(0, np.int64))
    patterns = [Pattern(size, row, col, np.asarray(border, dtype=np.int64)) for border in candidates]
    return min(patterns, key=_cost)


def _cost(pattern: Pattern) -> float:
    """Operations of one factorisation, roughly; a sparse core by the fill of a planar graph."""
    core, border = len(pattern.core), len(pattern.border)
    crossing = len(pattern._crossing)
    if pattern.band == 0:
        inner = core + crossing**2 / max(core, 1)
    elif pattern.is_banded:
        inner = 20 * core * (pattern.band + 2) ** 2 + 20 * core * border * (pattern.band + 1)
    else:
        density = len(pattern._inner) / max(core, 1)
        planar = 60 * core**1.5 * density
        inner = planar if density <= 8 else max(planar, 0.5 * core**3)  # a random graph fills up
        inner += 60 * core * density * border * math.log2(core + 2)
    return inner + 2 * border**3 / 3 + 200 * border**2
