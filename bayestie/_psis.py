"""Pareto-smoothed importance sampling over many rows of weights at once."""

import math

import torch
from torch import Tensor

# Doubles in one piece of work, rows x max(draws, tail x candidates): small enough for the cache.
_BUDGET = 500_000
# Spread of log weights below which they are equal but for rounding.
_EQUAL = 1e-9
_PRIOR_SCALE = 3
_PRIOR_COUNT = 10


def psis(log_weights: Tensor, r_eff: float = 1.0) -> tuple[Tensor, Tensor]:
    r"""Smooth the largest importance weights of every row by a fitted generalised Pareto tail.

    The M largest of S weights, M = floor(3 sqrt(S / r_eff)) (a fifth of S when S r_eff <= 225),
    are replaced by the expected order statistics of the Pareto distribution fitted to them,

    .. math:: \hat w_{(j)} = F^{-1}\{(j - 1/2) / M\}, \qquad
              F(w) = 1 - (1 + \hat k (w - u) / \hat\sigma)^{-1/\hat k},

    and truncated at the largest raw weight.

    Args:
        log_weights: log importance ratios, up to a constant per row; shape (..., S).
        r_eff: relative effective sample size of the draws, in (0, 1] for most chains.

    Returns:
        Smoothed log weights, normalised so that each row sums to one (..., S), and the shape
        khat (...). Read khat against min(1 - 1 / log10 S, 0.7): above it the estimate is not to
        be trusted. Equal weights give -inf; weights that cannot be judged (fewer than five in
        the tail, NaN, +inf, a tail of ties) give +inf and are left as they are.

    Reference: Vehtari, Simpson, Gelman, Yao, Gabry (2024), Pareto smoothed importance sampling,
        JMLR 25(72), section 3; Zhang and Stephens (2009), Technometrics 51, for the fit.
    """
    log_weights = log_weights.to(torch.float64)
    num_draws = log_weights.shape[-1]
    num_tail = _tail_length(num_draws, r_eff)
    per_row = max(num_draws, num_tail * _num_candidates(num_tail))
    parts = log_weights.reshape(-1, num_draws).split(max(1, _BUDGET // per_row))
    smoothed, khat = zip(*(_rows(part, num_tail) for part in parts), strict=True)
    batch_shape = log_weights.shape[:-1]
    return torch.cat(smoothed).reshape(log_weights.shape), torch.cat(khat).reshape(batch_shape)


def good_k(num_draws: int) -> float:
    """Largest khat at which S draws give a usable estimate, min(1 - 1 / log10 S, 0.7).

    Args:
        num_draws: S, the number of weights; at least 2.

    Reference: Vehtari et al. (2024), section 3.2.4.
    """
    return min(1 - 1 / math.log10(num_draws), 0.7)


def _tail_length(num_draws: int, r_eff: float) -> int:
    if num_draws * r_eff > 225:
        return min(int(3 * math.sqrt(num_draws / r_eff)), num_draws - 1)
    return num_draws // 5


def _num_candidates(num_tail: int) -> int:
    return 30 + int(math.sqrt(num_tail))


def _rows(rows: Tensor, num_tail: int) -> tuple[Tensor, Tensor]:
    """Raw log weights (N, S) -> smoothed and normalised (N, S), khat (N,)."""
    top, bottom = rows.amax(-1), rows.amin(-1)
    broken = ~top.isfinite() | bottom.isnan()
    equal = (top - bottom < _EQUAL) & ~broken
    if broken.any():
        rows = torch.where(rows.isfinite(), rows, -math.inf)
        top = rows.amax(-1)
    empty = top == -math.inf
    rows = torch.where(empty[:, None], 0.0, rows - top[:, None]) if empty.any() else rows - top[:, None]
    khat = torch.where(equal, -math.inf, math.inf).to(rows)
    fit = ~equal & ~broken
    if num_tail >= 5 and fit.any():
        rows[fit], khat[fit] = _smooth(rows[fit], num_tail)
    return rows - torch.logsumexp(rows, -1, keepdim=True), khat


def _smooth(rows: Tensor, num_tail: int) -> tuple[Tensor, Tensor]:
    """Rows with maximum 0 (N, S) -> smoothed rows and khat (N,)."""
    values, index = rows.topk(num_tail + 1, dim=-1)
    tail, index = values[:, :-1].flip(-1), index[:, :-1].flip(-1)
    cutoff = values[:, -1:].exp()
    shape, scale = _fit_pareto(tail.exp() - cutoff)
    prob = (torch.arange(num_tail, device=rows.device, dtype=rows.dtype) + 0.5) / num_tail
    exponential = -torch.log1p(-prob)
    k = shape[:, None]
    safe_k = torch.where(k == 0, 1.0, k)
    quantile = torch.where(k == 0, exponential, torch.expm1(safe_k * exponential) / safe_k)
    smoothed = (cutoff + scale[:, None] * quantile).log().clamp(max=0.0)
    usable = (shape.isfinite() & (scale > 0))[:, None] & ~smoothed.isnan()
    return rows.scatter(-1, index, torch.where(usable, smoothed, tail)), shape


def _fit_pareto(excess: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted excesses over the cutoff (N, M) -> shape (N,), scale (N,); a tail of ties gives inf."""
    num = excess.shape[-1]
    num_candidates = _num_candidates(num)
    quartile = excess[:, int(num / 4 + 0.5) - 1]
    tied = quartile <= excess[:, 0]
    quartile = torch.where(tied, 1.0, quartile)
    grid = torch.arange(1, num_candidates + 1, device=excess.device, dtype=excess.dtype)
    offset = 1 - torch.sqrt(num_candidates / (grid - 0.5))
    b = offset / (_PRIOR_SCALE * quartile[:, None]) + 1 / excess[:, -1:]
    k = torch.log1p(-b[:, :, None] * excess[:, None, :]).mean(-1)
    log_profile = num * (torch.log(-b / k) - k - 1)
    weight = torch.softmax(log_profile, -1)
    weight = torch.where(weight >= 10 * torch.finfo(weight.dtype).eps, weight, 0.0)
    b_mean = (b * weight).sum(-1) / weight.sum(-1)
    k_mean = torch.log1p(-b_mean[:, None] * excess).mean(-1)
    scale = -k_mean / b_mean
    # The weak prior N(1/2) on the shape, worth ten draws, steadies short tails.
    shape = (num * k_mean + _PRIOR_COUNT * 0.5) / (num + _PRIOR_COUNT)
    return torch.where(tied | shape.isnan(), math.inf, shape), scale
