"""NUTS where likelihoods see the latents through affine predictors, whole ticks compiled.

Chains of a point take their leapfrogs together, a few side by side, so that a row of the map is read once for
all of them and arithmetic is on vectors. As in `_kernels`, arrays are written in place and the interpreter
lock is released.
"""

import math

import numpy as np
from numba import njit

from bayestie._engines._kernels import FAST, advance_lane, propose_lane, record_lane, start_lane

SIDE_BY_SIDE = 8  # chains: what the sums below are unrolled for
LOGISTIC, POISSON = 0, 1  # A(eta) = log(1 + exp eta), exp eta
# Why a lane stands still within a block.
MOVES, WANTS_MOMENTUM = 0, 1
_FACTORS = 512  # of at most 2: their product does not overflow
# Sums in the order written: a compiler free to choose makes vectors of the few entries of a row.
IN_ORDER = {"contract", "nsz"}
_LOG2E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 0.693147180369123816490, 1.90821492927058770002e-10
_SHIFT = 6755399441055744.0  # 1.5 * 2^52: adding it leaves the nearest whole number in the lowest bits
_C3, _C4, _C5, _C6, _C7, _C8, _C9, _C10, _C11, _C12, _C13 = (1.0 / math.factorial(n) for n in range(3, 14))


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def affine_density(z, density):
    """Log densities of u and of z (P, batch) at z (P, batch, D), and the gradient of the latter by z."""
    points, batch, dim = z.shape
    value, own, grad = np.empty((points, batch)), np.empty((points, batch)), np.empty_like(z)
    work = _workspace(dim, density)
    at, pull = np.zeros((SIDE_BY_SIDE, dim)), np.empty((SIDE_BY_SIDE, dim))
    numbers = np.empty((2, SIDE_BY_SIDE))
    for i in range(points):
        for begin in range(0, batch, SIDE_BY_SIDE):
            count = min(SIDE_BY_SIDE, batch - begin)
            at[:count] = z[i, begin : begin + count]
            _evaluate(at, i, density, work, numbers, pull)
            grad[i, begin : begin + count] = pull[:count]
            value[i, begin : begin + count] = numbers[0, :count]
            own[i, begin : begin + count] = numbers[1, :count]
    return value, own, grad


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def block(trees, ends_that_grow, noise, lanes, rounds, density, until):
    """Ticks of every lane up to ``until``.

    Args:
        trees: as of `advance_lane`, of all lanes.
        ends_that_grow: forward and diverging (L,), and the greatest depth.
        noise: uniforms (ticks, L, 4), momenta ready (M, L, D), steps (L,).
        lanes: of every lane, the tick it comes to (L,), why it stands (L,), whether its next tick starts a
            trajectory (L,), and momenta used (L,).
        rounds: lane, count, positions and statistics as of `record`; trajectories that ended and the sum of
            their acceptance rates, raised (L, 2).
        density: as of `_evaluate`.

    Returns:
        Leapfrogs.
    """
    last, drawn, sub, ends, sums, checkpoints, numbers, counts = trees
    forward, diverging, max_depth = ends_that_grow
    uniforms, momenta, steps = noise
    tick, stands, pending, used = lanes
    lane, count, positions, statistics, tally = rounds
    dim, num_draws = positions.shape[2], positions.shape[1] - 1
    points = len(density[0][0])
    width = len(count) // points
    work = _workspace(dim, density)
    z, middle = np.zeros((SIDE_BY_SIDE, dim)), np.empty((SIDE_BY_SIDE, dim))
    pull, values = np.empty((SIDE_BY_SIDE, dim)), np.empty((2, SIDE_BY_SIDE))
    moving = np.empty(SIDE_BY_SIDE, np.int64)
    stands[:] = MOVES
    leapfrogs = 0
    for point in range(points):
        for begin in range(point * width, (point + 1) * width, SIDE_BY_SIDE):
            end = min(begin + SIDE_BY_SIDE, (point + 1) * width)
            while True:
                together = 0
                for i in range(begin, end):
                    if tick[i] >= until or count[i] >= num_draws or stands[i] != MOVES:
                        continue
                    if pending[i]:
                        if used[i] >= len(momenta):
                            stands[i] = WANTS_MOMENTUM
                            continue
                        numbers[i, 3] = steps[i]
                        momentum = momenta[used[i], i]
                        start_lane(last[i], drawn[i], ends[i], sums[i], numbers[i], counts[i], momentum)
                        forward[i] = 1 if uniforms[tick[i], i, 0] >= 0.5 else 0
                        used[i] += 1
                        pending[i] = False
                    signed = numbers[i, 3] * (2 * forward[i] - 1)
                    propose_lane(ends[i, forward[i]], signed, z[together], middle[together])
                    moving[together] = i
                    together += 1
                if together == 0:
                    break
                _evaluate(z, point, density, work, values, pull)
                leapfrogs += together
                for k in range(together):
                    i = moving[k]
                    vectors = (last[i], drawn[i], sub[i], ends[i], sums[i], checkpoints[i])
                    tree = (*vectors, numbers[i], counts[i])
                    leaf = (z[k], middle[k], values[0, k], values[1, k], pull[k])
                    row = uniforms[tick[i], i]
                    diverging[i], done, forward[i] = advance_lane(tree, forward[i], max_depth, leaf, row)
                    tick[i] += 1
                    if done:
                        pending[i] = True
                        tally[i, 0] += 1.0
                        tally[i, 1] += numbers[i, 4] / counts[i, 1]
                        kept, facts = positions[lane[i], count[i]], statistics[lane[i], count[i]]
                        record_lane(last[i], numbers[i], counts[i], diverging[i], kept, facts)
                        count[i] += 1
    for i in range(len(count)):
        if count[i] >= num_draws and tick[i] < until:
            tick[i] = until
    return leapfrogs


