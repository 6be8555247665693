"""Chains over 1e5 copies: Metropolis-Hastings on blocks given their boundaries, all blocks at once.

q is the Gaussian with the sparse precision Q. As pi(x) = q(x) exp(sum_i r_i(eta_i)), r_i what likelihood i
leaves beyond its quadratic, a block proposed from q given the variables held still is accepted with
exp(change of its own observations' r): the cost of a sweep is a triangular solve, and its acceptance does not
fall with the number of copies (Knorr-Held and Rue 2002, On block updating in Markov random field models for
disease mapping). Proposals may be autoregressive about q's conditional mean (Crank-Nicolson), which the same
ratio makes exact. Means of copies, whose prior no block sees alone, are a second acceptance (Liu 2001, section
9.4.3, surrogate transitions); hubs, levels and fixed effects move with what responds to them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import torch

from bayestie._engines._blocks import Groups, Partition, partitions
from bayestie._engines._importance import mean_error, needed_ess
from bayestie._engines._protocol import Task
from bayestie._engines._quality import MAX_RHAT, quality
from bayestie._engines._streamed import Streamed
from bayestie._psis import good_k, psis
from bayestie._sparse_density import Numbers, Structure
from bayestie._sparse_factor import variances
from bayestie._sparse_mode import SparseFit, averaged, find_mode, log_likelihood, log_prior, slopes

_PROBE = 128  # independent draws of q that tell how far from Gaussian the posterior is
_WATCHED = 3000  # quantities whose every draw is kept for rank-normalised diagnostics
_BURN_IN = 30
_MAX_DOUBLINGS = 5
_GOOD_ACCEPTANCE = 0.6
_POOR_BLOCK = 0.25
_BATCH = 25


@dataclass
class Remainder:
    """r_i(eta) = log p_i(eta) - e_i (eta - eta_hat) + W_i (eta - eta_hat)^2 / 2, less its value at eta_hat."""

    numbers: Numbers
    eta: np.ndarray
    slope: np.ndarray
    weight: np.ndarray

    def __post_init__(self) -> None:
        self.at_centre = np.zeros_like(self.eta)
        self.at_centre = self(self.eta)

    def __call__(self, eta: np.ndarray) -> np.ndarray:
        out = np.zeros_like(eta)
        step = eta - self.eta
        for part in self.numbers.likelihoods:
            if part.is_gaussian:
                continue
            rows, own = part.rows, step[part.rows]
            size = part.cumulant.value(torch.from_numpy(eta[rows])).numpy()
            out[rows] = own * (part.target - self.slope[rows] + 0.5 * self.weight[rows] * own)
            out[rows] -= part.weight * size
        return out - self.at_centre


class Target:
    """q at one point, its remainder, and the terms that no block sees alone."""

    def __init__(self, fit: SparseFit):
        self.structure, self.numbers, self.gaussian = fit.structure, fit.numbers, fit.gaussian
        self.mean = fit.gaussian.mean
        self.log_joint = fit.log_joint
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

    def eta(self, step: np.ndarray) -> np.ndarray:
        return self.remainder.eta + self.structure.map @ step

    def means_term(self, step: np.ndarray) -> float:
        """log of the prior's directions at mean + step, which q has and blocks do not see."""
        if self.gaussian.response is None:
            return 0.0
        variance = self.numbers.variances
        along = (self.structure.directions.T @ step)[: len(variance)]
        return float(-0.5 * (np.square(along) / variance).sum())

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
    """One chain: x = mean + step, its observations' remainders."""

    step: np.ndarray
    rest: np.ndarray


