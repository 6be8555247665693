"""R-hat and effective sample sizes of sorted columns, compiled by numba and kept on disk."""

import math

import numpy as np
from numba import njit

# Sums may be taken in any order; infinities and NaN keep their meaning.
FAST = {"reassoc", "contract", "nsz"}


@njit(cache=True, nogil=True, error_model="numpy")
def convergence(flat, order, cuts, scores, chains, found):
    """R-hat, bulk ESS and tail ESS of every column, into ``found`` (Q, 3).

    Args:
        flat: draws (Q, N), the ``chains`` half chains end to end.
        order: their order (Q, N).
        cuts: quantiles of 5 and 95 per cent (Q, 2).
        scores: normal scores of ranks 1, 1.5, 2, ... N (2 N - 1,).
        chains: half chains.
    """
    count = flat.shape[1]
    length = count // chains
    bulk, folded, apart = np.empty(count), np.empty(count), np.empty(count)
    other, means, lagged = np.empty(count, np.int64), np.empty(chains), np.empty(2)
    for k in range(len(flat)):
        x, first = flat[k], order[k]
        _score(x, first, scores, bulk)
        middle = 0.5 * (count - 1)
        low = int(middle)
        high = min(low + 1, count - 1)
        median = x[first[low]] + (middle - low) * (x[first[high]] - x[first[low]])
        for i in range(count):
            apart[i] = abs(x[i] - median)
        _fold(x, first, median, apart, other)
        _score(apart, other, scores, folded)
        found[k, 0] = max(_rhat(bulk, chains, length, means), _rhat(folded, chains, length, means))
        found[k, 1] = _ess(bulk, chains, length, means, lagged)
        for side in range(2):
            for i in range(count):
                apart[i] = 1.0 if x[i] <= cuts[k, side] else 0.0
            ess = _ess(apart, chains, length, means, lagged)
            found[k, 2] = ess if side == 0 else min(found[k, 2], ess)


@njit(cache=True, nogil=True, error_model="numpy")
def _score(x, order, scores, out):
    """Normal scores of the ranks of x, ties sharing the mean of theirs."""
    count, begin = len(x), 0
    while begin < count:
        end = begin + 1
        while end < count and x[order[end]] == x[order[begin]]:
            end += 1
        for i in range(begin, end):
            out[order[i]] = scores[begin + end - 1]
        begin = end


@njit(cache=True, nogil=True, error_model="numpy")
def _fold(x, order, median, apart, out):
    """The order of ``apart``, distances from the median: those below it backwards, merged with the others."""
    count = len(x)
    right = 0
    while right < count and x[order[right]] < median:
        right += 1
    left = right - 1
    for i in range(count):
        if right >= count or (left >= 0 and apart[order[left]] <= apart[order[right]]):
            out[i] = order[left]
            left -= 1
        else:
            out[i] = order[right]
            right += 1


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _rhat(x, chains, length, means):
    within = 0.0
    for c in range(chains):
        one, total, squares = x[c * length : (c + 1) * length], 0.0, 0.0
        for i in range(length):
            total += one[i]
        means[c] = total / length
        for i in range(length):
            squares += (one[i] - means[c]) ** 2
        within += squares / (length - 1) / chains
    return math.sqrt((length * _variance(means) / within + length - 1) / length)


@njit(cache=True, nogil=True, error_model="numpy")
def _variance(x):
    mean, squares = x.mean(), 0.0
    for value in x:
        squares += (value - mean) ** 2
    return squares / (len(x) - 1)


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _ess(x, chains, length, means, lagged):
    """By Geyer's initial monotone sequence, as arviz and Stan have it; x is centred on the way."""
    count, low, high = chains * length, x[0], x[0]
    for i in range(count):
        low, high = min(low, x[i]), max(high, x[i])
    if high - low < 1e-15:
        return float(count)
    at_zero = 0.0
    for c in range(chains):
        one, total = x[c * length : (c + 1) * length], 0.0
        for i in range(length):
            total += one[i]
        means[c] = total / length
        for i in range(length):
            one[i] -= means[c]
            at_zero += one[i] * one[i]
    variance = at_zero / (chains * (length - 1.0))
    total = variance * (length - 1.0) / length
    if chains > 1:
        total += _variance(means)
    summed, least, pairs = 0.0, np.inf, 0
    most = min(max(1, (length - 3) // 2), length // 2)  # arviz never looks at the last three lags
    while pairs < most:
        _at_lags(x, chains, length, 2 * pairs, lagged)
        even = 1.0 if pairs == 0 else 1.0 - (variance - lagged[0]) / total
        pair = even + 1.0 - (variance - lagged[1]) / total
        if not pair > 0.0:
            break
        least = min(least, pair)
        summed += least
        pairs += 1
    # One more even lag if the sequence ended at a negative pair (arviz and Stan do so).
    following = 1.0
    if pairs > 0:
        last = min(2 * pairs, length - 1)
        _at_lags(x, chains, length, last, lagged)
        following = 1.0 - (variance - lagged[0]) / total
    tau = -1.0 + 2.0 * summed + max(following, 0.0)
    return count / max(tau, 1.0 / math.log10(count))


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _at_lags(x, chains, length, lag, out):
    """Mean autocovariance of centred chains at ``lag`` and the next."""
    here, there = 0.0, 0.0
    for c in range(chains):
        one, two = x[c * length : (c + 1) * length - lag], x[c * length + lag : (c + 1) * length]
        for i in range(len(one) - 1):
            here += one[i] * two[i]
            there += one[i] * two[i + 1]
        here += one[len(one) - 1] * two[len(one) - 1]
    out[0], out[1] = here / (chains * length), there / (chains * length)
