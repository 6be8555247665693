"""NUTS in the coordinates of `NoiseAxes`, whole ticks compiled: the density, the leapfrog and the tree.

As in `_kernels`, arrays are written in place and the interpreter lock is released.
"""

import math

import numpy as np
from numba import njit

from bayestie._engines._kernels import FAST, advance_lane, propose_lane, record_lane, start_lane


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def axes_density(z, axes, column, rate, prior, slope):
    """`AxesDensity.value_and_grad`: z (P, batch, D); prior and slope of h (P, batch); the rest in `_axes`."""
    points, batch, _ = z.shape
    value, grad = np.empty((points, batch), z.dtype), np.empty_like(z)
    for i in range(points):
        for j in range(batch):
            value[i, j] = _axes(z[i, j], i, axes, column, rate, prior[i, j], slope[i, j], grad[i, j])
    return value, grad


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _axes(z, i, axes, column, rate, prior, slope, grad):
    """Log density of point i at z (D,), its gradient written to ``grad``.

    ``axes`` are centre, width, from_data, from_prior, eigenvalues and ones (P, D); least, count and
    constant (P,).
    """
    centre, width, from_data, from_prior = axes[0][i], axes[1][i], axes[2][i], axes[3][i]
    eigenvalues, ones = axes[4][i], axes[5][i]
    least, count, constant = axes[6][i], axes[7][i], axes[8][i]
    h = centre[column] + width[column] * z[column]
    precision = math.exp(-2.0 * rate * h)
    by_data, by_prior = 0.0, 0.0
    for d in range(len(z)):
        at = centre[d] + width[d] * z[d]
        data = from_data[d] - eigenvalues[d] * at
        prior_pull = from_prior[d] - ones[d] * at
        by_data += at * (from_data[d] + data)
        by_prior += at * (from_prior[d] + prior_pull)
        grad[d] = (prior_pull + precision * data) * width[d]
    squares = least - by_data
    grad[column] = (slope - count + rate * precision * squares) * width[column]
    return constant + prior - count * h - 0.5 * precision * squares + 0.5 * by_prior


@njit(cache=True, nogil=True, error_model="numpy")
def interpolate(h, low, step, table, value, slope):
    """Cubic Hermite interpolation; ``table`` holds values and slopes times the step."""
    for i in range(h.shape[0]):
        for j in range(h.shape[1]):
            value[i, j], slope[i, j] = _interpolate(h[i, j], low, step, table)


@njit(cache=True, nogil=True, error_model="numpy")
def _interpolate(h, low, step, table):
    x = (h - low) / step
    cell = min(max(int(x), 0), len(table) - 2)
    t = x - cell
    left, right = table[cell, 0], table[cell + 1, 0]
    from_left, from_right = table[cell, 1], table[cell + 1, 1]
    rise = right - left
    square = 3.0 * rise - 2.0 * from_left - from_right
    cube = from_left + from_right - 2.0 * rise
    value = left + t * (from_left + t * (square + t * cube))
    return value, (from_left + t * (2.0 * square + 3.0 * t * cube)) / step


# Why a lane stands still within a block.
MOVES, WANTS_MOMENTUM, WANTS_PRIOR = 0, 1, 2


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def block(trees, ends_that_grow, noise, lanes, rounds, density, prior, until):
    """Ticks of every lane up to ``until``, lane after lane: what one touches stays in the core's cache.

    Args:
        trees: as of `advance_lane`, of all lanes.
        ends_that_grow: forward and diverging (L,), and the greatest depth.
        noise: uniforms (ticks, L, 4), momenta ready (M, L, D), steps (L,).
        lanes: of every lane, the tick it comes to (L,), why it stands (L,), whether its next tick starts a
            trajectory (L,), and momenta used (L,).
        rounds: lane, count, positions and statistics as of `record`; trajectories that ended and the sum of
            their acceptance rates, raised (L, 2).
        density: axes, column and rate as of `_axes`; lanes of a point.
        prior: where there is a table of h, its step and it; values and slopes given (L, 2), and whether
            they are (L,); h where they are wanted (L,).

    Returns:
        Leapfrogs.
    """
    last, drawn, sub, ends, sums, checkpoints, numbers, counts = trees
    uniforms, momenta, steps = noise
    tick, stands, pending, used = lanes
    lane, count, positions, statistics, tally = rounds
    axes, column, exponent, width = density
    (low, high), cell, table, given, is_given, wanted = prior
    forward, diverging, max_depth = ends_that_grow
    dim, num_draws = positions.shape[2], positions.shape[1] - 1
    z, middle, pull = np.empty(dim), np.empty(dim), np.empty(dim)
    leapfrogs = 0
    for i in range(len(count)):
        point = i // width
        tree = (last[i], drawn[i], sub[i], ends[i], sums[i], checkpoints[i], numbers[i], counts[i])
        stands[i] = MOVES
        while tick[i] < until and count[i] < num_draws:
            if pending[i]:
                if used[i] >= len(momenta):
                    stands[i] = WANTS_MOMENTUM
                    break
                numbers[i, 3] = steps[i]
                start_lane(last[i], drawn[i], ends[i], sums[i], numbers[i], counts[i], momenta[used[i], i])
                forward[i] = 1 if uniforms[tick[i], i, 0] >= 0.5 else 0
                used[i] += 1
                pending[i] = False
            propose_lane(ends[i, forward[i]], numbers[i, 3] * (2 * forward[i] - 1), z, middle)
            h = axes[0][point, column] + axes[1][point, column] * z[column]
            if is_given[i]:
                log_prior, slope = given[i, 0], given[i, 1]
                is_given[i] = False
            elif low < h < high:
                log_prior, slope = _interpolate(h, low, cell, table)
            else:
                wanted[i], stands[i] = h, WANTS_PRIOR
                break
            value = _axes(z, point, axes, column, exponent, log_prior, slope, pull)
            leaf = (z, middle, value, value, pull)
            row = uniforms[tick[i], i]
            diverging[i], done, forward[i] = advance_lane(tree, forward[i], max_depth, leaf, row)
            leapfrogs += 1
            tick[i] += 1
            if done:
                pending[i] = True
                tally[i, 0] += 1.0
                tally[i, 1] += numbers[i, 4] / counts[i, 1]
                slot = count[i]
                record_lane(
                    last[i],
                    numbers[i],
                    counts[i],
                    diverging[i],
                    positions[lane[i], slot],
                    statistics[lane[i], slot],
                )
                count[i] += 1
        if count[i] >= num_draws and tick[i] < until:
            tick[i] = until
    return leapfrogs
