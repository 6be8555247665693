"""Laplace: batched damped Newton to the mode, curvature there, i.i.d. Gaussian draws, importance weights.

If the log weights are constant to rounding the posterior *is* that Gaussian and the draws are exact;
otherwise they are Pareto-smoothed importance sampling, certified by khat and the weights' effective
sample size (Vehtari, Simpson, Gelman, Yao and Gabry 2024, Pareto smoothed importance sampling, JMLR 25).
"""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from bayestie._engines._protocol import Draws, Task
from bayestie._psis import psis

MAX_ITERATIONS = 100
_NEWTON_STEPS = 2.0 ** -torch.arange(0, 12, dtype=torch.float64)


@dataclass
class LaplaceFit:
    """A Gaussian at each point: u = mode + factor z, z standard normal.

    Shapes: mode (P, D), factor (P, D, D), log_det (P,) of the factor, converged (P,), num_modes (P,).
    """

    points: Tensor
    mode: Tensor
    factor: Tensor
    log_det: Tensor
    converged: Tensor
    num_modes: Tensor

    def take(self, index: Tensor) -> "LaplaceFit":
        fields = ("points", "mode", "factor", "log_det", "converged", "num_modes")
        return LaplaceFit(*(getattr(self, name)[index] for name in fields))

    def to_position(self, z: Tensor) -> Tensor:
        """(P, batch, D) whitened -> position."""
        return self.mode.unsqueeze(1) + torch.bmm(z, self.factor.mT)

    def log_density(self, position: Tensor) -> Tensor:
        """Log density of the Gaussian at positions (P, batch, D)."""
        centred = (position - self.mode.unsqueeze(1)).mT
        z = torch.linalg.solve_triangular(self.factor, centred, upper=False)
        return self.whitened_log_density(z.mT)

    def whitened_log_density(self, z: Tensor) -> Tensor:
        dim = z.shape[-1]
        return -0.5 * z.square().sum(-1) - 0.5 * dim * math.log(2.0 * math.pi) - self.log_det.unsqueeze(1)


def fit_laplace(task: Task, points: Tensor) -> LaplaceFit:
    """Mode and curvature at every point, from the origin and, on a few points, from other starts too."""
    density, dim = task.density, task.density.num_latent
    origin = task.normals((len(points), dim), 101) * 1e-3
    mode, value, converged = _newton(task, points, origin)
    num_modes = torch.ones(len(points), dtype=torch.long, device=points.device)
    if not _is_log_concave(task):
        mode, value, converged, num_modes = _other_starts(task, points, mode, value, converged, num_modes)
    precision = -density.hessian(points, mode)
    factor, log_det, positive = _covariance_factor(precision)
    return LaplaceFit(points, mode, factor, log_det, converged & positive, num_modes)


def _is_log_concave(task: Task) -> bool:
    # Affine predictors with Gaussian priors: log-concave whenever the likelihood is in its predictor.
    # The likelihoods torch has that are not (Student's t, Cauchy) are named.
    families = getattr(task.density, "families", None)
    heavy = {"StudentT", "Cauchy", "HalfCauchy"}
    return (
        families is not None
        and getattr(task.density, "quadratic", None) is not None
        and all(f.distribution.__name__ not in heavy and len(f.names) == 1 for f in families)
    )


