"""SVI: a Gaussian guide at every point, all points as lanes of one optimiser, judged by khat.

Maximises ELBO = E_q[log p(u, y) - log q(u)] from the Laplace fit on, with path gradients (`_guides`). Three
things stand in for tuning. Steps are taken in coordinates where the guide is standard normal, by Adam with
its damping at one unit of them: small gradients give natural-gradient steps, large ones steps of bounded
length. An epoch runs at a constant rate and ends in the average of its later half (Polyak and Juditsky
1992); the rate halves when an epoch no longer raises the ELBO by more than its Monte Carlo error (as in
Welandawe, Andersen, Vehtari and Huggins 2022, A framework for improving the reliability of black-box
variational inference). A point stops when an epoch moved its guide by less than independent draws of the
size asked for could show, or by less than a hundredth of what the family itself misses.

Plates with ``subsample_size`` give steps on minibatches (`_minibatch`). What compares, judges or certifies
guides sees all rows.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from bayestie._affine import AffineDensity
from bayestie._engines._guides import Curvature, FullRank, Gradient, Guide, LowRank, MeanField
from bayestie._engines._importance import ImportancePool, needed_ess
from bayestie._engines._laplace_fit import LaplaceFit, fit_laplace
from bayestie._engines._minibatch import MinibatchScore, check_minibatches, describe_minibatches
from bayestie._engines._protocol import Draws, Interrupted, Task
from bayestie._errors import OptionError
from bayestie._workers import eigh

MAX_FULL_RANK, MAX_LOW_RANK = 200, 2000  # latents up to which a guide is the default
NUM_PARTICLES = 16  # draws per step, in antithetic pairs
NUM_JUDGES = 128  # draws that compare guides after an epoch, in antithetic pairs
MAX_STEPS = 3000
STAGE_STEPS = 200  # of a stage of a schedule: the next one goes on from wherever it is
FIRST_EPOCH, LONGEST_EPOCH = 40, 400
FIRST_RATE = 0.2
GAIN = 0.1  # nats that an epoch must win to keep its rate
MAX_DISTANCE = 0.02  # nats that a settled guide may still move in an epoch; weights would feel more
START_SCALE = 0.1  # of a guide that has no Laplace fit to start from
MAX_POOL = 4  # importance draws per point at most, in multiples of what is stored
STREAM = 301

Score = Callable[[Tensor], tuple[Tensor, Tensor]]  # positions (P, batch, D) -> log p and its gradient there


def run_svi(task: Task, fit: LaplaceFit | None = None) -> Draws:
    """Draws from a fitted Gaussian guide at every point.

    Certified where the importance weights of the guide have khat below 0.7 and enough effective sample
    size: draws are then resampled by the weights, so they follow the posterior. Elsewhere they are the
    guide's own, and ``reason`` says that they are not the posterior's. log_evidence comes from the weights.

    Options of the task: ``guide`` ("mean_field", "low_rank", "full_rank"; by default by size), ``rank``
    of the low-rank guide (default sqrt(num_latent)), ``num_particles`` per step, ``max_steps``.
    """
    begin = time.perf_counter()
    name = guide_name(task)
    check_minibatches(task)
    dim = task.density.num_latent
    # A net's curvature costs a pass per latent and Newton a hundred of them, for widths that mean field
    # learns by itself.
    dear = dim > MAX_FULL_RANK and not isinstance(task.density, AffineDensity)
    if fit is None and dim <= MAX_LOW_RANK and not (dear and name == "mean_field"):
        task.progress({"stage": "svi", "message": "finding modes"})
        fit = fit_laplace(task, task.points)
    optimiser = _Optimiser(
        task, start_guide(task, name, fit), None if name == "full_rank" else _curvature(fit)
    )
    try:
        optimiser.run()
    except KeyboardInterrupt as interrupt:
        done = torch.nonzero(optimiser.settled).squeeze(1)
        if not len(done):
            raise
        raise Interrupted(_draws(task, name, optimiser, fit, done, begin)) from interrupt
    return _draws(task, name, optimiser, fit, task.points, begin)


def settle_guide(task: Task, fit: LaplaceFit) -> Tensor:
    """Means (P, D) of the guides after at most `STAGE_STEPS` steps, for a stage of a strength schedule."""
    name = guide_name(task)
    check_minibatches(task)
    stage = replace(task, options={**task.options, "max_steps": STAGE_STEPS})
    curvature = None if name == "full_rank" else _curvature(fit)
    optimiser = _Optimiser(stage, start_guide(stage, name, fit), curvature)
    optimiser.run()
    return optimiser.guide.loc


def guide_name(task: Task) -> str:
    """The kind of guide asked for, or the default for the number of latents.

    Raises:
        OptionError: a guide that this engine does not have.
    """
    asked, dim = task.options.get("guide"), task.density.num_latent
    if asked is None:
        return "full_rank" if dim <= MAX_FULL_RANK else "low_rank" if dim <= MAX_LOW_RANK else "mean_field"
    if asked not in ("mean_field", "low_rank", "full_rank"):
        raise OptionError(
            "guide",
            found=repr(asked),
            expected="'mean_field', 'low_rank' or 'full_rank'",
            fix="For a guide of your own use engine='pyro_svi'.",
        )
    return asked


def _count(task: Task, name: str, default: int) -> int:
    value = task.options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(name, found=repr(value), expected="a whole number of at least 1", fix="Raise it.")
    return value


def _curvature(fit: LaplaceFit | None) -> Curvature | None:
    if fit is None:
        return None
    return Curvature(
        fit.mode, fit.factor, torch.cholesky_inverse(fit.factor), fit.converged & fit.mode.isfinite().all(1)
    )


def start_guide(task: Task, name: str, fit: LaplaceFit | None) -> Guide:
    """The Laplace fit put into the guide's family; a small ball at the origin where there is none."""
    points, dim = task.points, task.density.num_latent
    noise = task.normals((len(points), dim), STREAM, 0)
    eye = (
        torch.eye(dim).to(noise).expand(len(points), dim, dim)
        if fit is not None or name == "full_rank"
        else None
    )
    loc, scale = torch.zeros_like(noise), torch.full_like(noise, START_SCALE)
    curvature = _curvature(fit)
    if curvature is not None:
        known = curvature.known.unsqueeze(1)
        loc = torch.where(known, curvature.centre, loc)
    if name == "full_rank":
        assert eye is not None
        tril = START_SCALE * eye
        if curvature is not None:
            tril = torch.where(known.unsqueeze(2), curvature.factor, tril)
        return FullRank(loc, tril)
    if curvature is not None:
        # Of all Gaussians with independent latents this one is closest to the Laplace fit.
        precise = curvature.precision.diagonal(dim1=-2, dim2=-1).rsqrt()
        scale = torch.where(known, precise, scale)
    if name == "mean_field":
        return MeanField(loc, scale, curvature=curvature)
    rank = min(_count(task, "rank", max(1, round(dim**0.5))), dim)
    # A factor of exactly zero is a saddle point of the ELBO.
    factor = 0.01 * task.normals((len(points), dim, rank), STREAM, 1)
    if curvature is not None:
        scaled = scale.unsqueeze(2) * curvature.precision * scale.unsqueeze(1)
        scaled = torch.where(known.unsqueeze(2), scaled, torch.eye(dim).to(scaled))
        values, vectors = eigh(scaled)  # ascending: the widest directions first
        widths = (1.0 / values[:, :rank].clamp(min=1e-12) - 1.0).clamp(min=0.0).sqrt()
        factor = factor + vectors[:, :, :rank] * widths.unsqueeze(1)
    return LowRank(loc, scale, factor, curvature=curvature)


