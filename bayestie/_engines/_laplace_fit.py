"""The Gaussian at the mode of every point: batched damped Newton, and the curvature it ends at."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from bayestie._affine import AffineDensity
from bayestie._engines._protocol import Task
from bayestie._workers import eigh

MAX_ITERATIONS = 100
MANY_LATENTS = 200  # of a density whose curvature is one gradient per latent
APPROACH = 1000  # iterations of L-BFGS, at most
LEAST_GAIN = 0.1  # of the step times the gradient: Newton's quadratic gains half
_NEWTON_STEPS = 2.0 ** -torch.arange(0, 12, dtype=torch.float64)


@dataclass
class LaplaceFit:
    """A Gaussian at each point: u = mode + factor z, z standard normal.

    Shapes: mode and other_mode (P, D), factor (P, D, D), log_det (P,) of the factor, converged (P,),
    num_modes (P,). Where there is another mode, ``other_mode`` is one or near it, elsewhere the mode itself.
    """

    points: Tensor
    mode: Tensor
    factor: Tensor
    log_det: Tensor
    converged: Tensor
    num_modes: Tensor
    other_mode: Tensor

    def take(self, index: Tensor) -> "LaplaceFit":
        fields = ("points", "mode", "factor", "log_det", "converged", "num_modes", "other_mode")
        return LaplaceFit(*(getattr(self, name)[index] for name in fields))

    def to_position(self, z: Tensor) -> Tensor:
        """(P, batch, D) whitened -> position."""
        return self.mode.unsqueeze(1) + torch.bmm(z, self.factor.mT)

    @property
    def num_noise(self) -> int:
        return self.mode.shape[1]

    def propose(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Standard normals (P, batch, D) -> positions and their log density (P, batch)."""
        return self.to_position(noise), self.whitened_log_density(noise)

    def log_density(self, position: Tensor) -> Tensor:
        """Log density of the Gaussian at positions (P, batch, D)."""
        centred = (position - self.mode.unsqueeze(1)).mT
        z = torch.linalg.solve_triangular(self.factor, centred, upper=False)
        return self.whitened_log_density(z.mT)

    def whitened_log_density(self, z: Tensor) -> Tensor:
        dim = z.shape[-1]
        return -0.5 * z.square().sum(-1) - 0.5 * dim * math.log(2.0 * math.pi) - self.log_det.unsqueeze(1)


def fit_laplace(task: Task, points: Tensor, start: Tensor | None = None, *, only: bool = False) -> LaplaceFit:
    """Mode and curvature at every point; of an unknown noise sd the marginal's, the others integrated out.

    The mode is looked for from ``start`` (P, D), the origin without one, and, unless from there ``only``,
    on a few points from other starts too.
    """
    density, dim = task.density, task.density.num_latent
    axes = density.noise_axes if isinstance(density, AffineDensity) else None
    if axes is not None:
        centre, covariance, num_modes, found = axes.take(points).gaussian()
        factor, info = torch.linalg.cholesky_ex(covariance)
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return LaplaceFit(points, centre, factor, log_det, found & (info == 0), num_modes, centre)
    start = task.normals((len(points), dim), 101) * 1e-3 if start is None else start
    mode, value, converged = _newton(task, points, _approached(task, points, start))
    num_modes = torch.ones(len(points), dtype=torch.long, device=points.device)
    other = mode
    if not (only or _is_log_concave(task)):
        mode, converged, num_modes, other = _other_starts(task, points, mode, value, converged, num_modes)
    factor, log_det, positive = _covariance_factor(-density.hessian(points, mode))
    return LaplaceFit(points, mode, factor, log_det, converged & positive, num_modes, other)


def _is_log_concave(task: Task) -> bool:
    # Affine predictors with Gaussian priors: log-concave whenever the likelihood is in its predictor.
    # The likelihoods torch has that are not (Student's t, Cauchy) are named.
    families = getattr(task.density, "families", None)
    heavy = {"StudentT", "Cauchy", "HalfCauchy"}
    return (
        families is not None
        and getattr(task.density, "quadratic", None) is not None
        and getattr(task.density, "latent_scale", None) is None
        and all(f.distribution.__name__ not in heavy and len(f.names) == 1 for f in families)
    )


