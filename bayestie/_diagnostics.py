"""R-hat and effective sample size of many quantities at once.

Vehtari, Gelman, Simpson, Carpenter and Buerkner (2021), Rank-normalization, folding, and localization.

arviz-stats holds the reference for one quantity at a time; a sweep asks for thousands between rounds, so
the same formulas run here batched, and tests hold the two together.
"""

import math

import torch
from torch import Tensor


def split_rhat(draws: Tensor) -> Tensor:
    """Rank-normalised split R-hat, the larger of bulk and folded: (chains, draws, Q) -> (Q,)."""
    split = _split(draws)
    median = split.flatten(0, 1).quantile(0.5, dim=0)
    bulk = _rhat(_normal_scores(split))
    folded = _rhat(_normal_scores((split - median).abs()))
    return torch.maximum(bulk, folded)


def effective_sample_size(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Bulk and tail effective sample size, the tail's of the worse of the 5% and 95% quantiles.

    (chains, draws, Q) -> (Q,) each.
    """
    split = _split(draws)
    bulk = _ess(_normal_scores(split))
    flat = draws.flatten(0, 1)
    tails = [_ess(_split((draws <= flat.quantile(q, dim=0)).to(draws))) for q in (0.05, 0.95)]
    return bulk, torch.minimum(*tails)


def _split(draws: Tensor) -> Tensor:
    half = draws.shape[1] // 2
    return torch.cat([draws[:, :half], draws[:, -half:]])


def _normal_scores(x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    count = flat.shape[0]
    ordered, order = flat.sort(0)
    ranks = torch.arange(1, count + 1, dtype=x.dtype, device=x.device).unsqueeze(1).expand_as(flat)
    if bool((ordered[1:] == ordered[:-1]).any()):
        ranks = _average_ties(ordered)
    scores = torch.special.ndtri((ranks - 0.375) / (count + 0.25))
    return torch.empty_like(flat).scatter_(0, order, scores).reshape(x.shape)


def _average_ties(ordered: Tensor) -> Tensor:
    columns = ordered.mT.contiguous()
    first = torch.searchsorted(columns, columns, side="left")
    last = torch.searchsorted(columns, columns, side="right")
    return (0.5 * (first + last + 1).to(ordered)).mT


def _rhat(x: Tensor) -> Tensor:
    length = x.shape[1]
    within = x.var(1).mean(0)
    between = length * x.mean(1).var(0)
    return ((between / within + length - 1) / length).sqrt()


def _ess(x: Tensor) -> Tensor:
    """Effective sample size of (chains, draws, Q) by Geyer's initial monotone sequence."""
    chains, length, _ = x.shape
    size = 1 << (2 * length - 1).bit_length()
    centred = x - x.mean(1, keepdim=True)
    spectrum = torch.fft.rfft(centred, n=size, dim=1)
    covariance = torch.fft.irfft(spectrum.abs().square(), n=size, dim=1)[:, :length] / length
    mean_variance = covariance[:, 0].mean(0) * length / (length - 1.0)
    total = mean_variance * (length - 1.0) / length
    if chains > 1:
        total = total + x.mean(1).var(0)
    rho = 1.0 - (mean_variance - covariance.mean(0)) / total  # (length, Q)
    rho[0] = 1.0
    pairs = rho[: length - length % 2].reshape(-1, 2, rho.shape[1]).sum(1)
    pairs = pairs[: max(1, (length - 3) // 2)]  # arviz never looks at the last three lags
    positive = (pairs > 0).cumprod(0).bool()
    monotone = torch.cummin(torch.where(positive, pairs, torch.inf), 0).values
    tau = -1.0 + 2.0 * torch.where(positive, monotone, 0.0).sum(0)
    count = positive.sum(0)
    # One more even lag if the sequence ended at a negative pair (arviz and Stan do so).
    following = rho[(2 * count).clamp(max=length - 1), torch.arange(rho.shape[1], device=x.device)]
    tau = tau + following.clamp(min=0.0)
    tau = torch.maximum(tau, torch.full_like(tau, 1.0 / math.log10(chains * length)))
    ess = chains * length / tau
    constant = (x.amax((0, 1)) - x.amin((0, 1))) < torch.finfo(x.dtype).resolution
    return torch.where(constant, torch.full_like(ess, float(chains * length)), ess)