def _other_starts(
    task: Task, points: Tensor, mode: Tensor, value: Tensor, converged: Tensor, num_modes: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Newton from two random starts at up to four points spread over the sweep."""
    count = len(points)
    chosen = torch.unique(torch.linspace(0, count - 1, min(count, 4)).round().long()).to(points.device)
    for attempt in range(2):
        start = torch.as_tensor(
            task.generator(102, attempt).uniform(-2.0, 2.0, (len(chosen), mode.shape[1])),
            dtype=mode.dtype,
            device=mode.device,
        )
        found, found_value, found_converged = _newton(task, points[chosen], start)
        apart = (found - mode[chosen]).abs().amax(-1) > 1e-3 * (1.0 + mode[chosen].abs().amax(-1))
        other = found_converged & converged[chosen] & apart
        num_modes[chosen] += other.long()
        better = found_converged & (~converged[chosen] | (found_value > value[chosen] + 1e-6))
        index = chosen[better]
        mode[index], value[index], converged[index] = found[better], found_value[better], True
    if bool((num_modes > 1).any()):
        num_modes = num_modes.clamp(min=2)  # one point with two modes: doubt all
    return mode, value, converged, num_modes


def _newton(task: Task, points: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Damped Newton ascent at all points at once; (mode, value, converged)."""
    density = task.density
    position = start.clone()
    value, grad = (x.squeeze(1) for x in density.value_and_grad(points, position.unsqueeze(1)))
    converged = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    damping = torch.zeros_like(value)
    stuck = torch.zeros_like(value)
    steps = _NEWTON_STEPS.to(position)
    active = torch.arange(len(points), device=points.device)
    for _ in range(MAX_ITERATIONS):
        precision = -density.hessian(points[active], position[active])
        step = _damped_solve(precision, grad[active], damping[active])
        decrement = (step * grad[active]).sum(-1)
        trial = position[active].unsqueeze(1) + steps.view(1, -1, 1) * step.unsqueeze(1)
        values = torch.nan_to_num(density.value(points[active], trial), nan=-torch.inf)
        best_value, best = values.max(1)
        improved = best_value >= value[active] - 1e-10 * (1.0 + value[active].abs())
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
        active = active[~done & (stuck[active] < 8)]
        if len(active) == 0:
            break
        new_value, new_grad = (
            x.squeeze(1) for x in density.value_and_grad(points[active], position[active].unsqueeze(1))
        )
        value[active], grad[active] = new_value, new_grad
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
        eigenvalues, vectors = torch.linalg.eigh(symmetric)
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


def run_laplace(
    task: Task, fit: LaplaceFit | None = None, *, max_pool: int = 16
) -> tuple[Draws, LaplaceFit]:
    """Draws at every point, certified where they can be trusted, and the Gaussian fit they came from.

    Pools of importance draws grow up to ``max_pool`` times what is stored.
    """
    begin = time.perf_counter()
    points = task.points
    task.progress({"stage": "laplace", "message": "finding modes"})
    fit = fit_laplace(task, points) if fit is None else fit
    wanted = task.num_chains * task.num_draws
    pool = _Pool(task, fit, wanted)
    pool.grow(points, wanted)
    needed = (
        1.0 / max(1.0 / task.target_ess - 1.0 / wanted, 1e-9) if wanted > task.target_ess else task.target_ess
    )
    limit = max_pool * wanted
    for _ in range(4):
        growing = ~pool.exact & (pool.khat < 0.8) & (pool.ess < needed) & (pool.size < limit)
        if not bool(growing.any()):
            break
        index = torch.nonzero(growing).squeeze(1)
        ratio = float((needed / pool.ess[index]).max())
        size = int(pool.size[index].min())
        pool.grow(index, min(limit - size, int(size * min(max(1.3 * ratio - 1.0, 0.5), 7.0))))
    draws = pool.draws(time.perf_counter() - begin, needed)
    task.progress(
        {"stage": "laplace", "strengths_done": sum(draws.certified), "certified": sum(draws.certified)}
    )
    return draws, fit


class _Pool:
    """Importance draws at every point; points may have pools of different size."""

    def __init__(self, task: Task, fit: LaplaceFit, wanted: int):
        self.task, self.fit, self.wanted = task, fit, wanted
        count = len(fit.points)
        self.position: list[Tensor] = [fit.mode.new_empty(0, fit.mode.shape[1])] * count
        self.value: list[Tensor] = [fit.mode.new_empty(0)] * count
        self.log_weight: list[Tensor] = [fit.mode.new_empty(0)] * count
        self.smoothed: list[Tensor] = [fit.mode.new_empty(0)] * count
        self.size = torch.zeros(count, dtype=torch.long, device=fit.mode.device)
        self.rounds = [0] * count
        self.exact = torch.zeros(count, dtype=torch.bool, device=fit.mode.device)
        self.khat = torch.full((count,), torch.inf, dtype=fit.mode.dtype, device=fit.mode.device)
        self.ess = torch.zeros_like(self.khat)

    def grow(self, index: Tensor, extra: int) -> None:
        """Add ``extra`` draws at the points in ``index`` and weigh their pools anew."""
        fit = self.fit.take(index)
        dim = fit.mode.shape[1]
        z = torch.stack([self.task.normals((extra, dim), 103, int(i), self.rounds[int(i)]) for i in index])
        position = fit.to_position(z)
        value = self.task.density.value(fit.points, position)
        log_weight = value - fit.whitened_log_density(z)
        log_weight = torch.where(torch.isfinite(log_weight), log_weight, -torch.inf)
        for j, i in enumerate(index.tolist()):
            self.rounds[i] += 1
            self.position[i] = torch.cat([self.position[i], position[j]])
            self.value[i] = torch.cat([self.value[i], value[j]])
            self.log_weight[i] = torch.cat([self.log_weight[i], log_weight[j]])
            self.size[i] = len(self.value[i])
        sizes = {len(self.value[i]) for i in index.tolist()}
        for size in sizes:
            same = [i for i in index.tolist() if len(self.value[i]) == size]
            self._weigh(torch.tensor(same, device=index.device))

    def _weigh(self, index: Tensor) -> None:
        log_weight = torch.stack([self.log_weight[int(i)] for i in index])
        value = torch.stack([self.value[int(i)] for i in index])
        spread = log_weight.amax(1) - log_weight.amin(1)
        rounding = 1e-10 * (1.0 + value.abs().amax(1))
        exact = (spread <= rounding) & self.fit.converged[index]
        usable = torch.isfinite(log_weight).any(1)
        safe = torch.where(usable.unsqueeze(1), log_weight, 0.0)
        smoothed, khat = psis(safe)
        self.exact[index] = exact
        self.khat[index] = torch.where(exact, -torch.inf, torch.where(usable, khat, torch.inf))
        self.khat[index] = torch.nan_to_num(
            self.khat[index], nan=torch.inf, posinf=torch.inf, neginf=-torch.inf
        )
        ess = torch.exp(-torch.logsumexp(2.0 * smoothed, 1))
        self.ess[index] = torch.where(exact, torch.full_like(ess, float(value.shape[1])), ess)
        for j, i in enumerate(index.tolist()):
            self.smoothed[i] = smoothed[j]

    def draws(self, seconds: float, needed: float) -> Draws:
        task, count = self.task, len(self.fit.points)
        shape = (task.num_chains, task.num_draws)
        positions, values, certified, reasons, evidence, errors, ess = [], [], [], [], [], [], []
        for i in range(count):
            exact = bool(self.exact[i])
            row = slice(0, self.wanted) if exact else self._resample(i)
            positions.append(self.position[i][row].reshape(*shape, -1))
            values.append(self.value[i][row].reshape(shape))
            log_weight = self.log_weight[i]
            mean = torch.logsumexp(log_weight, 0) - math.log(len(log_weight))
            relative = torch.exp(log_weight - mean)
            evidence.append(log_weight.mean() if exact else mean)
            errors.append(mean.new_zeros(()) if exact else relative.std() / math.sqrt(len(log_weight)))
            ess.append(self.ess[i].new_tensor(torch.inf) if exact else self.ess[i])
            ok, reason = self._verdict(i, exact, needed)
            certified.append(ok)
            reasons.append(reason)
        first = torch.stack([x[: self.wanted] for x in self.value])
        weight = torch.stack([x[: self.wanted] for x in self.log_weight])
        first, weight = (torch.where(torch.isfinite(weight), x, -1e300) for x in (first, weight))
        return Draws(
            points=self.fit.points,
            position=torch.stack(positions),
            log_density=torch.stack(values),
            engine=["laplace"] * count,
            certified=certified,
            reason=reasons,
            exact=[bool(e) for e in self.exact],
            khat=self.khat.clone(),
            ess_weights=torch.stack(ess),
            log_evidence=torch.stack(evidence),
            log_evidence_error=torch.stack(errors),
            seconds=torch.full((count,), seconds / count, dtype=torch.float64),
            pool={"lp": first, "laplace_log_density": first - weight},
        )

    def _resample(self, i: int) -> Tensor:
        """Systematic resampling of the smoothed weights (one uniform), then shuffled over the chains."""
        rng = self.task.generator(104, i)
        cumulative = torch.cumsum(torch.exp(self.smoothed[i]), 0)
        grid = (torch.arange(self.wanted, dtype=cumulative.dtype) + rng.uniform()) / self.wanted
        rows = torch.searchsorted(cumulative / cumulative[-1], grid.to(cumulative.device))
        order = torch.as_tensor(rng.permutation(self.wanted), device=rows.device)
        return rows.clamp(max=len(cumulative) - 1)[order]

    def _verdict(self, i: int, exact: bool, needed: float) -> tuple[bool, str]:
        size, khat, ess = int(self.size[i]), float(self.khat[i]), float(self.ess[i])
        if not bool(self.fit.converged[i]):
            return False, "no mode with positive curvature was found"
        if int(self.fit.num_modes[i]) > 1:
            return False, "more than one mode was found"
        if exact:
            return True, "the posterior is Gaussian to rounding: draws are exact"
        threshold = min(1.0 - 1.0 / math.log10(size), 0.7)
        if khat >= threshold:
            return False, f"khat {khat:.2f} of the importance weights is not below {threshold:.2f}"
        if ess < needed:
            return False, f"the importance weights' effective sample size {ess:.0f} is below {needed:.0f}"
        return True, f"importance weights have khat {khat:.2f} and effective sample size {ess:.0f}"
