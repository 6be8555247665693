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
    for k in range(len(rows)):
        i = rows[k]
        numbers[i, 3] = step[i]
        start_lane(last[i], drawn[i], ends[i], sums[i], numbers[i], counts[i], momentum[k])
        forward[i] = 1 if uniform[i] >= 0.5 else 0


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def start_lane(last, drawn, ends, sums, numbers, counts, p):
    dim = len(p)
    # Slices first: the loops are vector operations only where every index is a plain counter.
    z, grad, total, sub_total = last[:dim], last[dim : 2 * dim], sums[0], sums[1]
    left, right = ends[0], ends[1]
    kinetic = 0.0
    for d in range(dim):
        total[d], sub_total[d] = p[d], 0.0
        kinetic += p[d] * p[d]
    for end in (left, right):
        _copy(end[:dim], z)
        _copy(end[dim : 2 * dim], p)
        _copy(end[2 * dim :], grad)
    _copy(drawn[: 2 * dim], last)
    energy = 0.5 * kinetic - last[2 * dim + 1]
    drawn[2 * dim], drawn[2 * dim + 1], drawn[2 * dim + 2] = last[2 * dim], last[2 * dim + 1], energy
    numbers[0], numbers[1], numbers[2], numbers[4] = 0.0, -np.inf, energy, 0.0
    counts[0], counts[1], counts[2] = 0, 0, 0


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def propose(ends, numbers, forward, z, half):
    for i in range(len(z)):
        propose_lane(ends[i, forward[i]], numbers[i, 3] * (2 * forward[i] - 1), z[i], half[i])


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def propose_lane(end, signed, new, middle):
    dim = len(new)
    at, p, grad = end[:dim], end[dim : 2 * dim], end[2 * dim :]
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
    for i in range(len(z)):
        trees = (last[i], drawn[i], sub[i], ends[i], sums[i], checkpoints[i], numbers[i], counts[i])
        leaf = (z[i], half[i], values[i, 0], values[i, 1], grad[i])
        diverging[i], done[i], forward[i] = advance_lane(trees, forward[i], max_depth, leaf, uniforms[i])


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def advance_lane(trees, forward, max_depth, leaf, uniforms):
    """Whether the trajectory of a lane diverged, whether it ended, and the end that grows next."""
    last, drawn, sub, ends, sums, checkpoints, numbers, counts = trees
    z, middle, log_density, own, pull = leaf
    dim = len(z)
    end = ends[forward]
    p, sub_total = end[dim : 2 * dim], sums[1]
    signed = numbers[3] * (2 * forward - 1)
    kinetic = 0.0
    for d in range(dim):
        momentum = middle[d] + 0.5 * signed * pull[d]
        p[d] = momentum
        sub_total[d] += momentum
        kinetic += momentum * momentum
    _copy(end[:dim], z)
    _copy(end[2 * dim :], pull)
    energy = 0.5 * kinetic - own
    delta = numbers[2] - energy
    if math.isnan(delta):
        delta = -np.inf
    diverging = delta < -MAX_ENERGY_ERROR
    numbers[4] += math.exp(min(delta, 0.0))

    # The leaf joins its subtree: multinomial sampling within the subtree.
    numbers[1] = _log_add(numbers[1], delta)
    if math.log(uniforms[1]) < delta - numbers[1]:
        _copy(sub[:dim], z)
        _copy(sub[dim : 2 * dim], pull)
        sub[2 * dim], sub[2 * dim + 1], sub[2 * dim + 2] = log_density, own, energy
    done = diverging or _subtree_turns(checkpoints, p, sub_total, counts[0])
    counts[0] += 1
    counts[1] += 1
    if not done and counts[0] >= 1 << counts[2]:
        # A whole subtree joins the tree: biased progressive sampling, doubling.
        if math.log(uniforms[2]) < numbers[1] - numbers[0]:
            _copy(drawn, sub)
        total = sums[0]
        for d in range(dim):
            total[d] += sub_total[d]
        numbers[0] = _log_add(numbers[0], numbers[1])
        counts[2] += 1
        done = counts[2] >= max_depth or _turns(ends[0, dim : 2 * dim], ends[1, dim : 2 * dim], total)
        if not done:
            forward = 1 if uniforms[3] >= 0.5 else 0
            counts[0], numbers[1] = 0, -np.inf
            for d in range(dim):
                sub_total[d] = 0.0
    if done:
        _copy(last, drawn)
    return diverging, done, forward


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
    for k in range(len(rows)):
        i = rows[k]
        rate[k], kept[k] = numbers[i, 4] / counts[i, 1], count[i] < z.shape[1] - 1
        slot = min(count[i], z.shape[1] - 1)
        record_lane(last[i], numbers[i], counts[i], diverging[i], z[lane[i], slot], statistics[lane[i], slot])
        count[i] += kept[k]


@njit(cache=True, nogil=True, error_model="numpy")
def record_lane(last, numbers, counts, diverging, z, row):
    dim = len(z)
    row[0], row[1], row[2], row[3] = last[2 * dim], last[2 * dim + 2], numbers[4] / counts[1], numbers[3]
    row[4], row[5], row[6] = counts[1], counts[2], diverging
    _copy(z, last)
