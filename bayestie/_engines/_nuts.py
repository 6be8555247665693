"""NUTS at every point: warmup, then rounds of many short chains until R-hat and ESS are met."""

import copy
import math
import threading
import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bayestie._engines._axis_map import axis_map
from bayestie._engines._centring import Centring, centring, learned_strengths
from bayestie._engines._lanes import MAX_DEPTH, STATISTICS, Coordinates, Lanes, Round, StepSize
from bayestie._engines._laplace_fit import LaplaceFit, fit_laplace
from bayestie._engines._noise_coordinates import NoiseCoordinates, noise_coordinates
from bayestie._engines._plain_coordinates import (
    PlainCoordinates,
    has_no_use_for_a_mode,
    is_many,
    plain_coordinates,
)
from bayestie._engines._protocol import Draws, Interrupted, Task
from bayestie._engines._quality import (
    MAX_RHAT,
    Quality,
    chain_verdict,
    draws_for_rhat,
    is_good,
    qualities,
)
from bayestie._workers import run_all, solve

# Trajectories pooled over a point's chains, for its step size; every chain gives 6 to 12.
STEP_TRAJECTORIES = 96
METRIC_DRAWS = 240  # pooled over a point's chains, for its metric; every chain gives at least 16
SHORTEST = 40  # draws of a short chain in a round, at least
EFFICIENCY = 0.5  # effective draws of one draw that rounds plan on: folded ranks of the worst quantity
BETTER = 0.8  # of the Fisher divergence of Laplace's axes: that of the latents is to be below
OTHERWISE = 0.15  # another power of a strength than copies are centred by
PROBE = 16  # draws that tell whether the Gaussian at the mode reaches too far
FAR = 10.0  # times the median: the length of an axis that is looked into
FALLEN = 0.6  # a Gaussian's log density falls by a half in one
LONGER = (1.0, 1.2, 1.5, 1.9)  # times the tuned step: what is tried
GAIN = 1.1  # of the tuned step's movement: what a longer one is to exceed
LEAST_ACCEPTED = 0.65  # of a longer step
HALVINGS = 2  # of the step where trajectories diverge
APART = 1.5  # R-hat of chains that do not meet
LANES = {"cpu": 256, "cuda": 8192}  # lanes that pay for the fixed cost of a tick
SETTLING = 32  # lanes that look for where the mass is
WINDOWS = ((10, 4), (16, 5))  # draws of theirs, for the scales of the latents, and the deepest trees
APART_AFTER = 6  # draws, after which lanes that begin at one point are apart, and their step is known
MAX_TOTAL = 22  # times what is stored, at most
_JUDGED = 5_000_000  # numbers judged together


def run_nuts(task: Task, points: Tensor | None = None, fit: LaplaceFit | None = None) -> Draws:
    """Draws at ``points`` (all by default): warmup, then rounds until R-hat and ESS are met.

    Points that mix but diverge are drawn from again with half the step, as long as that helps.
    """
    points = task.points if points is None else points
    if fit is None and has_no_use_for_a_mode(task):
        sampler = _Sampler(task, plain_coordinates(task, points))
        sampler.settle()
    else:
        fit = fit_laplace(task, points) if fit is None else fit
        sampler = _Sampler(task, _coordinates(task, fit))
        sampler.warm_up()
    draws, rows = sampler.sample(), list(range(len(points)))
    for halving in range(1, HALVINGS + 1):
        rows = [i for i in rows if not draws.certified[i] and _is_mixed(draws, i, task.target_ess)]
        if not rows:
            break
        before = draws.divergences[rows].tolist()
        try:
            draws.replace(sampler.again(rows, 0.5**halving).sample())
        except Interrupted as interrupted:
            draws.replace(interrupted.draws)
            raise Interrupted(draws) from interrupted
        rows = [i for i, count in zip(rows, before, strict=True) if draws.divergences[i] < 0.5 * count]
    return draws


