"""What runs on the CPU for every leapfrog of every lane, compiled by numba and kept on disk.

Arrays come first and are written in place; the interpreter lock is released.
"""

import math

import numpy as np
from numba import njit

from bayestie._engines._trajectories import MAX_ENERGY_ERROR

# Sums may be taken in any order; infinities and NaN keep their meaning.
FAST = {"reassoc", "contract", "nsz"}


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def start(last, drawn, ends, sums, numbers, counts, forward, rows, momentum, uniform, step):
    dim = momentum.shape[1]
    for k in range(len(rows)):
        i = rows[k]
        # Slices first: the loops are vector operations only where every index is a plain counter.
        z, grad, p, total, sub_total = last[i, :dim], last[i, dim:], momentum[k], sums[i, 0], sums[i, 1]
        left, right = ends[i, 0], ends[i, 1]
        kinetic = 0.0
        for d in range(dim):
            total[d], sub_total[d] = p[d], 0.0
            kinetic += p[d] * p[d]
        for end in (left, right):
            _copy(end[:dim], z)
            _copy(end[dim : 2 * dim], p)
            _copy(end[2 * dim :], grad)
        _copy(drawn[i, : 2 * dim], last[i])
        energy = 0.5 * kinetic - last[i, 2 * dim + 1]
        drawn[i, 2 * dim], drawn[i, 2 * dim + 1] = last[i, 2 * dim], last[i, 2 * dim + 1]
        drawn[i, 2 * dim + 2] = energy
        numbers[i, 0], numbers[i, 1], numbers[i, 2] = 0.0, -np.inf, energy
        numbers[i, 3], numbers[i, 4] = step[i], 0.0
        counts[i] = 0
        forward[i] = 1 if uniform[i] >= 0.5 else 0


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def propose(ends, numbers, forward, z, half):
    dim = z.shape[1]
    for i in range(len(z)):
        end = ends[i, forward[i]]
        at, p, grad, new, middle = end[:dim], end[dim : 2 * dim], end[2 * dim :], z[i], half[i]
        signed = numbers[i, 3] * (2 * forward[i] - 1)
        for d in range(dim):
            middle[d] = p[d] + 0.5 * signed * grad[d]
            new[d] = at[d] + signed * middle[d]


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def advance(
    last,
    drawn,
    sub,
    ends,
    sums,
    checkpoints,
    numbers,
    counts,
    forward,
    diverging,
    done,
    max_depth,
    z,
    half,
    values,
    grad,
    uniforms,
):
    dim = z.shape[1]
    for i in range(len(z)):
        end = ends[i, forward[i]]
        p, sub_total, pull, middle = end[dim : 2 * dim], sums[i, 1], grad[i], half[i]
        signed = numbers[i, 3] * (2 * forward[i] - 1)
        kinetic = 0.0
        for d in range(dim):
            momentum = middle[d] + 0.5 * signed * pull[d]
            p[d] = momentum
            sub_total[d] += momentum
            kinetic += momentum * momentum
        _copy(end[:dim], z[i])
        _copy(end[2 * dim :], pull)
        energy = 0.5 * kinetic - values[i, 1]
        delta = numbers[i, 2] - energy
        if math.isnan(delta):
            delta = -np.inf
        diverging[i] = delta < -MAX_ENERGY_ERROR
        numbers[i, 4] += math.exp(min(delta, 0.0))

        # The leaf joins its subtree: multinomial sampling within the subtree.
        numbers[i, 1] = _log_add(numbers[i, 1], delta)
        if math.log(uniforms[i, 1]) < delta - numbers[i, 1]:
            _copy(sub[i, :dim], z[i])
            _copy(sub[i, dim : 2 * dim], pull)
            sub[i, 2 * dim], sub[i, 2 * dim + 1], sub[i, 2 * dim + 2] = values[i, 0], values[i, 1], energy
        broken = diverging[i] or _subtree_turns(checkpoints[i], p, sub_total, counts[i, 0])
        counts[i, 0] += 1
        counts[i, 1] += 1
        done[i] = broken
        if not broken and counts[i, 0] >= 1 << counts[i, 2]:
            # A whole subtree joins the tree: biased progressive sampling, doubling.
            if math.log(uniforms[i, 2]) < numbers[i, 1] - numbers[i, 0]:
                _copy(drawn[i], sub[i])
            total = sums[i, 0]
            for d in range(dim):
                total[d] += sub_total[d]
            numbers[i, 0] = _log_add(numbers[i, 0], numbers[i, 1])
            counts[i, 2] += 1
            left, right = ends[i, 0, dim : 2 * dim], ends[i, 1, dim : 2 * dim]
            done[i] = counts[i, 2] >= max_depth or _turns(left, right, sums[i, 0])
            if not done[i]:
                forward[i] = 1 if uniforms[i, 3] >= 0.5 else 0
                counts[i, 0], numbers[i, 1] = 0, -np.inf
                for d in range(dim):
                    sub_total[d] = 0.0
        if done[i]:
            _copy(last[i], drawn[i])


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _subtree_turns(checkpoints, p, total, leaf):
    """Keep the leaf where balanced subtrees begin with it; else whether one that it completes turns."""
    dim = len(p)
    top, rest = 0, leaf >> 1
    while rest:
        top, rest = top + 1, rest & (rest - 1)
    if leaf & 1 == 0:
        _copy(checkpoints[top, :dim], p)
        _copy(checkpoints[top, dim:], total)
        return False
    while leaf & 1:
        begin, before = checkpoints[top, :dim], checkpoints[top, dim:]
        at_left, at_right = 0.0, 0.0
        for d in range(dim):
            inner = total[d] - before[d] + begin[d] - 0.5 * (begin[d] + p[d])
            at_left += begin[d] * inner
            at_right += p[d] * inner
        if at_left <= 0.0 or at_right <= 0.0:
            return True
        top, leaf = top - 1, leaf >> 1
    return False


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _turns(left, right, total):
    at_left, at_right = 0.0, 0.0
    for d in range(len(total)):
        inner = total[d] - 0.5 * (left[d] + right[d])
        at_left += left[d] * inner
        at_right += right[d] * inner
    return at_left <= 0.0 or at_right <= 0.0