@njit(cache=True, nogil=True, error_model="numpy")
def _workspace(dim, density):
    rows = density[0][5].shape[1]
    shape = (dim, SIDE_BY_SIDE)
    vectors = (np.empty(shape), np.empty(shape), np.empty(shape), np.empty(shape), np.empty(shape))
    return vectors, np.empty((SIDE_BY_SIDE, rows)), np.empty((2, rows))


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _evaluate(z, point, density, work, values, grad):
    """Log densities of u and of z at every row of z, to ``values``, and the gradient of the latter.

    With u = mode + factor T(scale z) the log density is constant + slope T + T bend T / 2 - sum w A(eta),
    eta = offset + map factor T.

    ``density``: constant (P,), slope (P, D), bend and factor (P, D, D), scale (P, D) and offset (P, M); the
    map, by rows and by columns; the likelihoods' first rows, kinds, whether they are weighted, and weights
    (P, M); the splines T (P, D, cells, 4), none for T z = z, and how far they go.
    """
    quadratic, map_rows, likelihoods, splines = density
    constant, slope, bend, factor, scale, offset = quadratic
    (t, moved, pull, rise, bow), eta, odds = work
    dim = len(t)
    coefficients, reach = splines
    has_map = len(coefficients) > 0
    for k in range(SIDE_BY_SIDE):
        values[0, k], values[1, k] = constant[point], 0.0
    for j in range(dim):
        for k in range(SIDE_BY_SIDE):
            t[j, k] = z[k, j] * scale[point, j]
    if has_map:
        _bend(t, coefficients[point], reach, rise, bow, values[1])
    _multiply(bend[point], t, pull)
    for j in range(dim):
        for k in range(SIDE_BY_SIDE):
            values[0, k] += t[j, k] * (slope[point, j] + 0.5 * pull[j, k])
            pull[j, k] += slope[point, j]
    if eta.shape[1]:
        first, column, by_row, start, row, by_column = map_rows
        _multiply(factor[point], t, moved)
        _predictors(first, column, by_row[point], offset[point], moved, eta)
        _likelihoods(point, likelihoods, eta, odds, values[0])
        _back(start, row, by_column[point], eta, moved)
        _multiply_transposed(factor[point], moved, pull)
    for k in range(SIDE_BY_SIDE):
        values[1, k] += values[0, k]
    for j in range(dim):
        for k in range(SIDE_BY_SIDE):
            slope_of_z = pull[j, k]
            if has_map:
                slope_of_z = slope_of_z * rise[j, k] + bow[j, k] / rise[j, k]
            grad[k, j] = slope_of_z * scale[point, j]


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _bend(t, spline, reach, rise, bow, log_volume):
    """Cubic splines along the axes, `AxisMap`: t (D, K) becomes T, with T', T'' and the sum of log T'."""
    dim, cells = spline.shape[:2]
    width = 2.0 * reach / cells
    for j in range(dim):
        for k in range(SIDE_BY_SIDE):
            at = t[j, k]
            inside = min(max(at, -reach), reach)
            cell = min(int((inside + reach) / width), cells - 1)
            c3, c2, c1, c0 = spline[j, cell, 0], spline[j, cell, 1], spline[j, cell, 2], spline[j, cell, 3]
            s = inside - (cell * width - reach)
            rise[j, k] = (3.0 * c3 * s + 2.0 * c2) * s + c1
            bow[j, k] = 6.0 * c3 * s + 2.0 * c2 if at == inside else 0.0
            t[j, k] = ((c3 * s + c2) * s + c1) * s + c0 + rise[j, k] * (at - inside)
            log_volume[k] += math.log(rise[j, k])


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _multiply(matrix, x, out):
    """matrix (D, D) times x (D, K)."""
    for i in range(len(matrix)):
        a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = 0.0
        for j in range(len(x)):
            c = matrix[i, j]
            a0 += c * x[j, 0]
            a1 += c * x[j, 1]
            a2 += c * x[j, 2]
            a3 += c * x[j, 3]
            a4 += c * x[j, 4]
            a5 += c * x[j, 5]
            a6 += c * x[j, 6]
            a7 += c * x[j, 7]
        out[i, 0], out[i, 1], out[i, 2], out[i, 3] = a0, a1, a2, a3
        out[i, 4], out[i, 5], out[i, 6], out[i, 7] = a4, a5, a6, a7


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _multiply_transposed(matrix, x, out):
    """Add the transposed matrix (D, D) times x (D, K)."""
    for i in range(len(matrix)):
        a0, a1, a2, a3 = out[i, 0], out[i, 1], out[i, 2], out[i, 3]
        a4, a5, a6, a7 = out[i, 4], out[i, 5], out[i, 6], out[i, 7]
        for j in range(len(x)):
            c = matrix[j, i]
            a0 += c * x[j, 0]
            a1 += c * x[j, 1]
            a2 += c * x[j, 2]
            a3 += c * x[j, 3]
            a4 += c * x[j, 4]
            a5 += c * x[j, 5]
            a6 += c * x[j, 6]
            a7 += c * x[j, 7]
        out[i, 0], out[i, 1], out[i, 2], out[i, 3] = a0, a1, a2, a3
        out[i, 4], out[i, 5], out[i, 6], out[i, 7] = a4, a5, a6, a7