def _is_mixed(draws: Draws, i: int, target_ess: float) -> bool:
    rhat, bulk, tail = draws.quality[i].tolist()
    return is_good(Quality(rhat, bulk, tail, float(draws.nested_rhat[i])), target_ess)


def _coordinates(task: Task, fit: LaplaceFit) -> Coordinates | NoiseCoordinates:
    found = noise_coordinates(task, fit)
    if found is not None:
        return found
    fit = believable(task, grounded(task, fit))
    # The density's own axes suit a diagonal metric, and maps along them, better than any others.
    oriented = replace(fit, factor=task.density.axes(fit.points, fit.factor))
    several = bool((fit.num_modes > 1).any())  # maps are laid along the axes of one mode
    map, rows = None if several else axis_map(task, oriented), None
    if fit.mode.device.type == "cpu":
        from bayestie._engines._native_affine import sparse_rows  # the compiler takes long to import

        rows = sparse_rows(task.density)
        rows = None if rows is None else rows.take(fit.points)
    return Coordinates(task, oriented, torch.ones_like(fit.mode), map, rows)


def grounded(task: Task, fit: LaplaceFit) -> LaplaceFit:
    """The fit; where no mode was found, the standard normal at the origin if that is nearer the posterior.

    The joint density of a hierarchical model need have no mode: it grows without bound where residuals, or
    deviations with their scale, can vanish, however little mass there is, and Newton's method climbs that
    spike until its lengths are a millionth of the posterior's. Nearer is: of greater ELBO.
    """
    rows = torch.nonzero(~fit.converged).squeeze(1)
    if not len(rows):
        return fit
    some, dim = fit.take(rows), fit.mode.shape[1]
    noise = torch.stack([task.normals((PROBE, dim), 205, int(point)) for point in some.points])
    at_origin, at_mode = (
        task.density.value(some.points, at).nan_to_num(nan=-torch.inf).median(1).values
        for at in (noise, some.to_position(noise))
    )
    rows = rows[~(at_mode + some.log_det >= at_origin)]
    mode, factor, log_det = fit.mode.clone(), fit.factor.clone(), fit.log_det.clone()
    mode[rows], factor[rows], log_det[rows] = 0.0, torch.eye(dim).to(factor), 0.0
    return replace(fit, mode=mode, factor=factor, log_det=log_det)


def believable(task: Task, fit: LaplaceFit) -> LaplaceFit:
    """The fit, its axes no longer than the density is wide along them.

    Where a mode is a ridge that bends (weights of a net that may be rotated into one another), the curvature
    along it is rounding, and the Gaussian reaches a million times too far. Such an axis gets the length after
    which the density has fallen as a Gaussian does after one standard deviation.
    """
    dim = fit.mode.shape[1]
    noise = torch.stack([task.normals((PROBE, dim), 204, int(point)) for point in fit.points])
    top = task.density.value(fit.points, fit.mode.unsqueeze(1))
    fall = torch.nan_to_num(top - task.density.value(fit.points, fit.to_position(noise)), nan=torch.inf)
    rows = torch.nonzero((fall > 10.0 * (1.0 + noise.square().sum(-1))).sum(1) > PROBE / 2).squeeze(1)
    if not len(rows):
        return fit
    some = fit.take(rows)
    vectors, lengths, _ = torch.linalg.svd(some.factor)
    halved = lengths.unsqueeze(-1) * 2.0 ** -torch.arange(40, dtype=lengths.dtype, device=lengths.device)
    top = top[rows]
    for j in torch.nonzero((lengths > FAR * lengths.median(1, keepdim=True).values).any(0)).squeeze(1):
        step = halved[:, j].unsqueeze(-1) * vectors[:, :, j].unsqueeze(1)
        at = some.mode.unsqueeze(1) + torch.cat([step, -step], 1)
        fall = (top - task.density.value(some.points, at)).unflatten(1, (2, -1)).amax(1)
        inside = torch.nan_to_num(fall, nan=torch.inf) <= FALLEN
        first = torch.where(inside.any(1), inside.long().argmax(1), halved.shape[-1] - 1)
        lengths[:, j] = halved[:, j].gather(1, first.unsqueeze(1)).squeeze(1)
    factor, info = torch.linalg.cholesky_ex((vectors * lengths.square().unsqueeze(1)) @ vectors.mT)
    good = info == 0
    shorter, log_det = fit.factor.clone(), fit.log_det.clone()
    shorter[rows[good]], log_det[rows[good]] = factor[good], lengths[good].log().sum(1)
    return replace(fit, factor=shorter, log_det=log_det)


