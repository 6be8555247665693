"""Refits with observations left out, as points of one batch, and how well each predicts what it left out."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayestie._collect import collect
from bayestie._draws import effective_size
from bayestie._engines import Draws
from bayestie._errors import InferenceError
from bayestie._points import MAX_NUMBERS, Grid, Work
from bayestie._program import LaneProgram


@dataclass(frozen=True)
class LeftOut:
    """What P refits leave out: ``masks`` holds, by observed site, True where left out, (P, *shape)."""

    strengths: Tensor  # (P,), which strength each refit is at
    masks: Mapping[str, Tensor]


@dataclass(frozen=True)
class Scores:
    """log p(left out | rest) of P refits, all (P,).

    ``error`` is the Monte Carlo error without ``shared``, the error of the full data's evidence, which
    all refits of a strength have in common.
    """

    elpd: np.ndarray
    error: np.ndarray
    shared: np.ndarray
    source: np.ndarray  # "evidence" or "draws"
    certified: np.ndarray


@dataclass
class _Fits:
    """What is kept of the batches: log evidence, its error, and the score by draws, per point."""

    evidence: Tensor
    evidence_error: Tensor
    usable: Tensor  # whether the evidence is to be believed
    certified: Tensor
    by_draws: Tensor
    by_draws_error: Tensor


def observation_shapes(program: LaneProgram) -> dict[str, torch.Size]:
    """Observed site -> shape of its elementwise log density: one entry per observation."""
    position = torch.zeros(program.num_latent, dtype=program.dtype, device=program.device)
    with torch.no_grad(), program.quiet():
        lane = program.run_lane(position, program.point(0))
    return {name: lane.log_densities[name].shape for name in program.observed}


def leave_out(
    base: LaneProgram,
    grid: Grid,
    left: LeftOut,
    work: Work,
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Scores:
    r"""Refit at every point with its observations weighted 0; score them by the better of two estimates.

    .. math:: \log p(y_k \mid y_{-k}) = \log p(y) - \log p(y_{-k})
              = \log E[p(y_k \mid \theta) \mid y_{-k}]

    The first needs both evidences certified; the second is the mean over the refit's draws. Of those
    that can be had, the one with the smaller Monte Carlo error is taken.
    """
    # A fit to all data at each strength, for its evidence.
    strengths, owner = torch.unique(left.strengths, return_inverse=True)
    count = len(strengths) + len(left.strengths)
    full = {n: torch.zeros((len(strengths), *m.shape[1:]), dtype=torch.bool) for n, m in left.masks.items()}
    masks = {n: torch.cat([full[n], m]) for n, m in left.masks.items()}
    at = torch.cat([strengths, left.strengths])
    number = torch.zeros(count, dtype=torch.float64)
    fits = _Fits(*(number.clone() for _ in range(6)))
    for batch, part in enumerate(work.batches(base, count)):
        rows = slice(part.start, part.stop)
        weights = {n: (~m[rows]).double() for n, m in masks.items()}
        program = LaneProgram(
            model, args, kwargs, grid.at(at[rows]), weights=weights, device=base.device, seed=work.seed
        )
        draws, _ = work.run(program, batch)
        _keep(fits, rows, draws)
        _score(fits, rows, base, at[rows], {n: m[rows] for n, m in masks.items()}, draws)
    return _chosen(fits, owner, len(strengths))


def _keep(fits: _Fits, rows: slice, draws: Draws) -> None:
    independent = [e != "nuts" and e != "pyro_nuts" for e in draws.engine]
    certified = torch.tensor(draws.certified, dtype=torch.float64)
    fits.evidence[rows] = draws.log_evidence.cpu().double()
    fits.evidence_error[rows] = draws.log_evidence_error.cpu().double()
    fits.certified[rows] = certified
    # Of a point that nuts took over, the evidence is that of a Gaussian fit that was refused.
    fits.usable[rows] = certified * torch.tensor(independent) * torch.isfinite(fits.evidence[rows])


def _score(
    fits: _Fits, rows: slice, base: LaneProgram, strengths: Tensor, masks: Mapping[str, Tensor], draws: Draws
) -> None:
    """log mean over draws of the left-out observations' joint density, and its error."""
    if base.enumerated:  # an observation has no density of its own there
        fits.by_draws[rows], fits.by_draws_error[rows] = torch.nan, torch.inf
        return
    per_point = sum(m[0].numel() for m in masks.values()) * math.prod(draws.position.shape[1:3])
    width = max(1, MAX_NUMBERS // max(1, per_point))
    for start in range(0, len(strengths), width):
        part = slice(start, start + width)
        points = strengths[part].to(base.device)
        found = collect(base, points, draws.position[part], lambda key: key.startswith("log_likelihood/"))
        total = np.zeros(draws.position[part].shape[:3])
        for name, mask in masks.items():
            rows_of = found[f"log_likelihood/{name}"]
            out = mask[part].numpy().reshape(len(points), 1, 1, *mask.shape[1:])
            total += np.where(out, rows_of, 0.0).reshape((*total.shape, -1)).sum(-1)
        limit = draws.ess_weights[part].cpu().numpy()
        for i, one in enumerate(total):
            elpd, error = _log_mean(one, float(limit[i]))
            fits.by_draws[rows.start + start + i] = elpd
            fits.by_draws_error[rows.start + start + i] = error


def _log_mean(log_density: np.ndarray, ess_weights: float) -> tuple[float, float]:
    """log of the mean of exp (chains, draws), and its Monte Carlo error by the delta method."""
    top = log_density.max()
    if not np.isfinite(top):
        return -math.inf, math.inf
    density = np.exp(log_density - top)
    mean = density.mean()
    size = min(float(effective_size(density[..., None])[0]), ess_weights, density.size)
    return float(top + math.log(mean)), float(density.std(ddof=1) / mean / math.sqrt(size))


def _chosen(fits: _Fits, owner: Tensor, num_full: int) -> Scores:
    rest = slice(num_full, None)
    difference = fits.evidence[owner] - fits.evidence[rest]
    own, shared = fits.evidence_error[rest], fits.evidence_error[owner]
    usable = (fits.usable[owner] * fits.usable[rest]) > 0
    by_evidence = usable & (torch.hypot(own, shared) <= fits.by_draws_error[rest])
    elpd = torch.where(by_evidence, difference, fits.by_draws[rest])
    if bool(torch.isnan(elpd).any()):
        raise InferenceError(
            "leaving observations out",
            found=f"{int(torch.isnan(elpd).sum())} refits without a score",
            expected="a certified evidence, or draws of the left-out observations' density",
            fix="Sum discrete latents out by hand, or use an engine that gives the evidence.",
        )
    return Scores(
        elpd.numpy(),
        torch.where(by_evidence, own, fits.by_draws_error[rest]).numpy(),
        torch.where(by_evidence, shared, 0.0).numpy(),
        np.where(by_evidence.numpy(), "evidence", "draws"),
        fits.certified[rest].numpy() > 0,
    )