def _other_starts(
    task: Task, points: Tensor, mode: Tensor, value: Tensor, converged: Tensor, num_modes: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Newton from random starts at up to four points spread over the sweep: two at each, eight of few."""
    count = len(points)
    chosen = torch.unique(torch.linspace(0, count - 1, min(count, 4)).round().long()).to(points.device)
    attempts = 8 // len(chosen)
    starts = [
        task.generator(102, i).uniform(-2.0, 2.0, (len(chosen), mode.shape[1])) for i in range(attempts)
    ]
    others = points[chosen.repeat(attempts)]
    begin = torch.as_tensor(np.concatenate(starts)).to(mode)
    found = _newton(task, others, _approached(task, others, begin))
    second = torch.full_like(mode, torch.nan)
    for position, its_value, its_end in zip(*(x.split(len(chosen)) for x in found), strict=True):
        apart = (position - mode[chosen]).abs().amax(-1) > 1e-3 * (1.0 + mode[chosen].abs().amax(-1))
        other = its_end & converged[chosen] & apart
        num_modes[chosen] += other.long()
        better = its_end & (~converged[chosen] | (its_value > value[chosen] + 1e-6))
        second[chosen[other]] = torch.where(better.unsqueeze(1), mode[chosen], position)[other]
        index = chosen[better]
        mode[index], value[index], converged[index] = position[better], its_value[better], True
    two = torch.nonzero(num_modes > 1).squeeze(1)
    if not len(two):
        return mode, converged, num_modes, mode
    # One point with two modes: doubt all.
    nearest = two[(torch.arange(count, device=two.device).unsqueeze(1) - two).abs().argmin(1)]
    return mode, converged, num_modes.clamp(min=2), second[nearest]


def _approached(task: Task, points: Tensor, start: Tensor) -> Tensor:
    """Positions (P, D) near a mode, by L-BFGS where curvature costs a gradient for each of many latents.

    Newton's method needs dozens of steps from afar; of these, gradients take the most.
    """
    density, dim = task.density, start.shape[1]
    if dim <= MANY_LATENTS or density.route != "program":
        return start

    def negative(u: np.ndarray) -> tuple[float, np.ndarray]:
        position = torch.as_tensor(u).to(start).view(len(points), 1, dim)
        value, grad = (x.squeeze(1) for x in density.value_and_grad(points, position))
        finite = torch.isfinite(value) & torch.isfinite(grad).all(1)
        total = -float(value[finite].sum()) if bool(finite.all()) else float("inf")
        return total, -torch.where(finite.unsqueeze(1), grad, 0.0).reshape(-1).cpu().numpy().astype(float)

    # All points as one problem: that its parts have nothing to do with one another, L-BFGS finds out.
    begin, options = (
        start.reshape(-1).cpu().numpy().astype(float),
        {"maxiter": APPROACH, "maxfun": 2 * APPROACH},
    )
    result = minimize(negative, begin, method="L-BFGS-B", jac=True, options=options)
    return torch.as_tensor(result.x).to(start).view(start.shape)


def _newton(task: Task, points: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Damped Newton ascent at all points at once; (mode, value, converged)."""
    density = task.density
    position = start.clone()
    value, grad = (x.squeeze(1) for x in density.value_and_grad(points, position.unsqueeze(1)))
    converged = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    damping = torch.zeros_like(value)
    stuck = torch.zeros_like(value)
    steps = _NEWTON_STEPS.to(position)
    # Points that are done stay in the batch until they are half of it: another batch has its own set-up.
    active = torch.arange(len(points), device=points.device)
    going = torch.ones_like(converged)
    here = points
    for _ in range(MAX_ITERATIONS):
        precision = -density.hessian(here, position[active])
        step = _damped_solve(precision, grad[active], damping[active])
        decrement = (step * grad[active]).sum(-1)
        full = position[active] + step
        best_value = torch.nan_to_num(density.value(here, full.unsqueeze(1)), nan=-torch.inf).squeeze(1)
        best, trial = torch.zeros_like(active), full.unsqueeze(1)
        # Near the mode values differ by rounding alone, and the full step is the right one.
        near = decrement.abs() <= 1e-8 * (1.0 + value[active].abs())
        if not bool((near | ~going | (best_value >= value[active] + LEAST_GAIN * decrement)).all()):
            trial = position[active].unsqueeze(1) + steps.view(1, -1, 1) * step.unsqueeze(1)
            shorter = torch.nan_to_num(density.value(here, trial[:, 1:]), nan=-torch.inf)
            values = torch.cat([best_value.unsqueeze(1), shorter], 1)
            best_value, best = values.max(1)
            best = torch.where(near, 0, best)
        improved = going & (best_value >= value[active] - 1e-10 * (1.0 + value[active].abs()))
        chosen = active[improved]
        position[chosen] = trial[improved, best[improved]]
        # Shorter than full steps mean the quadratic is poor: damp; full steps: trust it again.
        damping[active] = torch.where(
            improved & (best <= 1), damping[active] * 0.1, (damping[active] * 4.0).clamp(min=1e-3)
        )
        stuck[active] = torch.where(improved, 0.0, stuck[active] + 1.0)
        scale = 1.0 + value[active].abs()
        done = improved & (decrement.abs() <= 1e-12 * scale) & torch.isfinite(decrement)
        converged[active[done]] = True
        going = going & ~done & (stuck[active] < 8)
        if not bool(going.any()):
            break
        if 2 * int(going.sum()) <= len(active):
            active = active[going]
            here, going = points[active], torch.ones_like(active, dtype=torch.bool)
        value[active], grad[active] = (
            x.squeeze(1) for x in density.value_and_grad(here, position[active].unsqueeze(1))
        )
    value = density.value(points, position.unsqueeze(1)).squeeze(1)
    return position, value, converged


def _damped_solve(precision: Tensor, grad: Tensor, damping: Tensor) -> Tensor:
    """(precision + damping diag)^-1 grad, raising the damping of a lane until its matrix is positive."""
    precision = torch.nan_to_num(precision, nan=0.0, posinf=1e150, neginf=-1e150)
    diagonal = precision.diagonal(dim1=-2, dim2=-1).abs().clamp(min=1e-8)
    extra = damping.clone()
    for _ in range(30):
        factor, info = torch.linalg.cholesky_ex(precision + torch.diag_embed(extra.unsqueeze(-1) * diagonal))
        if not bool((info != 0).any()):
            break
        extra = torch.where(info != 0, (extra * 10.0).clamp(min=1e-4), extra)
    return torch.cholesky_solve(torch.nan_to_num(grad).unsqueeze(-1), factor).squeeze(-1)


def _covariance_factor(precision: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lower factor of the inverse of each precision; where it is not positive, of its absolute value."""
    symmetric = 0.5 * (precision + precision.mT)
    finite = torch.isfinite(symmetric).flatten(1).all(1)
    symmetric = torch.where(finite.view(-1, 1, 1), symmetric, torch.eye(symmetric.shape[-1]).to(symmetric))
    upper, info = torch.linalg.cholesky_ex(symmetric.flip(-1, -2))
    positive = (info == 0) & finite
    if not bool(positive.all()):
        eigenvalues, vectors = eigh(symmetric)
        floor = 1e-6 * eigenvalues.abs().amax(-1, keepdim=True).clamp(min=1e-12)
        repaired = (vectors * eigenvalues.abs().clamp(min=floor).unsqueeze(-2)) @ vectors.mT
        upper = torch.where(
            positive.view(-1, 1, 1), upper, torch.linalg.cholesky_ex(repaired.flip(-1, -2))[0]
        )
    # The flip turns the lower factor of the reversed matrix into an upper one, whose inverse
    # transposed is the lower factor of the covariance: no second factorisation.
    reverse = upper.flip(-1, -2)
    eye = torch.eye(reverse.shape[-1], dtype=reverse.dtype, device=reverse.device).expand_as(reverse)
    factor = torch.linalg.solve_triangular(reverse, eye, upper=True).mT
    return factor, factor.diagonal(dim1=-2, dim2=-1).log().sum(-1), positive
