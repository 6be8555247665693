"""One draw of many quantities into the sums that `Streamed` keeps, in one pass; compiled by numba."""

from numba import njit


@njit(cache=True, nogil=True, error_model="numpy")
def add(step, tails, running, total, squares, binned, histogram):
    """Chains of a group on by a draw each.

    Args:
        step: distances from the centre (chains, n).
        tails: low and high (2, n).
        running: sums of the value and of both tail indicators, raised (chains, 3, n).
        total: sum of the group, raised (n,).
        squares: its sum of squares, raised (n,).
        binned: scale (n,), reach in scales, and bins to a scale.
        histogram: counts, raised (n, bins); without any columns none is kept.
    """
    scale, reach, per_scale = binned
    last = histogram.shape[1] - 1
    for chain in range(len(step)):
        here, sums = step[chain], running[chain]
        values, below, above = sums[0], sums[1], sums[2]
        for i in range(len(here)):
            x = here[i]
            values[i] += x
            below[i] += x <= tails[0, i]
            above[i] += x >= tails[1, i]
            total[i] += x
            squares[i] += x * x
        if last > 0:
            for i in range(len(here)):
                place = (here[i] / scale[i] + reach) * per_scale
                histogram[i, int(min(max(place, 0.0), last))] += 1
