"""Blocks of long chains of copies, an observation each, moved in place: compiled by numba, kept on disk."""

import math

from numba import njit

from bayestie._engines._affine_kernels import IN_ORDER, POISSON, exponential
from bayestie._engines._kernels import FAST

CHUNK = 1024  # variables that go through all steps together


@njit(cache=True, nogil=True, fastmath=IN_ORDER, error_model="numpy")
def remainders(step, likelihood, out, work):
    """r (batch, n) at steps (batch, n); ``work`` is (2, CHUNK)."""
    for row in range(len(step)):
        for begin in range(0, step.shape[1], CHUNK):
            end = min(begin + CHUNK, step.shape[1])
            _remainder(step[row, begin:end], begin, likelihood, out[row, begin:end], work)


@njit(cache=True, nogil=True, fastmath=IN_ORDER, error_model="numpy")
def _remainder(step, begin, likelihood, out, work):
    kind, eta, pull, half, weight, centre = likelihood
    count = len(step)
    at, size = work[0, :count], work[1, :count]
    here, bent = eta[begin : begin + count], half[begin : begin + count]
    slope, times, less = (
        pull[begin : begin + count],
        weight[begin : begin + count],
        centre[begin : begin + count],
    )
    if kind == POISSON:
        for i in range(count):
            at[i] = here[i] + step[i]
        exponential(at, size)
    else:
        for i in range(count):
            at[i] = -abs(here[i] + step[i])
        exponential(at, size)
        for i in range(count):
            size[i] = max(here[i] + step[i], 0.0) + math.log1p(size[i])
    for i in range(count):
        out[i] = step[i] * (slope[i] + bent[i] * step[i]) - times[i] * size[i] - less[i]


@njit(cache=True, nogil=True, fastmath=IN_ORDER, error_model="numpy")
def propose(noise, step, rest, inertia, chain, likelihood, trial, fresh, gain, work):
    """Of normals (batch, n) proposals ``trial``, their remainders ``fresh``, and the gain of each block."""
    scale, ratio, first, column, entries, label, num_blocks = chain
    shrink, towards = math.sqrt(1.0 - inertia * inertia), 1.0 - inertia
    for row in range(len(step)):
        own, new, gained = step[row], trial[row], gain[row]
        gained[:] = 0.0
        after = 0.0
        end = len(own)
        while end > 0:
            begin = max(0, end - CHUNK)
            for i in range(end - 1, begin - 1, -1):  # L^T x = noise, from the far end
                after = noise[row, i] * scale[i] - ratio[i] * after
                new[i] = after
            for i in range(begin, end):
                centre = 0.0
                for e in range(first[i], first[i + 1]):
                    centre += entries[e] * own[column[e]]
                moved = shrink * new[i] + towards * centre + inertia * own[i]
                new[i] = moved if label[i] < num_blocks else own[i]
            _remainder(new[begin:end], begin, likelihood, fresh[row, begin:end], work)
            for i in range(begin, end):
                gained[label[i]] += fresh[row, i] - rest[row, i]
            end = begin


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def settle(step, rest, trial, fresh, accept, refuse, label, means, variances, accepted):
    """Move the blocks that are accepted (batch, blocks + 1), unless the means of a chain refuse them all.

    ``refuse`` (batch,) are logarithms of uniforms; ``accepted`` (blocks,) is raised.
    """
    for row in range(len(step)):
        own, new, take = step[row], trial[row], accept[row]
        ratio = 0.0
        for j in range(len(variances)):
            now, change, mean = 0.0, 0.0, means[j]
            for i in range(len(own)):
                now += mean[i] * own[i]
                change += mean[i] * (new[i] - own[i]) if take[label[i]] else 0.0
            ratio -= 0.5 * change * (2.0 * now + change) / variances[j]
        if refuse[row] >= ratio:
            continue
        for i in range(len(own)):
            if take[label[i]]:
                own[i], rest[row, i] = new[i], fresh[row, i]
        for b in range(len(accepted)):
            accepted[b] += take[b]