@njit(cache=True, nogil=True, error_model="numpy")
def _log_add(a, b):
    high, low = max(a, b), min(a, b)
    if low == -np.inf or high == np.inf:
        return high
    return high + math.log1p(math.exp(low - high))


@njit(cache=True, nogil=True, error_model="numpy")
def _copy(target, source):
    """An assignment of slices would check first whether they overlap."""
    for d in range(len(target)):
        target[d] = source[d]


@njit(cache=True, nogil=True, error_model="numpy")
def record(last, numbers, counts, diverging, rows, lane, count, z, statistics, kept, rate):
    num_draws, dim = z.shape[1] - 1, z.shape[2]
    for k in range(len(rows)):
        i = rows[k]
        slot, row = count[i], statistics[lane[i], min(count[i], num_draws)]
        rate[k], kept[k] = numbers[i, 4] / counts[i, 1], slot < num_draws
        row[0], row[1], row[2], row[3] = last[i, 2 * dim], last[i, 2 * dim + 2], rate[k], numbers[i, 3]
        row[4], row[5], row[6] = counts[i, 1], counts[i, 2], diverging[i]
        if kept[k]:
            _copy(z[lane[i], slot], last[i])
            count[i] += 1


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def axes_density(
    z, centre, width, from_data, from_prior, eigenvalues, ones, least, column, rate, count, prior, slope
):
    """Shapes: z (P, batch, D); centre to ones (P, D); least and count (P,); prior and slope (P, batch)."""
    points, batch, dim = z.shape
    value, grad = np.empty((points, batch), z.dtype), np.empty_like(z)
    for i in range(points):
        for j in range(batch):
            h = centre[i, column] + width[i, column] * z[i, j, column]
            precision = np.exp(-2.0 * rate * h)
            by_data, by_prior = 0.0, 0.0
            for d in range(dim):
                at = centre[i, d] + width[i, d] * z[i, j, d]
                data = from_data[i, d] - eigenvalues[i, d] * at
                prior_pull = from_prior[i, d] - ones[i, d] * at
                by_data += at * (from_data[i, d] + data)
                by_prior += at * (from_prior[i, d] + prior_pull)
                grad[i, j, d] = (prior_pull + precision * data) * width[i, d]
            squares = least[i] - by_data
            own = prior[i, j] - count[i] * h - 0.5 * precision * squares
            value[i, j] = own + 0.5 * by_prior
            grad[i, j, column] = (slope[i, j] - count[i] + rate * precision * squares) * width[i, column]
    return value, grad


@njit(cache=True, nogil=True, error_model="numpy")
def interpolate(h, low, step, table, value, slope):
    """Cubic Hermite interpolation; ``table`` holds values and slopes times the step."""
    for i in range(h.shape[0]):
        for j in range(h.shape[1]):
            x = (h[i, j] - low) / step
            cell = min(max(int(x), 0), len(table) - 2)
            t = x - cell
            left, right = table[cell, 0], table[cell + 1, 0]
            from_left, from_right = table[cell, 1], table[cell + 1, 1]
            rise = right - left
            square = 3.0 * rise - 2.0 * from_left - from_right
            cube = from_left + from_right - 2.0 * rise
            value[i, j] = left + t * (from_left + t * (square + t * cube))
            slope[i, j] = (from_left + t * (2.0 * square + 3.0 * t * cube)) / step