def fisher_divergence(x: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """How far a density is from normal with independent coordinates, (P,), and the scales of that (P, D).

    The mean over draws x (P, n, D) of |(x - mean) / s + s grad|^2 / D, grad the slope of the log density, at
    the scale s that makes it least. Of a normal, the mean of 2 (Sigma_jj (Sigma^-1)_jj)^1/2 - 2. Seyboldt,
    Carlson and Carpenter (2026), Preconditioning Hamiltonian Monte Carlo by Minimizing Fisher Divergence.
    """
    x = x - x.mean(1, keepdim=True)
    scale = (x.std(1) / slope.std(1)).sqrt()
    gap = x / scale.unsqueeze(1) + slope * scale.unsqueeze(1)
    return torch.nan_to_num(gap.square().mean((1, 2)), nan=torch.inf), scale


def _movement(found: Round) -> Tensor:
    """How far a draw moves for a leapfrog, (P,): the less of 1 - autocorrelation of the coordinates and of
    their squares, in the mean over coordinates."""
    moved = []
    for x in (found.z, found.z.square()):
        spread = 2.0 * x.flatten(1, 2).var(1)
        jump = x.diff(dim=2).square().mean((1, 2))
        moved.append((jump / spread.clamp(min=1e-300)).mean(1))
    return torch.minimum(*moved) / found.stats["n_steps"].mean((1, 2))


class Stopped(Exception):
    """Another share of the lanes failed or was interrupted."""


class _Sampler:
    """Warmup and rounds at all points.

    Every stored chain is made of short chains that begin at one overdispersed point, so that many lanes share
    the fixed cost of a tick: Margossian et al. (2024), Nested R-hat, Bayesian Analysis. Joined end to end,
    their R-hat compares groups of different starts (nested R-hat is judged beside it), and their
    autocorrelations carry the taper (1 - t / n) of independent pieces of length n.
    """

    def __init__(self, task: Task, at: Coordinates | NoiseCoordinates | PlainCoordinates):
        points, dim = at.points, task.density.num_latent
        self.task, self.points, self.at = task, points, at
        self.begin = time.perf_counter()
        self.pieces = self._num_pieces(len(points))
        self.num_chains = task.num_chains * self.pieces
        # Overdispersed starts: R-hat sees nothing if all chains begin at one point.
        starts = [task.normals((dim,), 202, int(p), c) for p in points for c in range(task.num_chains)]
        self.z = 1.3 * torch.stack(starts).repeat_interleave(self.pieces, 0)
        self.z = self.z.reshape(len(points), self.num_chains, dim)
        # Where there are two modes, half of the stored chains begin at the other: one that stays alone at a
        # mode would know nothing of the other's mass.
        chains = torch.arange(self.num_chains, device=self.z.device)
        several = not isinstance(at, PlainCoordinates) and bool((at.fit.num_modes > 1).any())
        self.group = chains // self.pieces % 2 * int(several)
        if several and isinstance(at, Coordinates):
            away = solve(at.fit.factor, (at.fit.other_mode - at.fit.mode).unsqueeze(-1)).mT
            self.z += away * self.group.unsqueeze(1)
        self.step = StepSize(torch.full((len(points),), 0.8 / dim**0.25).to(self.z))
        self.useful = self.executed = 0
        self.stream = 0

    def _num_pieces(self, num_points: int) -> int:
        """Short chains per stored chain."""
        lanes = LANES.get(self.task.program.device.type, LANES["cpu"])
        wanted = lanes // (num_points * self.task.num_chains)
        return max(1, min(wanted, self.task.num_draws // SHORTEST))

    def _run(
        self, num_draws: int, adapt: bool, max_depth: int = MAX_DEPTH, longer: Tensor | None = None
    ) -> Round:
        """``num_draws`` trajectories in every chain of the points still going, a thread to every share.

        ``longer`` (C,) are times the steps of a point that its chains take.
        """
        self.stream += 1
        density, count = self.task.density, len(self.points)
        shares = min(count, torch.get_num_threads()) if density.is_threadable else 1
        done, stop = [0] * shares, threading.Event()

        def share(number: int, rows: Tensor) -> tuple[Round, Lanes]:
            def report(finished: int) -> None:
                done[number] = finished
                if stop.is_set():
                    raise Stopped
                total = count * self.num_chains * num_draws
                stage = "nuts warmup" if adapt else "nuts"
                self.task.progress({"stage": stage, "draws_done": sum(done), "draws_total": total})

            lanes = Lanes(self.at.take(rows), self.z[rows], rows, self.stream, report, longer)
            return lanes.run(num_draws, self.step, adapt, max_depth), lanes

        rows = torch.arange(count, device=self.points.device)
        # Neighbours in strength want trees of a kind: dealt out in turn, shares end together.
        parts = [rows[i::shares] for i in range(shares)]
        with self.task.program.quiet():
            found = run_all([partial(share, i, part) for i, part in enumerate(parts)], on_error=stop.set)
        order = torch.argsort(torch.cat(parts))
        for _, lanes in found:
            self.useful += lanes.useful
            self.executed += lanes.leapfrogs
        self.z = torch.cat([lanes.z.reshape(-1, *self.z.shape[1:]) for _, lanes in found])[order]
        stats = {n: torch.cat([r.stats[n] for r, _ in found])[order] for n in STATISTICS}
        return Round(torch.cat([r.z for r, _ in found])[order], stats)

    def warm_up(self) -> None:
        """Step size on the Laplace metric, then a diagonal correction of it pooled over chains."""
        short = min(12, max(6, STEP_TRAJECTORIES // self.num_chains))
        # The first steps may be far too small; shallow trees keep them cheap.
        result = self._run(short, adapt=True, max_depth=5)
        if self._centre(result.z[:, :, short // 3 :]):
            result = self._run(short, adapt=True, max_depth=7)
        self._choose_metric(result.z[:, :, short // 3 :])
        window = max(16, METRIC_DRAWS // self.num_chains)
        known = not isinstance(self.at, PlainCoordinates) and bool(self.at.fit.converged.all())
        for factor in (1,) if known else (1, 2):
            self.step.restart(self.num_chains)
            result = self._run(factor * window, adapt=True, max_depth=7)
            later = result.z[:, :, factor * window // 4 :]
            if not self._recentre(later) and not self._choose_metric(later):
                self._learn_scale(later)
        self.step.restart(self.num_chains)
        self._run(short, adapt=True)
        self.step.finish()
        if self.num_chains >= len(LONGER):
            self._choose_step(2 * short)

    def settle(self) -> None:
        """Warmup where no mode is known: few lanes from afar, and all lanes on from where these end.

        Windows of draws for the scales of the latents, each with the step that suits the last.
        """
        pieces = self.pieces
        self._split(min(pieces, math.ceil(SETTLING / (len(self.points) * self.task.num_chains))))
        for num_draws, max_depth in WINDOWS:
            result = self._run(num_draws, adapt=True, max_depth=max_depth)
            self._learn_scale(result.z[:, :, num_draws // 3 :])
            self.step.restart(self.num_chains)
        self._split(pieces)
        self._run(APART_AFTER, adapt=True)
        self.step.finish()
        if self.num_chains >= len(LONGER):
            self._choose_step(APART_AFTER)

    def _split(self, pieces: int) -> None:
        """Have so many short chains to every stored one, begun where those before stand."""
        begin = self.z.unflatten(1, (self.task.num_chains, self.pieces))
        self.z = begin[:, :, torch.arange(pieces, device=begin.device) % self.pieces].flatten(1, 2)
        self.group = self.group.unflatten(0, (-1, self.pieces))[:, :1].expand(-1, pieces).flatten()
        self.pieces, self.num_chains = pieces, self.task.num_chains * pieces

    def _choose_step(self, num_draws: int) -> None:
        """The tuned step, or one of `LONGER` where draws move further for a leapfrog.

        Trees double: the step of the acceptance asked for may take twice the leapfrogs of one that is hardly
        longer, which ends its trees a doubling sooner.
        """
        which = torch.arange(self.num_chains, device=self.points.device) % len(LONGER)
        longer = torch.tensor(LONGER).to(self.z)
        result = self._run(num_draws, adapt=False, longer=longer[which])
        gains = []
        for i in range(len(LONGER)):
            chains = which == i
            trial = Round(result.z[:, chains], {n: x[:, chains] for n, x in result.stats.items()})
            accepted = trial.stats["acceptance_rate"].mean((1, 2)) >= LEAST_ACCEPTED
            sound = accepted & ~(trial.stats["diverging"] > 0).any(2).any(1)
            gains.append(torch.where(sound, _movement(trial), 0.0))
        gains[0] *= GAIN
        self.step.log_step = self.step.log_step + longer.log()[torch.stack(gains).argmax(0)]

    def _centre(self, z: Tensor) -> bool:
        """Copies that data know in coordinates that their learned strength does not pull at; whether any."""
        at = self.at
        if not isinstance(at, Coordinates) or at.map is not None or at.rows is not None:
            return False  # maps, and compiled ticks, are of the latents themselves
        if bool(self.group.any()):
            return False
        found = self._known(at.to_position(z.flatten(1, 2)))
        if found is None:
            return False
        last = found.from_latent(at.to_position(self.z))
        mode, factor = found.straightened(at.fit.mode, at.fit.factor * at.scale.unsqueeze(1))
        fit = replace(at.fit, mode=mode, factor=factor)
        self.at = replace(at, fit=fit, scale=torch.ones_like(at.scale), centring=found)
        away = (last - mode.unsqueeze(1)).mT
        self.z = solve(factor, away).mT.contiguous()
        self.step.restart(self.num_chains)
        return True

    def _known(self, u: Tensor) -> Centring | None:
        """Centring by what data know of copies where their strength is small for draws u (P, n, D).

        Constant powers of a strength suit where data know alike: the smaller the strength, the less they
        know, and copies centred by more than that are a funnel, whose neck no step suits.
        """
        strengths = learned_strengths(self.task.program)
        if strengths is None:
            return None
        low, middle = u.quantile(0.1, dim=1), u.median(1).values
        leads = torch.zeros_like(low[0]).index_fill_(0, strengths.by[strengths.rate != 0], 1.0)
        position = torch.where(leads > 0, low, middle)
        precision = -self.task.density.hessian(self.points, position).diagonal(dim1=1, dim2=2)
        return centring(strengths, position, precision)

    def _recentre(self, z: Tensor) -> bool:
        """Centred copies by less, or by more, where the draws since say so; whether any."""
        at, before = self.at, getattr(self.at, "centring", None)
        if not isinstance(at, Coordinates) or before is None:
            return False
        u, last = at.to_position(z.flatten(1, 2)), at.to_position(self.z)
        found = self._known(u)
        found = replace(before, power=torch.zeros_like(before.power)) if found is None else found
        if float((found.power - before.power).abs().max()) < OTHERWISE:
            return False
        value, grad = self.task.density.value_and_grad(self.points, u)
        c = found.from_latent(u)
        _, scale = fisher_divergence(c, found.pull_back(c, value, grad)[1])
        scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)
        fit = replace(at.fit, mode=c.mean(1), factor=torch.diag_embed(scale), log_det=scale.log().sum(1))
        self.at = replace(at, fit=fit, scale=torch.ones_like(at.scale), centring=found)
        self.z = (found.from_latent(last) - fit.mode.unsqueeze(1)) / scale.unsqueeze(1)
        self.step.restart(self.num_chains)
        return True

    def _choose_metric(self, z: Tensor) -> bool:
        """Take latents by themselves, each in its own scale, where Laplace's axes suit the draws less.

        The mode of a hierarchical model with unknown strengths may be far from where its mass is, and what it
        says of correlations misleads there. Whether any point was changed.
        """
        if not isinstance(self.at, Coordinates) or self.at.map is not None:
            return False
        at, draws = self.at, z.flatten(1, 2)
        position = at.straight(draws)
        _, _, slope = at.evaluate_straight(position)
        _, _, own_slope = at.evaluate(draws)
        ours, _ = fisher_divergence(self._about_modes(draws), own_slope)
        plain, scale = fisher_divergence(self._about_modes(position), slope)
        chosen = plain < BETTER * ours
        if not bool(chosen.any()):
            return False
        mean = torch.where(chosen.unsqueeze(1), position.mean(1), at.fit.mode)
        factor = torch.where(chosen.view(-1, 1, 1), torch.diag_embed(scale), at.fit.factor)
        log_det = torch.where(chosen, scale.log().sum(1), at.fit.log_det)
        fit = replace(at.fit, mode=mean, factor=factor, log_det=log_det)
        self.at = replace(at, fit=fit, scale=torch.where(chosen.unsqueeze(1), 1.0, at.scale))
        last = at.straight(self.z)
        moved = (last - mean.unsqueeze(1)) / scale.unsqueeze(1)
        self.z = torch.where(chosen.view(-1, 1, 1), moved, self.z)
        restarted = math.log(0.8) - 0.25 * math.log(z.shape[-1])
        self.step.log_step = torch.where(chosen, restarted, self.step.log_step)
        return True

    def _about_modes(self, draws: Tensor) -> Tensor:
        """Draws (P, C n, D) about the mean of those that began at the same mode."""
        chains = draws.unflatten(1, (self.num_chains, -1))
        centred = chains.clone()
        for group in (0, 1):
            of_group = self.group == group
            if bool(of_group.any()):
                centred[:, of_group] -= chains[:, of_group].mean((1, 2), keepdim=True)
        return centred.flatten(1, 2)

    def _learn_scale(self, z: Tensor) -> None:
        draws = z.flatten(1, 2)
        count = draws.shape[1]
        _, scale = fisher_divergence(self._about_modes(draws), self.at.evaluate(draws)[2])
        scale = torch.where(torch.isfinite(scale), scale, 1.0)
        # Shrunk towards the Laplace scale as Stan shrinks its variances towards a constant.
        ratio = ((count * scale.square() + 10.0) / (count + 10.0)).sqrt()
        self.at = replace(self.at, scale=self.at.scale * ratio)
        self.z = self.z / ratio.unsqueeze(1)

    def sample(self) -> Draws:
        """Rounds until every quantity of a point is good; points that are good drop out.

        The first round makes what R-hat should need, a later one what half of the points left seem to
        need, a quarter to all of what there is by then. If a point is still not good, its oldest
        draws may be from before it settled: the newer half is judged alone.
        """
        count = len(self.points)
        self.begun = (self.points, self.at, self.z, self.step.log_step)
        self.kept: list[list[tuple[Tensor, dict[str, Tensor]]]] = [[] for _ in range(count)]
        self.quality = [Quality(math.inf, 0.0, 0.0)] * count
        self.all_points = self.points
        active = torch.arange(count, device=self.points.device)
        stored = math.ceil(self.task.num_draws / self.pieces)
        made, size = 0, max(stored, math.ceil(self._planned() / self.pieces))
        try:
            while True:
                bad = self._round(active, size)
                made += size
                if not len(bad) or made >= MAX_TOTAL * stored:
                    break
                active = active[bad]
                self._keep_only(bad)
                size = max(1, math.ceil(made * self._missing(active)))
        except KeyboardInterrupt as interrupt:
            good = [i for i in range(count) if is_good(self.quality[i], self.task.target_ess)]
            raise Interrupted(self._draws(good)) from interrupt
        return self._draws(list(range(count)))

    def again(self, rows: list[int], factor: float) -> "_Sampler":
        """The sampler before it drew, of some of its points, with ``factor`` times their steps."""
        other, index = copy.copy(self), torch.tensor(rows, device=self.z.device)
        points, at, z, log_step = self.begun
        other.points, other.at, other.z = points[index], at.take(index), z[index]
        other.step, other.begin = StepSize(log_step[index].exp() * factor), time.perf_counter()
        return other

    def _planned(self) -> float:
        """Draws per stored chain that R-hat of all quantities should need."""
        draw = self.at.to_position(self.z[:, :1]).unsqueeze(1)
        if self.task.quantities is not None:
            draw = self.task.quantities(self.points, draw)
        # Where a draw is dear, rather look once too often than draw for nothing.
        efficiency = 1.0 if isinstance(self.at, PlainCoordinates) else EFFICIENCY
        return draws_for_rhat(draw.shape[-1], self.task.num_chains) / efficiency

    def _missing(self, active: Tensor) -> float:
        """How much more half of these points need, as a share of what they have: errors fall as 1 / n."""
        needed = []
        for i in active.tolist():
            rhat, bulk, tail, nested = self.quality[i]
            spread = (max(rhat, nested) ** 2 - 1.0) / (MAX_RHAT**2 - 1.0)
            needed.append(max(spread, self.task.target_ess / max(1.0, min(bulk, tail))))
        return min(1.0, max(0.25, float(np.median(needed)) - 1.0))

    def _round(self, active: Tensor, num_draws: int) -> Tensor:
        """One round at the active points; the rows of those that need more."""
        result = self._run(num_draws, adapt=False)
        position = self.at.to_position(result.z.flatten(1, 2)).reshape(result.z.shape)
        for row, i in enumerate(active.tolist()):
            self.kept[i].append((position[row], {name: x[row] for name, x in result.stats.items()}))
        self._judge(active)
        good = [is_good(self.quality[i], self.task.target_ess) for i in active.tolist()]
        still = [row for row, ok in enumerate(good) if not ok and not self._apart(active.tolist()[row])]
        count = len(self.all_points)
        self.task.progress(
            {
                "stage": "nuts",
                "strengths_done": self.task.num_points - len(still),
                "strengths_total": self.task.num_points,
                "min_ess": min(min(q.bulk, q.tail) for q in self.quality),
                "message": f"{count - len(still)} of {count} strengths mixed",
            }
        )
        return torch.tensor(still, dtype=torch.long, device=self.points.device)

    def _apart(self, i: int) -> bool:
        """Whether chains that began at two modes show no sign of meeting: more draws would tell nothing."""
        return bool(self.group.any()) and self.quality[i].rhat > APART

    def _judge(self, active: Tensor) -> None:
        """Quality of all draws of the active points, or of the newer half where that alone is good."""
        points = active.tolist()
        self._judge_from(points, self.points, 0)
        sizes = [z.shape[1] for z, _ in self.kept[points[0]]]
        newest = max(i for i in range(len(sizes)) if 2 * sum(sizes[i:]) >= sum(sizes))
        bad = [row for row, i in enumerate(points) if not is_good(self.quality[i], self.task.target_ess)]
        if newest and bad and self.pieces * sum(sizes[newest:]) >= self.task.num_draws:
            rows = torch.tensor(bad, device=self.points.device)
            self._judge_from([points[row] for row in bad], self.points[rows], newest)

    def _judge_from(self, numbers: list[int], points: Tensor, oldest: int) -> None:
        """Judge the rounds from ``oldest`` on; if older ones are left out, keep the verdict only if good."""
        draws = torch.stack([self._joined([z for z, _ in self.kept[i][oldest:]]) for i in numbers])
        per_point = max(1, draws[0].numel())
        for part in range(0, len(numbers), max(1, _JUDGED // per_point)):
            some = slice(part, part + max(1, _JUDGED // per_point))
            # Of latents in their own scale: ranks do not see which, where the map is monotone.
            values = draws[some]
            if self.task.quantities is not None:
                values = self.task.quantities(points[some], values)
            for i, found in zip(numbers[some], qualities(values, self.pieces), strict=True):
                if oldest == 0:
                    self.quality[i] = found
                elif is_good(found, self.task.target_ess):
                    self.quality[i], self.kept[i] = found, self.kept[i][oldest:]

    def _joined(self, parts: list[Tensor]) -> Tensor:
        """Rounds of short chains (C pieces, n, ...) -> stored chains (C, pieces n, ...), end to end."""
        whole = torch.cat(parts, 1)
        return whole.reshape(self.task.num_chains, -1, *whole.shape[2:])

    def _keep_only(self, rows: Tensor) -> None:
        self.points, self.at, self.z = self.points[rows], self.at.take(rows), self.z[rows]
        self.step = StepSize(self.step.log_step[rows].exp())

    def _draws(self, rows: list[int]) -> Draws:
        task = self.task
        positions, stats, certified, reasons, total_divergences = [], [], [], [], []
        for i in rows:
            draws = self._joined([z for z, _ in self.kept[i]])
            thinned = torch.arange(task.num_draws, device=draws.device) * draws.shape[1] // task.num_draws
            positions.append(draws[:, thinned])
            joined = {name: self._joined([s[name] for _, s in self.kept[i]]) for name in STATISTICS}
            divergences = int(joined["diverging"].sum())
            stats.append({name: x[:, thinned] for name, x in joined.items()})
            total = joined["diverging"].numel()
            ok, reason = chain_verdict(self.quality[i], divergences, total, task.target_ess, task.monitor)
            if self._apart(i):
                reason = (
                    f"chains that began at two modes stay apart (functions of the draws may not): {reason}"
                )
            if not ok and is_many(task) and not task.monitor:
                reason += "; weights of a net need not mix: name what data do identify in monitor="
            certified.append(ok)
            reasons.append(reason)
            total_divergences.append(divergences)
        count = len(rows)
        seconds = (time.perf_counter() - self.begin) / max(1, len(self.all_points))
        nan = torch.full((count,), torch.nan, dtype=torch.float64)
        merged = {
            name: torch.stack([s[name] for s in stats])
            if stats
            else self.z.new_empty(0, task.num_chains, task.num_draws)
            for name in STATISTICS
        }
        lp = merged.pop("lp")
        merged["diverging"] = merged["diverging"] > 0
        return Draws(
            points=self.all_points[torch.tensor(rows, dtype=torch.long, device=self.all_points.device)],
            position=torch.stack(positions)
            if positions
            else self.z.new_empty(0, *lp.shape[1:], self.z.shape[2]),
            log_density=lp,
            engine=["nuts"] * count,
            certified=certified,
            reason=reasons,
            exact=[False] * count,
            khat=torch.full((count,), torch.inf).to(lp),
            ess_weights=torch.full((count,), torch.inf).to(lp),
            log_evidence=nan.to(lp),
            log_evidence_error=nan.to(lp),
            seconds=torch.full((count,), seconds, dtype=torch.float64),
            quality=torch.tensor([self.quality[i][:3] for i in rows], dtype=torch.float64).reshape(count, 3),
            nested_rhat=torch.tensor([self.quality[i].nested_rhat for i in rows], dtype=torch.float64),
            divergences=torch.tensor(total_divergences, dtype=torch.long),
            stats=merged,
        )