@dataclass
class _Judgement:
    """What an epoch did, per point (P,): the new ELBO and its error, gain and its error, distance moved."""

    elbo: Tensor
    elbo_error: Tensor
    gain: Tensor
    gain_error: Tensor
    distance: Tensor
    misfit: Tensor  # variance of log p - log q: twice the loss of the family, where that is small


class _Optimiser:
    """All points as lanes; a point that settles leaves the batch."""

    def __init__(self, task: Task, guide: Guide, curvature: Curvature | None):
        self.task, self.guide, self.curvature = task, guide, curvature
        count = len(task.points)
        self.settled = torch.zeros(count, dtype=torch.bool, device=guide.loc.device)
        self.steps = torch.zeros(count, dtype=torch.long, device=guide.loc.device)
        self.rate = guide.loc.new_full((count,), FIRST_RATE)
        self.elbo, self.elbo_error = (guide.loc.new_full((count,), -torch.inf) for _ in range(2))
        self.max_steps = _count(task, "max_steps", MAX_STEPS)
        self.pairs = max(1, _count(task, "num_particles", NUM_PARTICLES) // 2)
        # Every parameter off by half its Monte Carlo error in as many independent draws as will be stored.
        self.tolerance = min(guide.num_parameters / (4.0 * task.num_chains * task.num_draws), MAX_DISTANCE)

    def run(self) -> None:
        active = self.task.points
        length, taken, epoch = FIRST_EPOCH, 0, 0
        while len(active) and taken < self.max_steps:
            length = min(length, self.max_steps - taken)
            old = self.guide.take(active)
            new = self._epoch(active, old, length, epoch, taken)
            judged = self._judge(active, old, new, epoch)
            taken, epoch = taken + length, epoch + 1
            self.steps[active] = taken
            active = self._accept(active, new, judged)
            self.task.progress(
                {
                    "stage": "svi",
                    "strengths_done": int(self.settled.sum()),
                    "strengths_total": self.task.num_points,
                    "message": f"{taken} steps, ELBO {float(self.elbo.min()):.6g} or better",
                }
            )
            length = min(length * 3 // 2, LONGEST_EPOCH)

    def _accept(self, active: Tensor, new: Guide, judged: _Judgement) -> Tensor:
        """Take the new guides where they are no worse; the points that go on."""
        tolerance = torch.clamp(judged.misfit / 200.0, min=self.tolerance)
        gaining = judged.gain > (2.0 * judged.gain_error).clamp(min=GAIN)
        worse = ~(judged.gain >= -3.0 * judged.gain_error - tolerance)
        better = torch.nonzero(~worse).squeeze(1)
        kept = active[better]
        self.guide = self.guide.put(kept, new.take(better))
        self.elbo[kept], self.elbo_error[kept] = judged.elbo[better], judged.elbo_error[better]
        self.rate[active] = torch.where(gaining, self.rate[active], 0.5 * self.rate[active])
        settled = ~worse & ~gaining & (judged.distance <= tolerance)
        self.settled[active[settled]] = True
        return active[~settled]

    def _epoch(self, active: Tensor, guide: Guide, length: int, epoch: int, taken: int) -> Guide:
        """``length`` Adam steps at a constant rate per point; the average of the later half."""
        noise = self._noise(active, length * self.pairs, 2 + 2 * epoch)
        noise = noise.reshape(len(active), length, self.pairs, -1)
        curvature = None if self.curvature is None else self.curvature.take(active)
        score: Score = partial(self.task.density.value_and_grad, active)
        if self.task.program.minibatches:
            score = MinibatchScore(self.task, active, guide.loc, taken)
        estimate = _ElboGradient(score, active, curvature)
        adam = _Adam(self.rate[active])
        average = guide
        for t in range(length):
            antithetic = torch.cat([noise[:, t], -noise[:, t]], 1)
            guide = guide.step(adam.step(estimate(guide, antithetic)))
            if t >= length // 2:
                average = average.blend(guide, 1.0 / (t - length // 2 + 1))
        return average

    def _judge(self, active: Tensor, old: Guide, new: Guide, epoch: int) -> _Judgement:
        """Both guides on the same noise."""
        noise = self._noise(active, NUM_JUDGES // 2, 3 + 2 * epoch)
        noise = torch.cat([noise, -noise], 1)
        position, log_new = new.propose(noise)
        before, log_before = old.propose(noise)
        values = self.task.density.value(active, torch.cat([position, before], 1))
        gap_new, gap_old = (
            torch.where((value - log_q).isfinite(), value - log_q, -torch.inf)
            for value, log_q in zip(values.split(noise.shape[1], 1), (log_new, log_before), strict=True)
        )
        elbo, elbo_error = _mean_of_pairs(gap_new)
        known, known_before = gap_new.isfinite(), gap_old.isfinite()
        gain, gain_error = _mean_of_pairs(torch.where(known & known_before, gap_new - gap_old, 0.0))
        # Fewer draws where the model has no density come before any gain elsewhere.
        fewer = (known.sum(1) - known_before.sum(1)).sign()
        gain = torch.where(fewer == 0, gain, fewer * torch.inf)
        # Half the variance of the log ratio of close guides is their KL divergence, to second order,
        # and unlike its mean is found to a fixed relative error.
        distance = 0.5 * (log_new - old.log_density(position)).var(1)
        misfit = torch.where(known.all(1), gap_new.var(1), 0.0)
        return _Judgement(elbo, elbo_error, gain, gain_error, distance, misfit)

    def _noise(self, active: Tensor, num: int, key: int) -> Tensor:
        shape = (num, self.guide.num_noise)
        return torch.stack([self.task.normals(shape, STREAM, key, int(p)) for p in active])


def _mean_of_pairs(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and its standard error of (P, 2 n) antithetic values, the second half mirroring the first."""
    first, second = values.chunk(2, 1)
    pairs = 0.5 * (first + second)
    error = torch.nan_to_num(pairs.std(1) / pairs.shape[1] ** 0.5, nan=torch.inf)
    return pairs.mean(1), error


class _ElboGradient:
    """Path gradient with the Laplace quadratic as control variate.

    A guide that cannot be the posterior keeps gradient noise at its optimum; most of it is the quadratic
    part of log p, whose expectation is known. Its coefficient is learned per point from earlier steps.
    """

    def __init__(self, score: Score, points: Tensor, curvature: Curvature | None):
        self.score, self.curvature = score, curvature
        self.known = curvature.known if curvature is not None else torch.zeros_like(points, dtype=torch.bool)
        self.use = curvature is not None and bool(self.known.any())
        self.cross: Tensor | None = None

    def __call__(self, guide: Guide, noise: Tensor) -> Gradient:
        position = guide.position(noise)
        value, score = self.score(position)
        broken = ~(value.isfinite() & score.isfinite().all(-1)).unsqueeze(-1)
        if bool(broken.any()):
            # A draw where the model has no density pulls the guide inwards.
            score = torch.where(broken, -2.0 * guide.path_term(noise), score)
        one = torch.ones_like(guide.loc[:, 0])
        if not self.use or self.curvature is None or not isinstance(guide, MeanField | LowRank):
            return guide.gradient(score, noise, one)
        quadratic = self.curvature.score(position)
        share = self._share(guide, score, quadratic, noise)
        lanes = share.view(-1, 1, 1)
        rest = guide.gradient(score - lanes * torch.where(lanes > 0, quadratic, 0.0), noise, one - share)
        exact = guide.quadratic_gradient(self.curvature)
        return tuple(
            torch.where(_lanes(self.known, r), r + _lanes(share, r) * e, r)
            for r, e in zip(rest, exact, strict=True)
        )

    def _share(self, guide: MeanField | LowRank, score: Tensor, quadratic: Tensor, noise: Tensor) -> Tensor:
        """Coefficient from the steps before this one, so that the estimate stays unbiased."""
        path = guide.path_term(noise)
        own, control = (guide.scale.unsqueeze(1) * (x + path) for x in (score, quadratic))
        moments = torch.stack([(own * control).sum((1, 2)), control.square().sum((1, 2))])
        before = self.cross
        self.cross = moments if before is None else 0.9 * before + 0.1 * moments
        if before is None:
            return self.known.to(noise)
        ratio = torch.where(before[1] > 1e-12, before[0] / before[1].clamp(min=1e-12), 1.0)
        return torch.where(self.known, ratio.nan_to_num(nan=0.0).clamp(0.0, 1.0), 0.0)


class _Adam:
    """Adam (Kingma and Ba 2015) on every lane, damped at one unit of the guide's own coordinates."""

    def __init__(self, rate: Tensor):
        self.rate, self.count = rate, 0
        self.first: list[Tensor] = []
        self.second: list[Tensor] = []

    def step(self, gradient: Gradient) -> Gradient:
        if not self.count:
            self.first = [torch.zeros_like(g) for g in gradient]
            self.second = [torch.zeros_like(g) for g in gradient]
        self.count += 1
        steps = []
        for g, first, second in zip(gradient, self.first, self.second, strict=True):
            first.lerp_(g, 0.1)
            second.lerp_(g.square(), 0.05)
            size = 1.0 + (second / (1.0 - 0.95**self.count)).sqrt()
            steps.append(_lanes(self.rate, g) * first / (1.0 - 0.9**self.count) / size)
        return tuple(steps)


def _lanes(x: Tensor, like: Tensor) -> Tensor:
    """A value per point (P,) shaped to broadcast over (P, ...)."""
    return x.reshape(-1, *[1] * (like.dim() - 1))


def _draws(
    task: Task, name: str, optimiser: _Optimiser, fit: LaplaceFit | None, points: Tensor, begin: float
) -> Draws:
    doubts, notes = [], []
    for p in points.tolist():
        elbo, error = float(optimiser.elbo[p]), float(optimiser.elbo_error[p])
        several = fit is not None and int(fit.num_modes[p]) > 1
        if not bool(optimiser.elbo[p].isfinite()):
            doubts.append("the model has no finite density at some of the guide's draws")
        else:
            doubts.append("more than one mode was found, and the guide covers one" if several else None)
        state = "settled after" if bool(optimiser.settled[p]) else "still moving after"
        notes.append(
            f"{name} guide {state} {int(optimiser.steps[p])} steps, ELBO {elbo:.6g} (error {error:.2g})"
            + describe_minibatches(task.program)
        )
    needed = needed_ess(task)
    pool = ImportancePool(task, points, doubts, stream=STREAM + 1)
    pool.fill(optimiser.guide.take(points), needed, MAX_POOL)
    draws = pool.draws("svi", 0.0, needed, always_resample=False)
    for i, note in enumerate(notes):
        own = "" if draws.certified[i] else "; the draws are the guide's, not the posterior's"
        draws.reason[i] = f"{draws.reason[i]}; {note}{own}"
    draws.seconds[:] = (time.perf_counter() - begin) / len(points)
    task.progress({"stage": "svi", "strengths_done": len(points), "certified": sum(draws.certified)})
    return draws
