"""Moments, quantiles and Monte Carlo errors of many quantities over draws that are not kept."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_BINS = 96
_MAX_BATCHES = 40  # per chain
_REACH = 6.0  # histogram from -6 to 6 sd about the centre
_PER_SCALE = _BINS / (2 * _REACH)
_WORTH_COMPILING = 5_000  # quantities: fewer are added up by numpy, whose arrays then stay in the cache
_TOGETHER = 65_536  # quantities whose quantiles are read off together


@dataclass
class Summary:
    """One value per quantity, (n,)."""

    mean: np.ndarray
    sd: np.ndarray
    quantiles: np.ndarray  # (len(QUANTILES), n)
    mcse_mean: np.ndarray
    mcse_sd: np.ndarray
    mcse_quantiles: np.ndarray

    def variables(self) -> dict[str, np.ndarray]:
        return {
            "mean": self.mean,
            "sd": self.sd,
            "quantiles": self.quantiles,
            "mcse_mean": self.mcse_mean,
            "mcse_sd": self.mcse_sd,
            "mcse_quantiles": self.mcse_quantiles,
        }


class Streamed:
    """Chains seen draw by draw: batch means of the value and of both tail indicators, and a histogram.

    Args:
        centre: about each quantity's mean, (n,).
        scale: about its sd; tails are told apart at centre -+ 1.645 scale.
        num_chains: chains, all as long.
        joined: chains that count as one, laid end to end: R-hat compares halves of these.
        batch: draws per batch mean.
        histogram: keep one, for quantiles.
    """

    def __init__(
        self,
        centre: np.ndarray,
        scale: np.ndarray,
        num_chains: int,
        batch: int,
        *,
        histogram: bool,
        joined: int = 1,
    ):
        self.joined = joined
        self.centre, self.scale, self.batch = centre, np.where(scale > 0, scale, 1.0), batch
        self.size, self.num_chains = len(centre), num_chains
        self.length = np.full(num_chains, batch)  # of each chain's batches: doubled as they grow many
        self.low, self.high = -1.645 * self.scale, 1.645 * self.scale
        self.batches: list[list[np.ndarray]] = [[] for _ in range(num_chains)]  # each (3, n) float32
        self.running = np.zeros((num_chains, 3, self.size))
        self.count = np.zeros(num_chains, dtype=int)
        # By chains laid end to end: several threads add, and sums are not to depend on whose turn it is.
        self.squares = np.zeros((num_chains // joined, self.size))
        self.total = np.zeros_like(self.squares)
        self.seen = np.zeros(len(self.total), dtype=int)
        self._spare = np.empty_like(self.total)
        self.histogram = np.zeros((len(self.total), self.size, _BINS if histogram else 0), np.uint16)
        self._compiled = _compiled() if self.size >= _WORTH_COMPILING else None
        self._tails = np.stack([self.low, self.high])

    @property
    def num(self) -> int:
        """Draws seen."""
        return int(self.seen.sum())

    def add(self, chains: slice, step: np.ndarray) -> None:
        """One draw of chains that are laid end to end, as its distance from the centre (joined, n).

        Those of different ones may be added by different threads.
        """
        group = chains.start // self.joined
        own = self.running[chains]
        if self._compiled is not None:
            binned = (self.scale, _REACH, _PER_SCALE)
            sums = (own, self.total[group], self.squares[group])
            self._compiled(np.ascontiguousarray(step), self._tails, *sums, binned, self.histogram[group])
        else:
            self._add(group, own, step)
        self.seen[group] += len(step)
        self.count[chains] += 1
        length = self.length[chains.start]
        if self.count[chains.start] == length:
            for chain, total in zip(range(chains.start, chains.stop), own, strict=True):
                self.batches[chain].append((total / length).astype(np.float32))
                if len(self.batches[chain]) == _MAX_BATCHES:
                    pairs = self.batches[chain]
                    self.batches[chain] = [
                        0.5 * (a + b) for a, b in zip(pairs[::2], pairs[1::2], strict=True)
                    ]
                    self.length[chain] *= 2
            own[:] = 0.0
            self.count[chains] = 0

    def _add(self, group: int, own: np.ndarray, step: np.ndarray) -> None:
        own[:, 0] += step
        own[:, 1] += step <= self.low
        own[:, 2] += step >= self.high
        total, squares, spare = self.total[group], self.squares[group], self._spare[group]
        for one in step:
            total += one
            squares += np.multiply(one, one, out=spare)
            if self.histogram.shape[2]:
                place = np.clip((one / self.scale + _REACH) * _PER_SCALE, 0, _BINS - 1).astype(np.int64)
                self.histogram[group, np.arange(self.size), place] += 1

    def quality(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Split R-hat, bulk and tail effective sample size from batch means, (n,) each.

        ESS = draws * variance / (batch * variance of the batch means): fit to find the worst quantities and
        to watch all; ranks and Geyer's sequence (`bayestie._diagnostics`) are for those that are watched.
        """
        length = min(len(b) for b in self.batches)
        length -= length % 2
        means = np.stack([np.stack(b[:length]) for b in self.batches])  # (chains, batches, 3, n)
        num = 2 * self.num_chains // self.joined
        half = means[:, :, 0].reshape(num, -1, self.size).mean(1, dtype=float)
        batch = int(self.length[0])
        draws = batch * length * self.joined // 2
        variance = self.variance()
        between = half.var(0, ddof=1)
        within = np.maximum(variance - between * (1 - 1 / num), 1e-300)
        rhat = np.sqrt((draws - 1) / draws + between / within)
        total = self.num_chains * length * batch
        ess = []
        spread = means.reshape(-1, 3, self.size).var(0, ddof=1)
        for i in range(3):
            if i == 0:
                own = variance
            else:
                share = means[:, :, i].mean((0, 1), dtype=float)
                own = share * (1 - share)
            with np.errstate(divide="ignore", invalid="ignore"):
                found = total * own / (batch * spread[i])
            ess.append(np.where(spread[i] > 0, found, np.inf if i == 0 else total))
        still = variance <= 1e-28 * (1.0 + np.square(self.centre))
        bulk, tail = ess[0], np.minimum(ess[1], ess[2])
        return np.where(still, 1.0, rhat), np.where(still, total, bulk), np.where(still, total, tail)

    def mean(self) -> np.ndarray:
        return self.centre + self.total.sum(0) / self.num

    def variance(self) -> np.ndarray:
        mean = self.total.sum(0) / self.num
        return np.maximum(self.squares.sum(0) / self.num - np.square(mean), 0.0)

    def summary(self) -> Summary:
        """Over all draws seen; quantiles are interpolated in bins of an eighth of an sd."""
        _, bulk, tail = self.quality()
        sd = np.sqrt(self.variance() * self.num / max(self.num - 1, 1))
        starts = range(0, self.size, _TOGETHER)
        found = np.concatenate([self._quantiles(slice(i, i + _TOGETHER)) for i in starts], 1)
        return summarised(self.mean(), sd, found, np.minimum(bulk, self.num), np.minimum(tail, self.num))

    def _quantiles(self, some: slice) -> np.ndarray:
        """`QUANTILES` (q, n) of some of the quantities, interpolated in their bins."""
        cumulative = np.cumsum(self.histogram[:, some].sum(0, dtype=np.int64).T, 0) / self.num
        column, found = np.arange(cumulative.shape[1]), []
        for q in QUANTILES:
            place = np.minimum((cumulative < q).sum(0), _BINS - 1)
            before = np.where(place > 0, cumulative[np.maximum(place - 1, 0), column], 0.0)
            inside = np.maximum(cumulative[place, column] - before, 1e-12)
            at = (place + (q - before) / inside) / _PER_SCALE - _REACH
            found.append(self.centre[some] + self.scale[some] * at)
        return np.stack(found)


