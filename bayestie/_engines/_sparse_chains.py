"""Chains over 1e5 copies: Metropolis-Hastings on blocks given their boundaries, all blocks at once.

q is the Gaussian with the sparse precision Q. As pi(x) = q(x) exp(sum_i r_i(eta_i)), r_i what likelihood i
leaves beyond its quadratic, a block proposed from q given the variables held still is accepted with
exp(change of its own observations' r): the cost of a sweep is a triangular solve, and its acceptance does not
fall with the number of copies (Knorr-Held and Rue 2002, On block updating in Markov random field models for
disease mapping). Proposals may be autoregressive about q's conditional mean (Crank-Nicolson), which the same
ratio makes exact. Means of copies, whose prior no block sees alone, are a second acceptance (Liu 2001,
section 9.4.3, surrogate transitions); hubs, levels and fixed effects move with what responds to them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse as sp
import torch

from bayestie._engines._blocks import Groups, Partition, partitions
from bayestie._engines._importance import NEARLY_CONSTANT, mean_error, needed_ess
from bayestie._engines._protocol import Task
from bayestie._engines._quality import MAX_RHAT, quality
from bayestie._engines._streamed import Streamed, weighted
from bayestie._psis import good_k, psis
from bayestie._sparse_density import Numbers, Structure
from bayestie._sparse_factor import variances
from bayestie._sparse_mode import SparseFit, averaged, find_mode, log_likelihood, log_prior, slopes

_PROBE = 128  # independent draws of q that tell how far from Gaussian the posterior is
_WATCHED = 3000  # quantities whose every draw is kept for rank-normalised diagnostics
_BURN_IN = 30
_MAX_DOUBLINGS = 5
_GOOD_ACCEPTANCE = 0.85
_FAIR_ACCEPTANCE = 0.6  # of blocks of up to
_LONG_BLOCK = 200
_POOR_BLOCK = 0.25
_BATCH = 10
_CACHED = 100_000
_SHORT_CHAINS = 8  # side by side for each chain that is kept
_DIAGNOSED = 6_000_000  # numbers that are ranked between doublings


class Design:
    """A times rows (batch, n), without a sparse product where every row of A holds one entry."""

    def __init__(self, matrix: Any):
        self.matrix = matrix
        self.single = bool((np.diff(matrix.indptr) == 1).all())
        self.identity = (
            self.single
            and matrix.shape[0] == matrix.shape[1]
            and bool((matrix.data == 1).all())
            and bool((matrix.indices == np.arange(matrix.shape[0])).all())
        )

    def __call__(self, step: np.ndarray) -> np.ndarray:
        if self.identity:
            return step
        if self.single:
            return step[:, self.matrix.indices] * self.matrix.data
        return (self.matrix @ step.T).T


class Remainder:
    """r_i(eta) = log p_i(eta) - e_i (eta - eta_hat) + W_i (eta - eta_hat)^2 / 2, less its value at eta_hat.

    Of steps eta - eta_hat, (batch, M).
    """

    def __init__(self, numbers: Numbers, eta: np.ndarray, slope: np.ndarray, weight: np.ndarray):
        self.numbers, self.eta, self.slope = numbers, eta, slope
        self.half = 0.5 * weight
        self.pull = [part.target - slope[part.rows] for part in numbers.likelihoods]
        self.plain = [bool((part.weight == 1.0).all()) for part in numbers.likelihoods]
        self.at_centre = 0.0
        self.at_centre = self(np.zeros((1, len(eta))))[0]

    def __call__(self, step: np.ndarray) -> np.ndarray:
        out = self.half * step
        whole = len(self.pull) == 1
        for part, pull, plain in zip(self.numbers.likelihoods, self.pull, self.plain, strict=True):
            rows = slice(None) if whole else part.rows
            if part.is_gaussian:
                out[:, rows] = 0.0
                continue
            own = step[:, rows]
            left = out[:, rows]
            left += pull
            left *= own
            size = part.cumulant.value_(torch.from_numpy(own + self.eta[rows])).numpy()
            left -= size if plain else part.weight * size
        out -= self.at_centre
        return out


class Target:
    """q at one point, its remainder, and the terms that no block sees alone."""

    def __init__(self, fit: SparseFit):
        self.structure, self.numbers, self.gaussian = fit.structure, fit.numbers, fit.gaussian
        self.mean = fit.gaussian.mean
        self.log_joint = fit.log_joint
        self.design = Design(fit.structure.map)
        directions = fit.structure.directions[:, : len(fit.numbers.variances)]
        small = directions.shape[1] * directions.shape[0] <= 20_000_000
        self.means: Any = directions.T.toarray() if small else sp.csr_array(directions.T)
        self.spread = self._spread()
        self._log_scale = fit.log_evidence  # log of q's mass times the joint at its mean

    def _spread(self) -> np.ndarray:
        """sd of each predictor under q, from draws: it shapes a proposal alone."""
        rng = np.random.default_rng(11)
        total = np.zeros(self.structure.map.shape[0])
        count = 48
        for _ in range(0, count, 16):
            step = self.gaussian.deviations(rng.standard_normal((16, self.structure.size)).T)
            total += np.square(self.structure.map @ step).sum(1)
        return np.sqrt(total / count)

    def refined(self) -> "Target":
        """About the variational Gaussian: the mean and curvature that q's own draws see."""
        fit = find_mode(self.structure, self.numbers, self.mean, self.spread)
        better = Target(fit)
        better.spread = self.spread
        better.remainder = Remainder(
            self.numbers, fit.eta, slopes(averaged(self.numbers, self.spread), fit.eta), fit.gaussian.weights
        )
        return better

    remainder: Remainder

    def rest(self, step: np.ndarray) -> np.ndarray:
        """Remainders (batch, M) at mean + step (batch, n)."""
        return self.remainder(self.design(step))

    def means_term(self, step: np.ndarray) -> np.ndarray:
        """log of the prior's directions at mean + step, which q has and blocks do not see, (batch,)."""
        return -0.5 * (np.square(step @ self.means.T) / self.numbers.variances).sum(1)

    def sd(self) -> np.ndarray:
        """Of each variable under q: exact where the band is at most 1, else from draws."""
        found = variances(self.gaussian.factor)
        if found is not None:
            if self.gaussian.response is not None:
                response = self.gaussian.response
                found = found - ((response @ self.gaussian.inverse) * response).sum(1)
            return np.sqrt(np.maximum(found, 1e-300))
        rng = np.random.default_rng(12)
        step = self.gaussian.deviations(rng.standard_normal((64, self.structure.size)).T)
        return np.sqrt(np.square(step).mean(1))