class Kernel:
    """Moves of a chain at one point."""

    def __init__(self, target: Target, sweeps: list[list[Partition]], groups: Groups, temper: float = 1.0):
        self.target, self.sweeps, self.groups, self.temper = target, sweeps, groups, temper
        self.accepted = [[np.zeros(p.num_blocks) for p in sweep] for sweep in sweeps]
        self.tried = np.zeros(len(sweeps))
        self._directions()

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
        if not len(columns):
            return
        response = gaussian.solve(np.asfortranarray(self.functionals.T))
        spread = self.functionals @ response
        spread = 0.5 * (spread + spread.T)
        self.lower = np.linalg.cholesky(spread)
        self.carry = scipy.linalg.cho_solve((self.lower, True), response.T).T

    def start(self, rng: np.random.Generator, inflate: float) -> State:
        structure = self.target.structure
        step = self.target.gaussian.deviations(rng.standard_normal((1, structure.size)).T)[:, 0]
        step = inflate * step
        return State(step, self.target.remainder(self.target.eta(step)))

    def sweep(self, state: State, number: int, rng: np.random.Generator) -> None:
        """Every variable once but those held: in place."""
        k = number % len(self.sweeps) if self.sweeps else 0
        # Now and then a short step: independence proposals stay where q's tail is the lighter.
        inertia = 0.0 if number % 4 else float(rng.uniform(0.3, 0.95))
        for p, partition in enumerate(self.sweeps[k] if self.sweeps else []):
            accepted = self._blocks(state, partition, inertia, rng)
            if inertia == 0.0:
                self.accepted[k][p] += accepted
        if inertia == 0.0 and self.sweeps:
            self.tried[k] += 1
        if len(self.functionals) and (len(state.step) < 20_000 or number % 4 == 1):
            self._shift(state, rng)

    def _blocks(
        self, state: State, partition: Partition, inertia: float, rng: np.random.Generator
    ) -> np.ndarray:
        target, factor = self.target, partition.factor
        held = partition.coupling @ state.step
        centre = -factor.solve(held) if partition.coupling.nnz else np.zeros_like(held)
        noise = factor.whiten_back(rng.standard_normal(len(held)))
        if inertia:
            noise *= math.sqrt(1 - inertia**2)
            noise += inertia * (state.step - centre)
        trial = np.where(partition.free, centre + noise, state.step)
        rest = target.remainder(target.eta(trial))
        gain = np.bincount(partition.row_label, rest - state.rest, partition.num_blocks + 1)[:-1]
        with np.errstate(invalid="ignore", over="ignore"):
            accept = np.log(rng.uniform(size=partition.num_blocks)) < self.temper * gain
        whole = np.append(accept, False)
        step = np.where(whole[partition.label], trial, state.step)
        if target.gaussian.response is not None:
            ratio = target.means_term(step) - target.means_term(state.step)
            if not math.log(rng.uniform()) < ratio:
                return np.zeros(partition.num_blocks)
        state.step = step
        state.rest = np.where(whole[partition.row_label], rest, state.rest)
        return accept

    def _shift(self, state: State, rng: np.random.Generator) -> None:
        now = self.functionals @ state.step
        fresh = self.lower @ rng.standard_normal(len(now))
        then = self.inertia * now + math.sqrt(1 - self.inertia**2) * fresh
        step = state.step + self.carry @ (then - now)
        rest = self.target.remainder(self.target.eta(step))
        gain = self.temper * float((rest - state.rest).sum())
        accept = math.log(rng.uniform()) < gain
        if accept:
            state.step, state.rest = step, rest
        if not self.frozen:
            self.inertia = min(max(self.inertia + (-0.02 if accept else 0.02), 0.0), 0.999)

    frozen = False

    def acceptance(self) -> np.ndarray:
        """Of each block of each partition."""
        rates = [
            a / max(tried, 1) for sweep, tried in zip(self.accepted, self.tried, strict=True) for a in sweep
        ]
        return np.concatenate(rates) if rates else np.ones(1)


