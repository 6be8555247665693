"""R-hat and effective sample size of many quantities at once.

Vehtari, Gelman, Simpson, Carpenter and Buerkner (2021), Rank-normalization, folding, and localization.

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
    of the worse quantile, and whether they vary at all."""

    rhat: Tensor
    ess_bulk: Tensor
    ess_tail: Tensor
    varies: Tensor


def convergence(draws: Tensor) -> Convergence:
    """(..., chains, draws, Q) -> (..., Q)."""
    lead, (chains, length, columns) = draws.shape[:-3], draws.shape[-3:]
    width = max(1, _TOGETHER // max(1, chains * length))
    parts = [part for one in draws.reshape(-1, chains, length, columns) for part in one.split(width, 2)]
    found = zip(*run_all([partial(_convergence, part) for part in parts]), strict=True)
    return Convergence(*(torch.cat(each).reshape(*lead, columns) for each in found))


def _convergence(draws: Tensor) -> Convergence:
    # Here, because the compiler takes half a second to import and `laplace` needs none of it.
    from bayestie._diagnostics_kernels import convergence as kernel

    whole = draws.detach().cpu().permute(2, 0, 1).contiguous().numpy()
    half = whole.shape[2] // 2
    split = np.concatenate([whole[..., :half], whole[..., -half:]], 1) if half else whole
    flat = split.reshape(len(split), -1).astype(np.float64, copy=False)
    order = flat.argsort(1)
    # Quantiles of all draws: an odd one in the middle of a chain is in neither half.
    if draws.shape[1] % 2:
        cuts = np.stack([np.quantile(whole.reshape(len(whole), -1), q, axis=1) for q in _TAILS], 1)
    else:
        at = np.array(_TAILS) * (flat.shape[1] - 1)
        low = at.astype(int)
        below, above = (np.take_along_axis(flat, order[:, i], 1) for i in (low, low + 1))
        cuts = below + (at - low) * (above - below)
    found = np.empty((len(flat), 3))
    kernel(flat, order, cuts, _normal_scores(flat.shape[1]), split.shape[1], found)
    least, greatest = (np.take_along_axis(flat, order[:, i : i + 1], 1)[:, 0] for i in (0, flat.shape[1] - 1))
    varies = torch.from_numpy(greatest > least).to(draws.device)
    rhat, bulk, tail = torch.from_numpy(found).to(draws).unbind(1)
    return Convergence(rhat, bulk, tail, varies)


@lru_cache(maxsize=8)
def _normal_scores(count: int) -> np.ndarray:
    """Of ranks 1, 1.5, 2, ... ``count`` (Blom 1958)."""
    return ndtri((np.arange(2, 2 * count + 1) / 2 - 0.375) / (count + 0.25))
