"""The variables at one point of a sweep: which copies are free, the pattern of P + A^T W A, the levels.

Points of one structure share everything but numbers.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp

from bayestie._copy_coordinates import CopyProgram, NotSparse
from bayestie._sparse_factor import choose_pattern, lower_pattern
from bayestie._sparse_prior import PriorPart

MAX_PRODUCTS = 60_000_000  # pairs of entries in the rows of A
MAX_DIRECTIONS = 400


class Structure:
    """Points of a sweep with the same variables: which copies are free, one hard parameter, or fixed.

    ``variables`` x are reduced: copies at sigma = 0 are their levels. x_full = expand x + shift.

    Args:
        copies: the program in the coordinates of its copies.
        matrix: A of the predictors eta = A x_full + b.
        parts: the prior of each block of copies.
        modes: of each block: ``"copies"``, ``"hard"`` or, for latents that are not tied, ``"plain"``.
    """

    def __init__(self, copies: CopyProgram, matrix: Any, parts: Sequence[PriorPart], modes: Sequence[str]):
        self.modes, self.starts = tuple(modes), []
        start, rows, cols, blocks = 0, [], [], []
        for block, part, mode in zip(copies.blocks, parts, modes, strict=True):
            self.starts.append(start)
            blocks.append(slice(start, start + part.size))
            if mode == "hard" and part.size:
                labels = copies.tied[block.name].infer["bayestie"]["tie"].labels.numpy()
                index = labels[:, None] * block.num_events + np.arange(block.num_events)
                place = np.arange(block.start, block.start + block.size)
                rows.append(place)
                cols.append(start + index.ravel())
            elif mode != "hard":
                rows.append(np.arange(block.start, block.start + block.size))
                cols.append(np.arange(start, start + block.size))
            start += part.size
        self.size = start
        row, col = (np.concatenate(x) if x else np.zeros(0, int) for x in (rows, cols))
        self.expand: Any = sp.csr_array((np.ones(len(row)), (row, col)), shape=(copies.num_x, start))
        self.is_whole = self.expand.shape == (start, start) and bool((col == np.arange(start)).all())
        self.map: Any = sp.csr_array(matrix @ self.expand)
        self.map.sum_duplicates()
        self.transposed: Any = sp.csr_array(self.map.T)
        self._lay_out_precision(parts, blocks)
        self._lay_out_directions(parts)

    def _lay_out_precision(self, parts: Sequence[PriorPart], blocks: list[slice]) -> None:
        prior_row = np.concatenate(
            [r + s for p, s in zip(parts, self.starts, strict=True) for r in p.row] or [np.zeros(0, int)]
        ).astype(np.int64)
        prior_col = np.concatenate(
            [c + s for p, s in zip(parts, self.starts, strict=True) for c in p.col] or [np.zeros(0, int)]
        ).astype(np.int64)
        counts = np.diff(self.map.indptr)
        if int((counts.astype(np.int64) ** 2).sum()) > MAX_PRODUCTS:
            raise NotSparse("observations depend on too many copies each")
        observation, left, right = _pairs(self.map)
        gram_row, gram_col = (np.maximum, np.minimum)
        places_row = gram_row(self.map.indices[left], self.map.indices[right])
        places_col = gram_col(self.map.indices[left], self.map.indices[right])
        row, col, keys = lower_pattern(
            self.size, np.concatenate([prior_row, places_row]), np.concatenate([prior_col, places_col])
        )
        self.pattern = choose_pattern(self.size, row, col, blocks)
        self._prior_place = _find(keys, self.size, prior_row, prior_col)
        place = _find(keys, self.size, places_row, places_col)
        products = self.map.data[left] * self.map.data[right]
        # Curvature of the likelihood is linear in its weights: one sparse product per Newton step.
        self._gram = sp.csr_array((products, (place, observation)), shape=(len(keys), self.map.shape[0]))

    def _lay_out_directions(self, parts: Sequence[PriorPart]) -> None:
        found = [
            (places + start, weight)
            for part, start in zip(parts, self.starts, strict=True)
            for places, weight in part.directions
        ]
        if len(found) > MAX_DIRECTIONS:
            raise NotSparse(f"it has {len(found)} levels that are means, at most {MAX_DIRECTIONS} may be")
        # Where data leave the sum of all copies of a component open, P + A^T W A is singular without its
        # level's prior: a pin on one copy, taken off again as a direction of negative variance.
        diagonal = self.curvature(np.ones(self.map.shape[0]))
        held = self._along(found, diagonal)
        self.pins = [int(found[i][0][0]) for i in range(len(found))] if held else []
        indices = [places for places, _ in found] + [np.array([pin]) for pin in self.pins]
        weights = [np.full(len(p), w) for p, w in found] + [np.ones(1) for _ in self.pins]
        columns = np.repeat(np.arange(len(indices)), [len(p) for p in indices])
        row = np.concatenate(indices) if indices else np.zeros(0, int)
        data = np.concatenate(weights) if weights else np.zeros(0)
        self.directions: Any = sp.csc_array((data, (row, columns)), shape=(self.size, len(indices)))
        self.pin_places = np.array([self._diagonal_place(pin) for pin in self.pins], dtype=np.int64)

    def _along(self, found: list[tuple[np.ndarray, float]], gram: np.ndarray) -> bool:
        """Whether constant components are (nearly) not held by the data."""
        if not found:
            return False
        row, col = self.pattern.row, self.pattern.col
        columns = np.repeat(np.arange(len(found)), [len(p) for p, _ in found])
        ones = sp.csr_array(
            (np.ones(len(columns)), (np.concatenate([p for p, _ in found]), columns)),
            shape=(self.size, len(found)),
        )
        lower = sp.csr_array((gram, (row, col)), shape=(self.size, self.size))
        half = lower @ ones
        both = (ones.T @ half).toarray()
        diagonal = sp.dia_array((gram[row == col][None], [0]), shape=(self.size, self.size))
        full = both + both.T - (ones.T @ (diagonal @ ones)).toarray()
        scale = np.sqrt(full.diagonal())
        if (scale == 0).any():
            return True
        return bool(np.linalg.eigvalsh(full / scale[:, None] / scale)[0] < 1e-6)

    def _diagonal_place(self, variable: int) -> int:
        return int(np.flatnonzero((self.pattern.row == variable) & (self.pattern.col == variable))[0])

    def curvature(self, weights: np.ndarray) -> np.ndarray:
        """A^T W A on the pattern."""
        return self._gram @ weights

    def prior_precision(self, parts: Sequence[PriorPart]) -> np.ndarray:
        values = np.concatenate([v for p in parts for v in p.value] or [np.zeros(0)])
        return np.bincount(self._prior_place, values, len(self.pattern.row))

    def matrix(self, data: np.ndarray) -> sp.csr_array:
        """The whole symmetric matrix with these entries of its lower triangle."""
        place, indices, starts = self._whole
        return sp.csr_array((data[place], indices, starts), shape=(self.size, self.size))

    @cached_property
    def _whole(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        row, col = self.pattern.row, self.pattern.col
        off = np.flatnonzero(row != col)
        places = np.concatenate([np.arange(len(row)), off]) + 1.0
        shape = (self.size, self.size)
        both = sp.coo_array((places, (np.r_[row, col[off]], np.r_[col, row[off]])), shape=shape).tocsr()
        both.sort_indices()
        return both.data.astype(np.int64) - 1, both.indices, both.indptr


def _find(keys: np.ndarray, size: int, row: np.ndarray, col: np.ndarray) -> np.ndarray:
    low, high = np.maximum(row, col), np.minimum(row, col)
    return np.searchsorted(keys, low.astype(np.int64) * size + high)


def _pairs(matrix: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row and both entries of every unordered pair of entries of a row, an entry with itself among them."""
    counts = np.diff(matrix.indptr)
    rows, lefts, rights = [], [], []
    for count in np.unique(counts):
        if count == 0:
            continue
        own = np.flatnonzero(counts == count)
        left, right = np.tril_indices(count)
        first = matrix.indptr[own][:, None]
        rows.append(np.repeat(own, len(left)))
        lefts.append((first + left).ravel())
        rights.append((first + right).ravel())
    if not rows:
        return np.zeros(0, int), np.zeros(0, int), np.zeros(0, int)
    return np.concatenate(rows), np.concatenate(lefts), np.concatenate(rights)
