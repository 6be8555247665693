"""One judge for all contenders: R-hat and ESS of every quantity, and the means with their errors."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import ndtri
from scipy.stats import rankdata

WANTED_ESS = 400.0
WANTED_RHAT = 1.01
CHUNK = 2_000


@dataclass(frozen=True)
class Verdict:
    """The worst quantity of one strength.

    Attributes:
        bulk, tail: least effective sample size.
        rhat: largest rank-normalised R-hat.
        draws: per chain.
    """

    bulk: float
    tail: float
    rhat: float
    draws: int

    @property
    def passed(self) -> bool:
        return min(self.bulk, self.tail) >= WANTED_ESS and self.rhat < WANTED_RHAT

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def judge(draws: np.ndarray) -> tuple[Verdict, np.ndarray]:
    """Verdict on draws (chains, draws, quantities), and their means with Monte Carlo errors, (2, quantities).

    A quantity that does not move has no R-hat, and fails.
    """
    flat = draws.reshape(-1, draws.shape[-1])
    parts = [diagnose(draws[..., i : i + CHUNK]) for i in range(0, draws.shape[-1], CHUNK)]
    rhat, bulk, tail = (np.concatenate(part) for part in zip(*parts, strict=True))
    error = flat.std(0) / np.sqrt(np.maximum(np.nan_to_num(bulk, nan=1.0), 1.0))
    verdict = Verdict(
        float(np.nan_to_num(bulk, nan=0.0).min()),
        float(np.nan_to_num(tail, nan=0.0).min()),
        float(np.nan_to_num(rhat, nan=np.inf).max()),
        draws.shape[1],
    )
    return verdict, np.stack([flat.mean(0), error])


def diagnose(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """R-hat, bulk and tail ESS of each quantity, of draws (chains, draws, quantities).

    Vehtari, Gelman, Simpson, Carpenter and Buerkner (2021), as arviz-stats computes them, for thousands of
    quantities at once; a judge of its own, not that of the engine it judges.
    """
    x = np.ascontiguousarray(np.moveaxis(draws, -1, 0))
    half = x.shape[2] // 2
    split = np.concatenate([x[..., :half], x[..., -half:]], 1)  # (quantities, 2 chains, half)
    bulk = _normal_scores(split)
    folded = _normal_scores(np.abs(split - np.median(split, (1, 2), keepdims=True)))
    low, high = np.quantile(x, (0.05, 0.95), axis=(1, 2))
    tail = np.minimum(*(_ess((split <= q[:, None, None]).astype(float)) for q in (low, high)))
    return np.maximum(_rhat(bulk), _rhat(folded)), _ess(bulk), tail


def _normal_scores(x: np.ndarray) -> np.ndarray:
    ranks = rankdata(x.reshape(len(x), -1), axis=1).reshape(x.shape)
    return ndtri((ranks - 0.375) / (x[0].size + 0.25))


def _rhat(x: np.ndarray) -> np.ndarray:
    length = x.shape[2]
    between, within = length * x.mean(2).var(1, ddof=1), x.var(2, ddof=1).mean(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.sqrt((between / within + length - 1) / length)


def _ess(x: np.ndarray) -> np.ndarray:
    """Geyer's initial monotone sequence."""
    _, chains, length = x.shape
    size = 1 << (2 * length - 1).bit_length()
    spectrum = np.fft.rfft(x - x.mean(2, keepdims=True), n=size)
    covariance = np.fft.irfft((np.abs(spectrum) ** 2).mean(1), n=size)[:, :length] / length
    within = covariance[:, :1] * length / (length - 1)
    total = covariance[:, :1] + x.mean(2).var(1, ddof=1)[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        rho = 1.0 - (within - covariance) / total
    rho[:, 0] = 1.0
    pairs = rho[:, : length - length % 2].reshape(len(x), -1, 2).sum(2)
    pairs = pairs[:, : max(1, (length - 3) // 2)]  # arviz never looks at the last three lags
    positive = np.logical_and.accumulate(pairs > 0, 1)
    monotone = np.minimum.accumulate(np.where(positive, pairs, np.inf), 1)
    count = positive.sum(1)
    # One more even lag where the sequence ended at a negative pair, as arviz and Stan have it.
    following = np.take_along_axis(rho, np.minimum(2 * count, length - 1)[:, None], 1)[:, 0]
    tau = -1.0 + 2.0 * np.where(positive, monotone, 0.0).sum(1) + np.maximum(following, 0.0)
    return chains * length / np.maximum(tau, 1.0 / math.log10(chains * length))


def largest_z(one: np.ndarray, other: np.ndarray) -> float:
    """Largest difference of means in units of both Monte Carlo errors; (strengths, 2, quantities) each."""
    shared = min(len(one), len(other))
    if shared == 0:
        return float("nan")
    (mean, error), (mean2, error2) = (np.moveaxis(x[:shared], 1, 0) for x in (one, other))
    return float(np.max(np.abs(mean - mean2) / np.sqrt(error**2 + error2**2)))
