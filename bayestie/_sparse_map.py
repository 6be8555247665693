"""The sparse affine map of a function that takes few entries of a long vector per row, from few evaluations.

An entry's column is read off a coded vector: where a row holds one entry a of a group of columns, f(1) - f(0)
is a and f(code) - f(0) is a code_j. Rows with several are taken apart by colouring the columns (Curtis,
Powell and Reid 1974, On the estimation of sparse Jacobian matrices), with colours drawn anew until every row
is resolved. Every answer is checked at vectors that had no part in it.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import scipy.sparse as sp

TOLERANCE = 1e-9
_ONE_BY_ONE = 32  # groups up to this size are probed column by column
_COLOURS = (
    2,
    3,
    5,
    16,
    16,
    16,
    32,
    32,
    32,
    32,
    64,
    64,
)  # of columns, attempt after attempt; from the fourth on at random


class NotSparseMap(Exception):
    """The function is not affine, or its rows hold too many entries to find."""


def find_map(
    evaluate: Callable[[np.ndarray], np.ndarray], groups: Sequence[np.ndarray], size: int, seed: int = 0
) -> tuple[sp.csr_array, np.ndarray]:
    """A (M, size) and b (M,) with evaluate(x) = A x + b.

    Args:
        evaluate: x (size,) -> (M,).
        groups: columns of which most rows take at most one: the copies of one tied site, per event element.
        size: length of x.
        seed: of the probes.

    Raises:
        NotSparseMap: no such map was found.
    """
    rng = np.random.default_rng([seed, 17])
    offset = evaluate(np.zeros(size))
    prober = _Prober(evaluate, offset, size, rng)
    rows, columns, values = [], [], []
    for group in groups:
        for row, column, value in prober.entries(group):
            rows.append(row)
            columns.append(column)
            values.append(value)
    parts = [np.concatenate(x) if x else np.zeros(0, int) for x in (values, rows, columns)]
    matrix = sp.csr_array((parts[0].astype(float), (parts[1], parts[2])), shape=(len(offset), size))
    for _ in range(2):
        at = 0.7 * rng.standard_normal(size)
        found, predicted = evaluate(at), matrix @ at + offset
        if not (np.abs(found - predicted) <= TOLERANCE * (1.0 + np.abs(found))).all():
            raise NotSparseMap("the predictors are not affine in the copies")
    return matrix, offset


class _Prober:
    def __init__(self, evaluate, offset: np.ndarray, size: int, rng: np.random.Generator):
        self.evaluate, self.offset, self.size, self.rng = evaluate, offset, size, rng

    def change(self, columns: np.ndarray, values: np.ndarray | float) -> np.ndarray:
        x = np.zeros(self.size)
        x[columns] = values
        found = self.evaluate(x) - self.offset
        # Rounding of the offset is no entry.
        found[np.abs(found) <= 1e-13 * (1.0 + np.abs(self.offset))] = 0.0
        return found

    def entries(self, group: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
        if len(group) <= _ONE_BY_ONE:
            for column in group:
                found = self.change(np.array([column]), 1.0)
                row = np.flatnonzero(found)
                yield row, np.full(len(row), column), _clean(found[row])
            return
        row, column, value, open_rows = self._single(group, np.ones(len(self.offset), bool))
        yield row, column, value
        if open_rows.any():
            yield from self._coloured(group, open_rows)

    def _coloured(self, group: np.ndarray, open_rows: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
        """Entries of rows with several: each alone in some colour, until they explain the row."""
        noise = 0.5 * self.rng.standard_normal(len(group))
        target = self.change(group, noise)
        place = np.arange(len(group))
        keys, values = np.zeros(0, int), np.zeros(0)
        for attempt, num in enumerate(_COLOURS):
            colour = place % num if attempt < 3 else self.rng.integers(0, num, len(group))
            for c in range(num):
                row, where, value, _ = self._single(place[colour == c], open_rows, group)
                keys = np.concatenate([keys, row * len(group) + where])
                values = np.concatenate([values, value])
            keys, first = np.unique(keys, return_index=True)
            values = values[first]
            row, where = np.divmod(keys, len(group))
            explained = np.bincount(row, values * noise[where], len(open_rows))
            done = open_rows & (np.abs(explained - target) <= TOLERANCE * (1e-3 + np.abs(target)))
            kept = done[row]
            yield row[kept], group[where[kept]], values[kept]
            open_rows = open_rows & ~done
            if not open_rows.any():
                return
            kept = open_rows[row]
            keys, values = keys[kept], values[kept]
        raise NotSparseMap("a predictor takes many copies of one tied site")

    def _single(self, group: np.ndarray, wanted: np.ndarray, within: np.ndarray | None = None):
        """Entries of the wanted rows that hold at most one column of the group, and the rows that hold more.

        Where ``within`` is given, the group is places in it, and so are the columns found.
        """
        columns = group if within is None else within[group]
        num = len(group)
        if not num:
            return np.zeros(0, int), np.zeros(0, int), np.zeros(0), np.zeros_like(wanted)
        code = (1.0 + np.arange(num)) / num
        noise = 0.5 * self.rng.standard_normal(num)
        ones, coded, random = (self.change(columns, v) for v in (1.0, code, noise))
        touched = wanted & ((ones != 0) | (coded != 0) | (random != 0))
        row = np.flatnonzero(touched)
        with np.errstate(divide="ignore", invalid="ignore"):
            guess = coded[row] / ones[row] * num - 1.0
        place = np.where(np.isfinite(guess), np.clip(np.rint(guess), 0, num - 1), 0).astype(int)
        scale = TOLERANCE * (1e-3 + np.abs(ones[row]) + 1e-6 * np.abs(self.offset[row]))
        good = (np.abs(coded[row] - ones[row] * code[place]) <= scale) & (
            np.abs(random[row] - ones[row] * noise[place]) <= scale
        )
        unresolved = np.zeros_like(wanted)
        unresolved[row[~good]] = True
        row, place = row[good], place[good]
        return row, group[place], _clean(ones[row]), unresolved


def _clean(values: np.ndarray) -> np.ndarray:
    """Entries without the rounding of a link and its inverse: 1, not 1 + 2e-16."""
    whole = np.rint(values * 64) / 64
    return np.where(np.abs(values - whole) <= 1e-13 * np.maximum(1.0, np.abs(values)), whole, values)