@njit(cache=True, nogil=True, fastmath=IN_ORDER, error_model="numpy")
def _predictors(first, column, entries, offset, x, eta):
    """eta (K, M) = offset + A x, A sparse by rows and x (D, K)."""
    for m in range(len(offset)):
        a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = offset[m]
        own, places = entries[first[m] : first[m + 1]], column[first[m] : first[m + 1]]
        for e in range(len(own)):
            c, row = own[e], x[places[e]]
            a0 += c * row[0]
            a1 += c * row[1]
            a2 += c * row[2]
            a3 += c * row[3]
            a4 += c * row[4]
            a5 += c * row[5]
            a6 += c * row[6]
            a7 += c * row[7]
        eta[0, m], eta[1, m], eta[2, m], eta[3, m] = a0, a1, a2, a3
        eta[4, m], eta[5, m], eta[6, m], eta[7, m] = a4, a5, a6, a7


@njit(cache=True, nogil=True, fastmath=IN_ORDER, error_model="numpy")
def _back(start, row, entries, slope, out):
    """out (D, K) = minus A transposed times ``slope`` (K, M), A sparse by columns."""
    s0, s1, s2, s3 = slope[0], slope[1], slope[2], slope[3]
    s4, s5, s6, s7 = slope[4], slope[5], slope[6], slope[7]
    for j in range(len(out)):
        a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = 0.0
        own, places = entries[start[j] : start[j + 1]], row[start[j] : start[j + 1]]
        for e in range(len(own)):
            c, m = own[e], places[e]
            a0 -= c * s0[m]
            a1 -= c * s1[m]
            a2 -= c * s2[m]
            a3 -= c * s3[m]
            a4 -= c * s4[m]
            a5 -= c * s5[m]
            a6 -= c * s6[m]
            a7 -= c * s7[m]
        out[j, 0], out[j, 1], out[j, 2], out[j, 3] = a0, a1, a2, a3
        out[j, 4], out[j, 5], out[j, 6], out[j, 7] = a4, a5, a6, a7


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _likelihoods(point, likelihoods, eta, work, value):
    """Take w A(eta) from ``value`` (K,); eta (K, M) becomes w A'(eta)."""
    starts, kinds, weighted, weights = likelihoods
    for part in range(len(kinds)):
        begin, end = starts[part], starts[part + 1]
        size, spare, weight = work[0, begin:end], work[1, begin:end], weights[point, begin:end]
        for k in range(SIDE_BY_SIDE):
            here = eta[k, begin:end]
            if kinds[part] == POISSON:
                total = _poisson(here, size)
            else:
                total = _logistic(here, size, spare, weighted[part])
            if weighted[part]:
                total = 0.0
                for m in range(len(here)):
                    total += weight[m] * size[m]
                    here[m] *= weight[m]
            value[k] -= total


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _poisson(eta, size):
    """The sum of A; ``size`` becomes A, eta A'."""
    exponential(eta, size)
    total = 0.0
    for m in range(len(eta)):
        total += size[m]
        eta[m] = size[m]
    return total


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _logistic(eta, size, spare, is_weighted):
    """The same; of A one by one only where these are to be weighted.

    A = max(eta, 0) + log(1 + odds), odds = exp(-|eta|): of a product one logarithm does.
    """
    for m in range(len(eta)):
        spare[m] = -abs(eta[m])
    exponential(spare, size)
    total = 0.0
    if is_weighted:
        for m in range(len(eta)):
            at, odds = eta[m], size[m]
            size[m] = max(at, 0.0) + math.log1p(odds)
            eta[m] = (1.0 if at >= 0.0 else odds) / (1.0 + odds)
        return total
    for begin in range(0, len(eta), _FACTORS):
        some, odds = eta[begin : begin + _FACTORS], size[begin : begin + _FACTORS]
        product = 1.0
        for m in range(len(some)):
            product *= 1.0 + odds[m]
            total += max(some[m], 0.0)
        total += math.log(product)
    for m in range(len(eta)):  # by itself, or the compiler makes no vectors of it
        eta[m] = (1.0 if eta[m] >= 0.0 else size[m]) / (1.0 + size[m])
    return total


@njit(cache=True, nogil=True, fastmath=IN_ORDER, error_model="numpy")
def exponential(x, out):
    """exp x to a unit of the last place, x held between -708 and 709, to another array: vectorised.

    exp x = 2^k exp r, |r| <= log(2) / 2 (Cody and Waite 1980), the latter by its series, 2^k by adding to the
    exponent's bits.
    """
    bits = out.view(np.int64)
    for i in range(len(x)):
        at = min(max(x[i], -708.0), 709.0)
        shifted = at * _LOG2E + _SHIFT
        k = shifted - _SHIFT
        r = (at - k * _LN2_HIGH) - k * _LN2_LOW
        out[i] = shifted
        exponent = bits[i] << 52
        series = _C12 + r * _C13
        series = _C11 + r * series
        series = _C10 + r * series
        series = _C9 + r * series
        series = _C8 + r * series
        series = _C7 + r * series
        series = _C6 + r * series
        series = _C5 + r * series
        series = _C4 + r * series
        series = _C3 + r * series
        out[i] = 1.0 + r * (1.0 + r * (0.5 + r * series))
        bits[i] += exponent