def _compiled() -> Callable[..., None]:
    from bayestie._engines._streamed_kernels import add  # the compiler takes half a second to import

    return add


def summarised(
    mean: np.ndarray, sd: np.ndarray, quantiles: np.ndarray | None, bulk: np.ndarray, tail: np.ndarray
) -> Summary:
    """With Monte Carlo errors from effective sample sizes, by the normal's density at the quantiles.

    Args:
        mean: (n,).
        sd: (n,).
        quantiles: (q, n), or None for those of a normal.
        bulk: effective sample size of the mean, inf where it is exact.
        tail: of the tails.
    """
    levels = np.array(QUANTILES)
    normal = np.array([-1.6448536269514722, -0.6744897501960817, 0.0, 0.6744897501960817, 1.6448536269514722])
    density = np.exp(-0.5 * normal**2) / math.sqrt(2 * math.pi)
    factor = np.sqrt(levels * (1 - levels)) / density
    if quantiles is None:
        quantiles = mean + normal[:, None] * sd
    size = np.where(np.abs(levels[:, None] - 0.5) > 0.3, tail, bulk)
    return Summary(
        mean, sd, quantiles, sd / np.sqrt(bulk), sd / np.sqrt(2 * bulk), factor[:, None] * sd / np.sqrt(size)
    )


def weighted(rows: np.ndarray, log_weight: np.ndarray, ess: float) -> Summary:
    """Of weighted rows (draws, n); their effective sample size gives the errors."""
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    mean = weight @ rows
    sd = np.sqrt(np.maximum(weight @ np.square(rows - mean), 0.0))
    order = np.argsort(rows, axis=0)
    cumulative = np.cumsum(weight[order], 0)
    place = np.stack([np.minimum((cumulative < q).sum(0), len(rows) - 1) for q in QUANTILES])
    quantiles = np.take_along_axis(rows, np.take_along_axis(order, place, 0), 0)
    size = np.full(rows.shape[1], ess)
    return summarised(mean, sd, quantiles, size, size)