@dataclass
class State:
    """Chains side by side: x = mean + step (batch, n), their observations' remainders (batch, M)."""

    step: np.ndarray
    rest: np.ndarray


class Kernel:
    """Moves of chains at one point."""

    def __init__(self, target: Target, sweeps: list[list[Partition]], groups: Groups, temper: float = 1.0):
        self.target, self.sweeps, self.groups, self.temper = target, sweeps, groups, temper
        self.forget()
        self._directions()

    def forget(self) -> None:
        """Acceptance is counted anew."""
        self.accepted = [[np.zeros(p.num_blocks) for p in sweep] for sweep in self.sweeps]
        self.tried = np.zeros(len(self.sweeps))

    def _directions(self) -> None:
        """Functionals b of x that move with all that responds to them: hubs, and the means of copies."""
        structure, gaussian = self.target.structure, self.target.gaussian
        columns = [np.eye(1, structure.size, int(hub)).ravel() for hub in self.groups.hubs]
        num = len(self.target.numbers.variances)
        for i in range(min(num, 20)):
            if self.target.numbers.variances[i] > 0:
                columns.append(structure.directions[:, [i]].toarray().ravel())
        self.functionals = np.array(columns)
        self.inertia = 0.0  # of the autoregression of b, raised until it is accepted often enough
        self.frozen = False
        if not len(columns):
            return
        response = gaussian.solve(np.asfortranarray(self.functionals.T))
        spread = self.functionals @ response
        spread = 0.5 * (spread + spread.T)
        self.lower = np.linalg.cholesky(spread)
        self.carry = scipy.linalg.cho_solve((self.lower, True), response.T)

    def start(self, rng: np.random.Generator, count: int, inflate: float) -> State:
        noise = rng.standard_normal((count, self.target.structure.size)).T
        step = np.ascontiguousarray(inflate * self.target.gaussian.deviations(noise).T)
        return State(step, self.target.rest(step))

    def sweep(self, state: State, number: int, rng: np.random.Generator) -> None:
        """Every variable once but those held: in place."""
        num = len(self.sweeps)
        if num:
            k = (number + number // (4 * num)) % num
            # Now and then a short step: independence proposals stay where q's tail is the lighter.
            inertia = 0.0 if number % 4 else float(rng.uniform(0.3, 0.95))
            for p, partition in enumerate(self.sweeps[k]):
                accepted = self._blocks(state, partition, inertia, rng)
                if inertia == 0.0:
                    self.accepted[k][p] += accepted
            if inertia == 0.0:
                self.tried[k] += len(state.step)
        if len(self.functionals) and (not num or state.step.shape[1] < 20_000 or number % 4 == 1):
            self._shift(state, rng)

    def _blocks(
        self, state: State, partition: Partition, inertia: float, rng: np.random.Generator
    ) -> np.ndarray:
        target, factor, step = self.target, partition.factor, state.step
        batch, blocks = len(step), partition.num_blocks
        trial = factor.whiten_back(rng.standard_normal(step.shape).T).T
        if inertia:
            trial *= math.sqrt(1 - inertia**2)
        centre = partition.centre(step)
        if centre is not None:
            trial += (1 - inertia) * centre if inertia else centre
        if inertia:
            trial += inertia * step
        if not partition.all_free:
            trial[:, partition.held] = step[:, partition.held]
        rest = target.rest(trial)
        labels = partition.row_labels(batch)
        change = rest - state.rest
        gain = np.bincount(labels, change.ravel(), batch * (blocks + 1)).reshape(batch, -1)
        with np.errstate(invalid="ignore", over="ignore"):
            accept = np.log(rng.uniform(size=gain.shape)) < self.temper * gain
        accept[:, blocks] = False
        moved = np.where(accept[:, partition.label], trial, step)
        if len(target.numbers.variances):
            ratio = target.means_term(moved) - target.means_term(step)
            refused = np.log(rng.uniform(size=batch)) >= ratio
            if refused.any():
                accept[refused] = False
                moved[refused] = step[refused]
        state.step = moved
        change *= accept[:, partition.row_label]
        state.rest += change
        return accept[:, :blocks].sum(0)

    def _shift(self, state: State, rng: np.random.Generator) -> None:
        now = state.step @ self.functionals.T
        fresh = rng.standard_normal(now.shape) @ self.lower.T
        then = self.inertia * now + math.sqrt(1 - self.inertia**2) * fresh
        step = state.step + (then - now) @ self.carry
        rest = self.target.rest(step)
        gain = self.temper * (rest - state.rest).sum(1)
        accept = np.log(rng.uniform(size=len(gain))) < gain
        state.step = np.where(accept[:, None], step, state.step)
        state.rest = np.where(accept[:, None], rest, state.rest)
        if not self.frozen:
            self.inertia = min(max(self.inertia + 0.04 * (0.5 - float(accept.mean())), 0.0), 0.999)

    def acceptance(self) -> np.ndarray:
        """Of each block of each partition."""
        rates = [
            a / max(tried, 1) for sweep, tried in zip(self.accepted, self.tried, strict=True) for a in sweep
        ]
        return np.concatenate(rates) if rates else np.ones(1)


def _suitable(target: Target, groups: Groups, largest: int, rng: np.random.Generator) -> tuple[Kernel, int]:
    """The largest blocks whose proposals are accepted well."""
    size = largest
    count = _together(target.structure.size, 8)
    while True:
        sweeps = partitions(target.structure, target.gaussian, groups, size, rng)
        kernel = Kernel(target, sweeps, groups)
        state, num = kernel.start(rng, count, 1.0), max(1, len(kernel.sweeps))
        for number in range(1, 4 * num + 1):
            kernel.sweep(state, number, rng)
        kernel.forget()
        for number in range(1, 8 * num + 1):
            kernel.sweep(state, number, rng)
        rates = kernel.acceptance()
        enough = _GOOD_ACCEPTANCE if size > _LONG_BLOCK else _FAIR_ACCEPTANCE
        if size <= 1 or (rates.mean() >= enough and np.quantile(rates, 0.02) >= _POOR_BLOCK):
            if 1 < size <= 64:  # skew copies: single ones are accepted more often
                sweeps += partitions(target.structure, target.gaussian, groups, max(1, size // 16), rng)
                kernel = Kernel(target, sweeps, groups)
            kernel.forget()
            return kernel, size
        size = max(1, size // 4)


def _together(size: int, most: int) -> int:
    """Chains that are moved as one batch: their state stays in the cache."""
    return int(min(max(_CACHED // size, 1), most))


def run_chains(
    task: Task,
    point: int,
    fit: SparseFit,
    kept: int,
    memory: dict[str, Any],
    to_rows: Callable[[Structure, Numbers, np.ndarray], np.ndarray],
) -> dict[str, Any]:
    """Draws at one point whose likelihood is not Gaussian: weighted where that does, else chains.

    Args:
        task: the work.
        point: the point of the sweep.
        fit: its mode.
        kept: draws per chain to keep.
        memory: what the strength before has learned.
        to_rows: reduced variables (batch, n) to rows of draws.
    """
    target = Target(fit).refined()
    probe = _Probe(target, task.generator(204, point))
    if probe.weights_will_do(needed_ess(task)):
        found = _weighted(task, point, target, kept, to_rows)
        if found["certified"]:
            return found
    if (target.numbers.variances == 0).any():
        return _weighted(task, point, target, kept, to_rows)
    groups = Groups.of(target.structure)
    rng = task.generator(205, point)
    largest = min(target.structure.size, 16 * memory.get("size", target.structure.size))
    kernel, memory["size"] = _suitable(target, groups, largest, rng)
    chains = _Chains(task, point, target, kernel, kept, to_rows)
    good, reason, worst = chains.run()
    log_evidence, error = _evidence(task, point, target, kernel, probe, chains)
    rates = kernel.acceptance()
    reason = (
        f"{reason}; blocks of at most {memory['size']} variables, {rates.mean():.0%} of proposals accepted"
    )
    out = chains.result()
    return out | {
        "certified": good,
        "reason": reason,
        "log_evidence": log_evidence,
        "error": error,
        "engine": "blocks",
        "khat": math.inf,
        "ess": math.inf,
        "quality": worst,
    }


class _Probe:
    """Independent draws of q and their remainders."""

    def __init__(self, target: Target, rng: np.random.Generator):
        totals = []
        for _ in range(0, _PROBE, 16):
            step = target.gaussian.deviations(rng.standard_normal((16, target.structure.size)).T)
            totals += target.rest(step.T).sum(1).tolist()
        self.total = np.array(totals)

    def weights_will_do(self, needed: float) -> bool:
        with np.errstate(over="ignore"):
            weights = np.exp(self.total - self.total.max())
        share = weights.sum() ** 2 / np.square(weights).sum() / len(weights)
        return bool(np.isfinite(self.total).all() and self.total.std() < 1.5 and share * 16_000 > needed)


def _weighted(
    task: Task, point: int, target: Target, kept: int, to_rows: Callable[..., np.ndarray]
) -> dict[str, Any]:
    """Importance draws of q."""
    wanted, needed = task.num_chains * task.num_draws, needed_ess(task)
    rng = task.generator(206, point)
    steps, rest, square = [], np.zeros(0), np.zeros(0)
    smoothed, khat, ess = torch.zeros(0), math.inf, 0.0
    while len(rest) < 16 * wanted and len(rest) * target.structure.size < 2.5e8 + wanted:
        for start in range(0, wanted, 32):
            count = min(32, wanted - start)
            step, own = target.gaussian.draw(rng.standard_normal((count, target.structure.size)).T)
            square = np.append(square, own)
            rest = np.append(rest, target.rest(step.T).sum(1))
            steps.append(step.T)
        found = psis(torch.from_numpy(rest)[None])
        smoothed, khat = found[0][0], float(found[1][0])
        ess = float(torch.exp(-torch.logsumexp(2 * smoothed, 0)))
        if ess >= needed or khat > 0.8 or float(rest.max() - rest.min()) < NEARLY_CONSTANT:
            break
    total = task.num_chains * kept
    cumulative = np.cumsum(np.exp(smoothed.numpy()))
    row = np.searchsorted(cumulative / cumulative[-1], (np.arange(total) + rng.uniform()) / total)
    row = np.minimum(row, len(rest) - 1)[rng.permutation(total)]
    x = target.mean + np.concatenate(steps)[row]
    rows = to_rows(target.structure, target.numbers, x)
    log_mean = float(torch.logsumexp(torch.from_numpy(rest), 0)) - math.log(len(rest))
    threshold = good_k(len(rest))
    alike = float(rest.max() - rest.min()) < NEARLY_CONSTANT  # no tail for khat to measure
    good = (khat < threshold or alike) and ess >= needed
    worth = total**2 / float(np.square(np.bincount(row)).sum())
    summary = None
    if kept < task.num_draws:
        every = to_rows(target.structure, target.numbers, target.mean + np.concatenate(steps))
        summary = weighted(every, smoothed.numpy(), ess)
    return {
        "summary": summary,
        "rows": rows.reshape(task.num_chains, kept, -1),
        "log_density": (target.log_joint + rest - 0.5 * square)[row].reshape(task.num_chains, kept),
        "certified": good,
        "reason": f"importance weights have khat {khat:.2f} and effective sample size {ess:.0f}"
        + ("" if good else f", wanted below {threshold:.2f} and at least {needed:.0f}"),
        "log_evidence": target._log_scale + log_mean,
        "error": float(mean_error(torch.from_numpy(np.exp(rest - log_mean)), khat)),
        "khat": khat,
        "ess": ess,
        "quality": (1.0, worth, worth),
    }


class _Chains:
    """Chains at one point, run until they are good: kept rows, watched quantities, streamed moments.

    Each chain that is kept is several short ones, side by side, laid end to end.
    """

    def __init__(
        self,
        task: Task,
        point: int,
        target: Target,
        kernel: Kernel,
        kept: int,
        to_rows: Callable[..., np.ndarray],
    ):
        self.task, self.point, self.target, self.kernel, self.to_rows = task, point, target, kernel, to_rows
        size = target.structure.size
        self.short = _together(size, _SHORT_CHAINS)
        self.kept, self.num = math.ceil(kept / self.short), 0  # of each short chain
        self.wanted = kept
        chains = range(task.num_chains)
        self.rngs = [task.generator(207, point, c) for c in chains]
        self.states = [kernel.start(rng, self.short, 1.2) for rng in self.rngs]
        for number in range(_BURN_IN):
            for state, rng in zip(self.states, self.rngs, strict=True):
                kernel.sweep(state, number, rng)
        kernel.frozen = True
        self.extra = len(target.numbers.variances)
        centre = np.concatenate([target.mean, np.zeros(self.extra)])
        sd = target.sd()
        if self.extra:
            along = target.gaussian.solve(target.structure.directions[:, : self.extra].toarray(order="F"))
            sd = np.append(sd, np.sqrt(np.maximum(np.diagonal(target.means @ along), 1e-300)))
        histogram = kept < task.num_draws
        self.streamed = Streamed(
            centre, sd, task.num_chains * self.short, _BATCH, histogram=histogram, joined=self.short
        )
        self.watched = self._worst(size)
        self.series: list[list[np.ndarray]] = [[] for _ in chains]
        self.totals: list[list[np.ndarray]] = [[] for _ in chains]
        self.steps = [np.empty((self.kept, self.short, size)) for _ in chains]
        self.stride = 1

    def _worst(self, size: int) -> np.ndarray:
        """Quantities to watch: all, or those in blocks that move least and some at random."""
        if size + self.extra <= _WATCHED:
            return np.arange(size + self.extra)
        rate, kernel = np.zeros(size), self.kernel
        for sweep, accepted, tried in zip(kernel.sweeps, kernel.accepted, kernel.tried, strict=True):
            for partition, own in zip(sweep, accepted, strict=True):
                rate += np.append(own / max(tried, 1), 0.0)[partition.label]
        order = np.argsort(rate, kind="stable")[: _WATCHED // 2]
        rest = np.random.default_rng(13).choice(size, _WATCHED - len(order) - self.extra, replace=False)
        return np.unique(np.concatenate([order, rest, size + np.arange(self.extra)]))

    def run(self) -> tuple[bool, str, tuple[float, float, float]]:
        # As many draws as were asked for are made even where fewer are kept.
        while self.stride * self.wanted < self.task.num_draws:
            self.stride *= 2
        until = self.stride * self.kept
        for doubling in range(_MAX_DOUBLINGS + 1):
            self._advance(until)
            good, reason, worst = self._verdict()
            if good or doubling == _MAX_DOUBLINGS:
                return good, reason, worst
            for steps in self.steps:  # every second of the kept stays, the rest of the room is filled
                half = steps[1::2].copy()
                steps[: len(half)] = half
            self.stride *= 2
            until *= 2
        raise AssertionError

    def _advance(self, until: int) -> None:
        for c, (state, rng) in enumerate(zip(self.states, self.rngs, strict=True)):
            for number in range(self.num, until):
                self.kernel.sweep(state, number, rng)
                step = state.step
                if self.extra:
                    step = np.concatenate([step, step @ self.target.means.T], 1)
                self.streamed.add(slice(c * self.short, (c + 1) * self.short), step)
                self.series[c].append(step[:, self.watched])
                self.totals[c].append(state.rest.sum(1))
                if (number + 1) % self.stride == 0:
                    self.steps[c][(number + 1) // self.stride - 1] = state.step
        self.num = until

    def _verdict(self) -> tuple[bool, str, tuple[float, float, float]]:
        total = self.num * self.task.num_chains * self.short
        chosen = np.arange(len(self.watched))
        all_rhat, all_bulk, all_tail = self.streamed.quality()
        if len(chosen) * total > _DIAGNOSED:
            own = np.minimum(all_bulk, all_tail)[self.watched] / np.square(all_rhat[self.watched])
            chosen = np.argsort(own, kind="stable")[: max(_DIAGNOSED // total, 64)]
        # (draws, short, W) of each chain laid end to end
        series = [np.stack([x[:, chosen] for x in own], 1).reshape(-1, len(chosen)) for own in self.series]
        parts = [quality(part) for part in torch.from_numpy(np.stack(series)).split(256, 2)]
        rhat = max(q[0] for q in parts)
        bulk, tail = (min(q[i] for q in parts) for i in (1, 2))
        seen, how = self.streamed.size, ""
        if seen > len(chosen):
            rhat, bulk = max(rhat, float(all_rhat.max())), min(bulk, float(all_bulk.min()))
            tail = min(tail, float(all_tail.min()))
            how = f" (ranks for {len(chosen)}, batch means for all {seen})"
        good = bool(rhat < MAX_RHAT and min(bulk, tail) >= self.task.target_ess)
        reason = f"R-hat {rhat:.3f}, ESS bulk {bulk:.0f} and tail {tail:.0f} over {total} draws{how}"
        if not good:
            reason += f": wanted R-hat below {MAX_RHAT} and ESS of at least {self.task.target_ess:.0f}"
        return good, reason, (rhat, bulk, tail)

    def result(self) -> dict[str, Any]:
        target = self.target
        structure, numbers = target.structure, target.numbers
        rows, lp = [], np.empty((len(self.steps), self.wanted))
        for c, steps in enumerate(self.steps):
            x = steps.swapaxes(0, 1).reshape(-1, steps.shape[2])[-self.wanted :]
            self.steps[c] = np.zeros((0, 0, 0))  # rows hold them now
            for i, step in enumerate(x):
                step += target.mean
                eta = structure.map @ step + numbers.offset
                lp[c, i] = log_prior(structure, numbers, step) + log_likelihood(numbers, eta)
            rows.append(self.to_rows(structure, numbers, x))
        out: dict[str, Any] = {"rows": np.stack(rows), "log_density": lp}
        if self.streamed.histogram is not None:
            out["stream"] = self.streamed
        return out


def _evidence(
    task: Task, point: int, target: Target, kernel: Kernel, probe: _Probe, chains: _Chains
) -> tuple[float, float]:
    """log p(y): q's own, and log E_q exp R along q exp(beta R), beta from 0 to 1.

    d log Z / d beta = E_beta R, whose slope is Var_beta R: the trapezoidal rule over 0, 1/2, 1 with its end
    correction, the difference from Simpson's rule as its error beside the Monte Carlo errors.
    """
    totals = np.concatenate([np.stack(own, 1) for own in chains.totals])  # (chains, draws)
    first, last = probe.total, totals
    mean0, var0 = float(first.mean()), float(first.var(ddof=1))
    mean1, var1 = float(last.mean()), float(last.var(ddof=1))
    error0 = math.sqrt(var0 / len(first))
    error1 = _error_of_mean(totals)
    middle = Kernel(target, kernel.sweeps, kernel.groups, temper=0.5)
    middle.frozen, middle.inertia = True, kernel.inertia
    halves = []
    for c, state in enumerate(chains.states):
        rng = task.generator(208, point, c)
        own = []
        for number in range(60):
            middle.sweep(state, number, rng)
            own.append(state.rest.sum(1))
        halves.append(np.stack(own[10:], 1))
    half = np.concatenate(halves)
    mean2, error2 = float(half.mean()), _error_of_mean(half)
    corrected = (mean0 + 2 * mean2 + mean1) / 4 + (var0 - var1) / 48
    simpson = (mean0 + 4 * mean2 + mean1) / 6
    spread_error = (var0 * math.sqrt(2 / len(first)) + var1 * math.sqrt(2 / max(totals.size / 4, 4))) / 48
    sampling = math.sqrt((error0 / 4) ** 2 + (error2 / 2) ** 2 + (error1 / 4) ** 2 + spread_error**2)
    error = math.hypot(sampling, 0.5 * (corrected - simpson))
    return target._log_scale + corrected, error


def _error_of_mean(values: np.ndarray) -> float:
    """Of (chains, draws), by batch means."""
    size = max(1, values.shape[1] // 10)
    length = values.shape[1] // size * size
    batches = values[:, :length].reshape(len(values), -1, size).mean(2).ravel()
    return float(batches.std(ddof=1) / math.sqrt(len(batches)))
