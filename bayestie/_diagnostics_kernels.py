"""R-hat, nested R-hat and effective sample sizes of sorted columns, compiled by numba and kept on disk."""

import math

import numpy as np
from numba import njit

# Sums may be taken in any order; infinities and NaN keep their meaning.
FAST = {"reassoc", "contract", "nsz"}


@njit(cache=True, nogil=True, error_model="numpy")
def pack(flat, bits, keys):
    """Keys (Q, N) that sort as draws (Q, N) do, whose last ``bits`` bits are the number of a draw.

    Sorting numbers is several times as fast as sorting what they point at.
    """
    sign, mask = np.uint64(1) << np.uint64(63), (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    for k in range(len(flat)):
        raw, key = flat[k].view(np.uint64), keys[k]
        for i in range(len(raw)):
            u = ~raw[i] if raw[i] & sign else raw[i] | sign
            key[i] = ((u if flat[k, i] == flat[k, i] else ~np.uint64(0)) & ~mask) | np.uint64(i)


@njit(cache=True, nogil=True, error_model="numpy")
def unpack(flat, bits, keys, order, ranked):
    """The order (Q, N) of draws, and draws in it, from sorted keys."""
    mask = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    for k in range(len(flat)):
        x, at, s = flat[k], order[k], ranked[k]
        left = 8 * len(x)
        for i in range(len(x)):
            at[i] = np.int64(keys[k, i] & mask)
            s[i] = x[at[i]]
        # What the number of a draw took the place of may have put close ones the wrong way round.
        for i in range(1, len(x)):
            value, number, j = s[i], at[i], i
            while j > 0 and s[j - 1] > value:
                s[j], at[j] = s[j - 1], at[j - 1]
                j -= 1
            s[j], at[j] = value, number
            left -= i - j
            if left < 0:
                at[:] = np.argsort(x)
                s[:] = x[at]
                break


@njit(cache=True, nogil=True, error_model="numpy")
def convergence(flat, order, ranked, cuts, scores, chains, bounds, found):
    """R-hat, bulk ESS, tail ESS and nested R-hat of every column, into ``found`` (Q, 4).

    Args:
        flat: draws (Q, N), the ``chains`` half chains end to end.
        order: their order (Q, N).
        ranked: draws in that order (Q, N).
        cuts: quantiles of 5 and 95 per cent (Q, 2).
        scores: normal scores of ranks 1, 1.5, 2, ... N (2 N - 1,).
        chains: half chains.
        bounds: where the chains of a superchain, two half chains or the only one, begin and end (M + 1,).
    """
    count = flat.shape[1]
    length, last = count // chains, count - 1
    superchains = count // bounds[-1]
    bulk, folded, apart = np.empty(count), np.empty(count), np.empty(count)
    other, means, lagged = np.empty(count, np.int64), np.empty(chains), np.empty(2)
    for k in range(len(flat)):
        x, first, s = flat[k], order[k], ranked[k]
        _score(s, first, scores, bulk)
        low = last // 2
        median = s[low] + (0.5 * last - low) * (s[min(low + 1, last)] - s[low])
        _fold(s, first, median, apart, other)
        _score(apart, other, scores, folded)
        found[k, 0] = max(_rhat(bulk, chains, length, means), _rhat(folded, chains, length, means))
        found[k, 3] = max(
            _nested_rhat(bulk, superchains, bounds, means), _nested_rhat(folded, superchains, bounds, means)
        )
        found[k, 1] = float(count) if s[0] == s[last] else _ess(bulk, chains, length, means, lagged)
        for side in range(2):
            for i in range(count):
                apart[i] = 1.0 if x[i] <= cuts[k, side] else 0.0
            if s[last] <= cuts[k, side] or s[0] > cuts[k, side]:
                ess = float(count)
            else:
                ess = _ess(apart, chains, length, means, lagged)
            found[k, 2] = ess if side == 0 else min(found[k, 2], ess)


@njit(cache=True, nogil=True, error_model="numpy")
def _score(ranked, order, scores, out):
    """Normal scores of the ranks, given draws in their order, ties sharing the mean of theirs."""
    count, begin, tied = len(ranked), 0, False
    for i in range(count - 1):
        tied |= ranked[i] == ranked[i + 1]
    if not tied:
        for i in range(count):
            out[order[i]] = scores[2 * i]
        return
    while begin < count:
        end = begin + 1
        while end < count and ranked[end] == ranked[begin]:
            end += 1
        for i in range(begin, end):
            out[order[i]] = scores[begin + end - 1]
        begin = end


@njit(cache=True, nogil=True, error_model="numpy")
def _fold(ranked, order, median, apart, out):
    """Distances from the median, in order, and that order: draws below it backwards, merged with those above.

    From both ends, because a step of a merge waits for the one before; and without a branch, because no
    processor could predict it.
    """
    count = len(ranked)
    last = count - 1
    right = np.searchsorted(ranked, median)
    left, low, high = right - 1, 0, last
    for i in range((count + 1) // 2):
        at_left, at_right = max(left, 0), min(right, last)
        below, above = abs(median - ranked[at_left]), abs(ranked[at_right] - median)
        near = (right > last) | ((left >= 0) & (below <= above))  # of equals the lower first
        apart[i] = below if near else above
        out[i] = order[at_left if near else at_right]
        left -= np.int64(near)
        right += 1 - np.int64(near)
        below, above = abs(median - ranked[low]), abs(ranked[high] - median)
        far = below > above
        apart[last - i] = below if far else above
        out[last - i] = order[low if far else high]
        low += np.int64(far)
        high -= 1 - np.int64(far)


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


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _nested_rhat(x, superchains, bounds, means):
    """(1 + B / W)^1/2: B the variance of the superchains' means, W the mean over superchains of the variance
    of their chains' means and the mean variance in a chain."""
    num_chains, size, within = len(bounds) - 1, bounds[-1], 0.0
    for k in range(superchains):
        mean, square, inside = 0.0, 0.0, 0.0
        for m in range(num_chains):
            one, total, squares = x[k * size + bounds[m] : k * size + bounds[m + 1]], 0.0, 0.0
            for i in range(len(one)):
                total += one[i]
            own = total / len(one)
            for i in range(len(one)):
                squares += (one[i] - own) ** 2
            if len(one) > 1:
                inside += squares / (len(one) - 1) / num_chains
            step = own - mean  # Welford: means of chains may be close and far from zero
            mean += step / (m + 1)
            square += step * (own - mean)
        means[k] = mean
        within += (inside + (square / (num_chains - 1) if num_chains > 1 else 0.0)) / superchains
    return math.sqrt(1.0 + _variance(means[:superchains]) / within)


@njit(cache=True, nogil=True, error_model="numpy")
def _variance(x):
    mean, squares = x.mean(), 0.0
    for value in x:
        squares += (value - mean) ** 2
    return squares / (len(x) - 1)


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _ess(x, chains, length, means, lagged):
    """By Geyer's initial monotone sequence, as arviz and Stan have it; x is centred on the way."""
    count, at_zero = chains * length, 0.0
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
