"""R-hat and effective sample size of many quantities at once.

Vehtari, Gelman, Simpson, Carpenter and Buerkner (2021), Rank-normalization, folding, and localization.

arviz-stats holds the reference for one quantity at a time; a sweep asks for thousands between rounds, so
the same formulas run here batched, and tests hold the two together.
"""

import math
from functools import partial

import torch
from torch import Tensor

from bayestie._workers import run_all

_TOGETHER = 1 << 18  # numbers diagnosed together: what a core's cache holds


def convergence(draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rank-normalised split R-hat (the larger of bulk and folded), bulk ESS, tail ESS of the worse quantile.

    (chains, draws, Q) -> (Q,) each.
    """
    width = max(1, _TOGETHER // max(1, draws.shape[0] * draws.shape[1]))
    parts = draws.split(width, 2)
    rhat, bulk, tail = zip(*run_all([partial(_convergence, part) for part in parts]), strict=True)
    return torch.cat(rhat), torch.cat(bulk), torch.cat(tail)


def _convergence(draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    split = _split(draws.permute(2, 0, 1).contiguous())
    flat = split.flatten(1)
    scores, ordered = _normal_scores(flat)
    bulk = scores.reshape(split.shape)
    folded, _ = _normal_scores((flat - _quantile(ordered, 0.5)).abs())
    rhat = torch.maximum(_rhat(bulk), _rhat(folded.reshape(split.shape)))
    # Quantiles of all draws: an odd one in the middle of a chain is in neither half.
    whole = ordered if draws.shape[1] % 2 == 0 else draws.flatten(0, 1).mT.sort(1).values
    tails = [_ess((split <= _quantile(whole, q).unsqueeze(1)).to(draws)) for q in (0.05, 0.95)]
    return rhat, _ess(bulk), torch.minimum(*tails)


# Inside, draws are (Q, chains, draws): every chain of a quantity lies together.


def _split(draws: Tensor) -> Tensor:
    half = draws.shape[2] // 2
    return torch.cat([draws[..., :half], draws[..., -half:]], 1)


def _quantile(ordered: Tensor, q: float) -> Tensor:
    """Linearly interpolated quantile of sorted rows (Q, N) -> (Q, 1)."""
    at = q * (ordered.shape[1] - 1)
    low = math.floor(at)
    high = min(low + 1, ordered.shape[1] - 1)
    return torch.lerp(ordered[:, low], ordered[:, high], at - low).unsqueeze(1)


def _normal_scores(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (Q, N) -> normal scores of their ranks, ties sharing the mean of theirs, and the rows sorted."""
    count = flat.shape[1]
    ordered, order = _sorted(flat)
    halves = torch.arange(2, 2 * count + 1, dtype=flat.dtype, device=flat.device) / 2
    table = torch.special.ndtri((halves - 0.375) / (count + 0.25))  # of ranks 1, 1.5, 2, ...
    scores = table[::2].expand_as(flat)
    differs = ordered[:, 1:] != ordered[:, :-1]
    tied = ~differs.all(1)
    if bool(tied.any()):
        scores = scores.clone()
        scores[tied] = table[_twice_mean_rank(differs[tied])]
    return torch.empty_like(flat).scatter_(1, order, scores), ordered


def _sorted(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in order, and the order."""
    if flat.device.type != "cpu":
        return flat.sort(1)
    order = torch.from_numpy(flat.numpy().argsort(1))  # three times faster than torch's
    return flat.gather(1, order), order


def _twice_mean_rank(differs: Tensor) -> Tensor:
    """First plus last place (from 0) of the run of equal numbers at every place: (Q, N - 1) -> (Q, N)."""
    edge = differs.new_ones(len(differs), 1)
    place = torch.arange(differs.shape[1] + 1, device=differs.device)
    first = torch.where(torch.cat([edge, differs], 1), place, 0).cummax(1).values
    last = torch.where(torch.cat([differs, edge], 1), place, len(place)).flip(1).cummin(1).values.flip(1)
    return first + last


def _rhat(x: Tensor) -> Tensor:
    length = x.shape[2]
    within = x.var(2).mean(1)
    between = length * x.mean(2).var(1)
    return ((between / within + length - 1) / length).sqrt()


def _ess(x: Tensor) -> Tensor:
    """Effective sample size of (Q, chains, draws) by Geyer's initial monotone sequence."""
    number, chains, length = x.shape
    size = 1 << (2 * length - 1).bit_length()
    centred = x - x.mean(2, keepdim=True)
    spectrum = torch.fft.rfft(centred, n=size)
    power = spectrum.real.square() + spectrum.imag.square()
    # The mean over chains is taken before the way back: one transform per quantity.
    covariance = torch.fft.irfft(power.mean(1), n=size)[:, :length] / length
    mean_variance = covariance[:, :1] * length / (length - 1.0)
    total = mean_variance * (length - 1.0) / length
    if chains > 1:
        total = total + x.mean(2).var(1).unsqueeze(1)
    rho = 1.0 - (mean_variance - covariance) / total  # (Q, length)
    rho[:, 0] = 1.0
    pairs = rho[:, : length - length % 2].reshape(number, -1, 2).sum(2)
    pairs = pairs[:, : max(1, (length - 3) // 2)]  # arviz never looks at the last three lags
    positive = (pairs > 0).cumprod(1).bool()
    monotone = torch.cummin(torch.where(positive, pairs, torch.inf), 1).values
    tau = -1.0 + 2.0 * torch.where(positive, monotone, 0.0).sum(1)
    count = positive.sum(1)
    # One more even lag if the sequence ended at a negative pair (arviz and Stan do so).
    following = rho.gather(1, (2 * count).clamp(max=length - 1).unsqueeze(1)).squeeze(1)
    tau = tau + following.clamp(min=0.0)
    tau = torch.maximum(tau, torch.full_like(tau, 1.0 / math.log10(chains * length)))
    ess = chains * length / tau
    constant = (x.amax((1, 2)) - x.amin((1, 2))) < torch.finfo(x.dtype).resolution
    return torch.where(constant, torch.full_like(ess, float(chains * length)), ess)