def _suitable(target: Target, groups: Groups, largest: int, rng: np.random.Generator) -> tuple[Kernel, int]:
    """The largest blocks whose proposals are accepted well."""
    size = largest
    while True:
        sweeps = partitions(target.structure, target.gaussian, groups, size, rng)
        kernel = Kernel(target, sweeps, groups)
        state = kernel.start(rng, 1.0)
        for number in range(1, 4 * max(1, len(sweeps)) + 1):
            kernel.sweep(state, number, rng)
        kernel.accepted = [[np.zeros_like(a) for a in sweep] for sweep in kernel.accepted]
        kernel.tried[:] = 0
        for number in range(1, 12 * max(1, len(sweeps)) + 1):
            kernel.sweep(state, number, rng)
        rates = kernel.acceptance()
        if size <= 1 or (rates.mean() >= _GOOD_ACCEPTANCE and np.quantile(rates, 0.02) >= _POOR_BLOCK):
            return kernel, size
        size = max(1, size // 4)


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
        found = _weighted(task, point, target, kept, to_rows)
        return found
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
            totals += [float(target.remainder(target.eta(s)).sum()) for s in step.T]
        self.total = np.array(totals)

    def weights_will_do(self, needed: float) -> bool:
        with np.errstate(over="ignore"):
            weights = np.exp(self.total - self.total.max())
        share = weights.sum() ** 2 / np.square(weights).sum() / len(weights)
        return bool(np.isfinite(self.total).all()) and self.total.std() < 1.5 and share * 16_000 > needed


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
            step = target.gaussian.deviations(rng.standard_normal((count, target.structure.size)).T)
            square = np.append(square, target.gaussian.square(step))
            rest = np.append(rest, [target.remainder(target.eta(s)).sum() for s in step.T])
            steps.append(step.T)
        found = psis(torch.from_numpy(rest)[None])
        smoothed, khat = found[0][0], float(found[1][0])
        ess = float(torch.exp(-torch.logsumexp(2 * smoothed, 0)))
        if ess >= needed or khat > 0.8:
            break
    total = task.num_chains * kept
    cumulative = np.cumsum(np.exp(smoothed.numpy()))
    row = np.searchsorted(cumulative / cumulative[-1], (np.arange(total) + rng.uniform()) / total)
    row = np.minimum(row, len(rest) - 1)[rng.permutation(total)]
    x = target.mean + np.concatenate(steps)[row]
    rows = to_rows(target.structure, target.numbers, x)
    log_mean = float(torch.logsumexp(torch.from_numpy(rest), 0)) - math.log(len(rest))
    threshold = good_k(len(rest))
    good = khat < threshold and ess >= needed
    worth = total**2 / float(np.square(np.bincount(row)).sum())
    return {
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
    """Chains at one point, run until they are good: kept rows, watched quantities, streamed moments."""

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
        self.kept, self.num = kept, 0
        # As many draws as were asked for are made even where fewer are kept.
        self.first = max(1, math.ceil(task.num_draws / kept))
        chains = range(task.num_chains)
        self.rngs = [task.generator(207, point, c) for c in chains]
        self.states = [kernel.start(rng, 1.2) for rng in self.rngs]
        for number in range(_BURN_IN):
            for state, rng in zip(self.states, self.rngs, strict=True):
                kernel.sweep(state, number, rng)
        kernel.frozen = True
        size = target.structure.size
        directions = target.structure.directions[:, : len(target.numbers.variances)]
        self.directions = directions if directions.shape[1] else None
        self.extra = directions.shape[1]
        centre = np.concatenate([target.mean, np.zeros(self.extra)])
        sd = target.sd()
        if self.directions is not None:
            along = target.gaussian.solve(self.directions.toarray(order="F"))
            sd = np.append(sd, np.sqrt(np.maximum((self.directions.T @ along).diagonal(), 1e-300)))
        self.streamed = Streamed(centre, sd, task.num_chains, _BATCH, histogram=kept < task.num_draws)
        self.watched = self._worst(size)
        self.series: list[list[np.ndarray]] = [[] for _ in chains]
        self.totals: list[list[float]] = [[] for _ in chains]
        self.steps = [np.empty((kept, size)) for _ in chains]
        self.stride = 1

    def _worst(self, size: int) -> np.ndarray:
        """Quantities to watch: all, or those in blocks that move least and some at random."""
        if size + self.extra <= _WATCHED:
            return np.arange(size + self.extra)
        rate = np.zeros(size)
        for sweep, accepted, tried in zip(
            self.kernel.sweeps, self.kernel.accepted, self.kernel.tried, strict=True
        ):
            for partition, own in zip(sweep, accepted, strict=True):
                rate += np.append(own / max(tried, 1), 0.0)[partition.label]
        order = np.argsort(rate, kind="stable")[: _WATCHED // 2]
        rest = np.random.default_rng(13).choice(size, _WATCHED - len(order) - self.extra, replace=False)
        return np.unique(np.concatenate([order, rest, size + np.arange(self.extra)]))

    def run(self) -> tuple[bool, str, tuple[float, float, float]]:
        until, good = self.kept * self.first, False
        while self.stride * self.kept < until:
            self.stride *= 2
        until = self.stride * self.kept
        for doubling in range(_MAX_DOUBLINGS + 1):
            self._advance(until)
            good, reason, worst = self._verdict()
            if good or doubling == _MAX_DOUBLINGS:
                break
            for steps in self.steps:  # every second of the kept stays, the rest of the room is filled
                half = steps[1::2].copy()
                steps[: len(half)] = half
            self.stride *= 2
            until *= 2
        return good, reason, worst

    def _advance(self, until: int) -> None:
        for c, (state, rng) in enumerate(zip(self.states, self.rngs, strict=True)):
            for number in range(self.num, until):
                self.kernel.sweep(state, number, rng)
                step = state.step
                if self.directions is not None:
                    step = np.append(step, self.directions.T @ step)
                x = step + self.streamed.centre
                self.streamed.add(c, x)
                self.series[c].append(x[self.watched])
                self.totals[c].append(float(state.rest.sum()))
                if (number + 1) % self.stride == 0:
                    self.steps[c][(number + 1) // self.stride - 1] = state.step
        self.num = until

    def _verdict(self) -> tuple[bool, str, tuple[float, float, float]]:
        watched = torch.from_numpy(np.stack([np.stack(s) for s in self.series]))
        parts = [quality(part) for part in watched.split(256, 2)]
        rhat = max(q[0] for q in parts)
        bulk, tail = (min(q[i] for q in parts) for i in (1, 2))
        seen = self.streamed.size
        if seen > len(self.watched):
            all_rhat, all_bulk, all_tail = self.streamed.quality()
            rhat, bulk = max(rhat, float(all_rhat.max())), min(bulk, float(all_bulk.min()))
            tail = min(tail, float(all_tail.min()))
        total = self.num * self.task.num_chains
        good = rhat < MAX_RHAT and min(bulk, tail) >= self.task.target_ess
        how = (
            ""
            if seen <= len(self.watched)
            else f" (ranks for {len(self.watched)}, batch means for all {seen})"
        )
        reason = f"R-hat {rhat:.3f}, ESS bulk {bulk:.0f} and tail {tail:.0f} over {total} draws{how}"
        if not good:
            reason += f": wanted R-hat below {MAX_RHAT} and ESS of at least {self.task.target_ess:.0f}"
        return good, reason, (rhat, bulk, tail)

    def result(self) -> dict[str, Any]:
        target, kept = self.target, self.kept
        structure, numbers = target.structure, target.numbers
        rows, lp = [], np.empty((len(self.steps), kept))
        for c, steps in enumerate(self.steps):
            for i, step in enumerate(steps):
                x = target.mean + step
                eta = target.eta(step)
                lp[c, i] = log_prior(structure, numbers, x) + log_likelihood(numbers, eta)
            steps += target.mean
            rows.append(self.to_rows(structure, numbers, steps))
            self.steps[c] = np.zeros((0, 0))  # rows hold them now
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
    totals = np.array(chains.totals)
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
        for number in range(80):
            middle.sweep(state, number, rng)
            own.append(float(state.rest.sum()))
        halves.append(own[15:])
    half = np.array(halves)
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
