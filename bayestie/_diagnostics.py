"""R-hat and effective sample size of many quantities at once.

Vehtari, Gelman, Simpson, Carpenter and Buerkner (2021), Rank-normalization, folding, and localization.
Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari and Gelman (2024), Nested R-hat: assessing the convergence
of Markov chain Monte Carlo when running many short chains.

arviz-stats holds the reference for one quantity at a time; a sweep asks for thousands between rounds, so
the same formulas run here batched, and tests hold the two together.
"""

from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from bayestie._workers import run_all

_TAILS = (0.05, 0.95)
_TOGETHER = 1 << 18  # numbers diagnosed together: what a core's cache holds


class Convergence(NamedTuple):
    """Of quantities (..., Q): rank-normalised split R-hat (the larger of bulk and folded), bulk ESS, tail ESS
    of the worse quantile, whether they vary at all, and nested R-hat (rank-normalised, the larger of bulk and
    folded)."""

    rhat: Tensor
    ess_bulk: Tensor
    ess_tail: Tensor
    varies: Tensor
    nested_rhat: Tensor


def convergence(draws: Tensor, pieces: int = 1) -> Convergence:
    """(..., chains, draws, Q) -> (..., Q); every chain is a superchain of ``pieces`` chains, end to end.

    Nested R-hat of K superchains of M chains is (1 + B / W)^1/2, with B the variance of the K superchains'
    means and W the mean over superchains of the M chains' variance: that of their means (0 if M = 1) plus the
    mean of those within. For M = 1 its square is that of R-hat, not split, plus 1 / n. NaN if K = 1. Below
    1.01 a superchain has some 50 effective draws, as a chain has whose R-hat is.
    """
    lead, (chains, length, columns) = draws.shape[:-3], draws.shape[-3:]
    width = max(1, _TOGETHER // max(1, chains * length))
    parts = [part for one in draws.reshape(-1, chains, length, columns) for part in one.split(width, 2)]
    found = zip(*run_all([partial(_convergence, part, pieces) for part in parts]), strict=True)
    return Convergence(*(torch.cat(each).reshape(*lead, columns) for each in found))


def _convergence(draws: Tensor, pieces: int) -> Convergence:
    # Here, because the compiler takes half a second to import and `laplace` needs none of it.
    from bayestie._diagnostics_kernels import convergence as kernel
    from bayestie._diagnostics_kernels import pack, unpack

    whole = draws.detach().cpu().permute(2, 0, 1).contiguous().numpy()
    length = whole.shape[2]
    half = length // 2
    odd = half > 0 and length % 2 == 1  # the draw in the middle of a chain is in neither half
    split = np.concatenate([whole[..., :half], whole[..., -half:]], 2) if odd else whole
    flat = split.reshape(len(split), -1).astype(np.float64, copy=False)
    bounds = np.arange(pieces + 1) * (length // pieces)
    bounds[bounds > half] -= odd
    bits, keys = flat.shape[1].bit_length(), np.empty(flat.shape, np.uint64)
    pack(flat, bits, keys)
    keys.sort(1)
    order, ranked = np.empty(flat.shape, np.int64), np.empty_like(flat)
    unpack(flat, bits, keys, order, ranked)
    if odd:
        cuts = np.stack([np.quantile(whole.reshape(len(whole), -1), q, axis=1) for q in _TAILS], 1)
    else:
        at = np.array(_TAILS) * (flat.shape[1] - 1)
        low = at.astype(int)
        cuts = ranked[:, low] + (at - low) * (ranked[:, low + 1] - ranked[:, low])
    found, scores = np.empty((len(flat), 4)), _normal_scores(flat.shape[1])
    chains = split.shape[1] * (2 if half else 1)
    kernel(flat, order, ranked, cuts, scores, chains, bounds, found)
    varies = torch.from_numpy(ranked[:, -1] > ranked[:, 0]).to(draws.device)
    rhat, bulk, tail, nested = torch.from_numpy(found).to(draws).unbind(1)
    return Convergence(rhat, bulk, tail, varies, nested)


@lru_cache(maxsize=8)
def _normal_scores(count: int) -> np.ndarray:
    """Of ranks 1, 1.5, 2, ... ``count`` (Blom 1958)."""
    return ndtri((np.arange(2, 2 * count + 1) / 2 - 0.375) / (count + 0.25))
