"""Draws at one point of many copies, the likelihood not Gaussian: weighted where that does, else chains."""

import math
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from bayestie._engines._blocks import Groups
from bayestie._engines._importance import NEARLY_CONSTANT, mean_error, needed_ess
from bayestie._engines._protocol import Task
from bayestie._engines._quality import MAX_RHAT, quality
from bayestie._engines._sparse_kernel import Kernel, suitable_kernel, together
from bayestie._engines._sparse_target import Target
from bayestie._engines._streamed import Streamed, weighted
from bayestie._engines._whitened import Whitened
from bayestie._psis import good_k, psis
from bayestie._sparse_mode import SparseFit, log_likelihood, log_prior
from bayestie._sparse_numbers import Numbers
from bayestie._sparse_structure import Structure
from bayestie._workers import run_all

_PROBE = 128  # independent draws of q that tell how far from Gaussian the posterior is
_WATCHED = 3000  # quantities whose every draw is kept for rank-normalised diagnostics
_BURN_IN = 30
_MAX_DOUBLINGS = 5
_BATCH = 10
_SHORT_CHAINS = 8  # side by side for each chain that is kept
_REPORTED = 16  # draws of a chain between reports of progress
_DIAGNOSED = 6_000_000  # numbers that are ranked between doublings


def run_chains(
    task: Task,
    point: int,
    fit: SparseFit,
    kept: int,
    carried: np.ndarray | None,
    memory: dict[str, Any],
    to_rows: Callable[[Structure, Numbers, np.ndarray], np.ndarray],
) -> dict[str, Any]:
    """Draws at one point whose likelihood is not Gaussian: weighted where that does, else chains.

    Args:
        task: the work.
        point: the point of the sweep.
        fit: its mode.
        kept: draws per chain to keep.
        carried: numbers of those that the other strengths are to see; None: none.
        memory: what the strength before has learned.
        to_rows: reduced variables (batch, n) to rows of draws.
    """
    target = Target(fit).refined()
    probe = _Probe(target, task.generator(204, point))
    if probe.weights_will_do(needed_ess(task)):
        found = _weighted(task, point, target, kept, carried, to_rows)
        if found["certified"]:
            return found
    if (target.numbers.variances == 0).any():
        return _weighted(task, point, target, kept, carried, to_rows)
    groups = Groups.of(target.structure)
    rng = task.generator(205, point)
    largest = min(target.structure.size, 16 * memory.get("size", target.structure.size))
    kernel, memory["size"] = suitable_kernel(target, groups, largest, rng)
    chains = _Chains(task, point, target, kernel, kept, carried, to_rows)
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


def _whitened(target: Target, step: np.ndarray, rest: np.ndarray, rng: np.random.Generator) -> Whitened:
    """Of steps from the mean of the carried draws (draws, n), remainders of all that are stored."""
    return Whitened(
        target.gaussian,
        target.log_scale,
        lambda step: target.rest(step).sum(1),
        target.gaussian.whitened(step.T, rng).T,
        target.log_scale + rest,
    )


def _weighted(
    task: Task,
    point: int,
    target: Target,
    kept: int,
    carried: np.ndarray | None,
    to_rows: Callable[..., np.ndarray],
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
    step = _picked(steps, row)
    whitened = None
    if carried is not None:
        places = (np.arange(task.num_chains)[:, None] * kept + carried).ravel()
        whitened = _whitened(target, step[places], rest[row].reshape(task.num_chains, kept), rng)
    step += target.mean
    rows = to_rows(target.structure, target.numbers, step)
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
        "log_evidence": target.log_scale + log_mean,
        "error": float(mean_error(torch.from_numpy(np.exp(rest - log_mean)), khat)),
        "khat": khat,
        "ess": ess,
        "quality": (1.0, worth, worth),
        "whitened": whitened,
    }


def _picked(parts: list[np.ndarray], row: np.ndarray) -> np.ndarray:
    """Rows of all parts, without a copy of them all."""
    out, start = np.empty((len(row), parts[0].shape[1])), 0
    for part in parts:
        own = np.flatnonzero((row >= start) & (row < start + len(part)))
        out[own] = part[row[own] - start]
        start += len(part)
    return out


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
        carried: np.ndarray | None,
        to_rows: Callable[..., np.ndarray],
    ):
        self.task, self.point, self.target, self.kernel, self.to_rows = task, point, target, kernel, to_rows
        self.carried = carried
        size = target.structure.size
        self.short = together(size, _SHORT_CHAINS)
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
        self.done = [0] * task.num_chains  # draws of each short chain

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
        # As many draws as were asked for are made even where fewer are kept, and enough to judge them by.
        while self.stride * self.wanted < self.task.num_draws or self.stride * self.kept < 2 * _BATCH:
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
        """Every chain on to so many draws, long ones side by side: each has its own state and noise."""
        stop = threading.Event()
        jobs = [partial(self._advance_one, c, until, stop) for c in range(len(self.states))]
        # Operations on short arrays hold the interpreter: two threads would be slower than one.
        is_long = self.kernel.native is not None
        for twin in run_all(jobs, on_error=stop.set) if is_long else [job() for job in jobs]:
            self.kernel.count(twin)
        self.num = until

    def _advance_one(self, c: int, until: int, stop: threading.Event) -> Kernel:
        state, rng, kernel = self.states[c], self.rngs[c], self.kernel.twin()
        for number in range(self.num, until):
            if stop.is_set():
                break
            kernel.sweep(state, number, rng)
            step = state.step
            if self.extra:
                step = np.concatenate([step, step @ self.target.means.T], 1)
            self.streamed.add(slice(c * self.short, (c + 1) * self.short), step)
            self.series[c].append(step[:, self.watched])
            self.totals[c].append(state.rest.sum(1))
            if (number + 1) % self.stride == 0:
                self.steps[c][(number + 1) // self.stride - 1] = state.step
            self.done[c] = number + 1
            if (number + 1) % _REPORTED == 0:
                self._report(until)
        return kernel

    def _report(self, until: int) -> None:
        done, total = self.short * sum(self.done), self.short * until * len(self.done)
        message = f"strength {self.point + 1} of {self.task.num_points}"
        self.task.progress({"stage": "blocks", "message": message, "draws_done": done, "draws_total": total})

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
        lp = np.empty((len(self.steps), self.wanted))
        rest = np.empty_like(lp)

        def one(c: int) -> tuple[np.ndarray, np.ndarray | None]:
            steps, self.steps[c] = self.steps[c], np.zeros((0, 0, 0))  # rows hold them now
            x = steps.swapaxes(0, 1).reshape(-1, steps.shape[2])[-self.wanted :]
            carried = None
            if self.carried is not None:
                carried = x[self.carried]
                for i, step in enumerate(x):  # one by one: all at once would not stay in the cache
                    rest[c, i] = target.rest(step[None]).sum()
            for i, step in enumerate(x):
                step += target.mean
                eta = structure.map @ step + numbers.offset
                lp[c, i] = log_prior(structure, numbers, step) + log_likelihood(numbers, eta)
            return self.to_rows(structure, numbers, x), carried

        rows, carried = zip(*run_all([partial(one, c) for c in range(len(self.steps))]), strict=True)
        out: dict[str, Any] = {"rows": np.stack(rows), "log_density": lp}
        if self.carried is not None:
            out["whitened"] = _whitened(target, np.concatenate(carried), rest, self.rngs[0])
        if self.streamed.histogram.size:
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

    def between(c: int) -> np.ndarray:
        rng, own, state, kernel = task.generator(208, point, c), [], chains.states[c], middle.twin()
        for number in range(60):
            kernel.sweep(state, number, rng)
            own.append(state.rest.sum(1))
        return np.stack(own[10:], 1)

    jobs = [partial(between, c) for c in range(len(chains.states))]
    half = np.concatenate([job() for job in jobs] if middle.native is None else run_all(jobs))
    mean2, error2 = float(half.mean()), _error_of_mean(half)
    corrected = (mean0 + 2 * mean2 + mean1) / 4 + (var0 - var1) / 48
    simpson = (mean0 + 4 * mean2 + mean1) / 6
    spread_error = (var0 * math.sqrt(2 / len(first)) + var1 * math.sqrt(2 / max(totals.size / 4, 4))) / 48
    sampling = math.sqrt((error0 / 4) ** 2 + (error2 / 2) ** 2 + (error1 / 4) ** 2 + spread_error**2)
    error = math.hypot(sampling, 0.5 * (corrected - simpson))
    return target.log_scale + corrected, error


def _error_of_mean(values: np.ndarray) -> float:
    """Of (chains, draws), by batch means."""
    size = max(1, values.shape[1] // 10)
    length = values.shape[1] // size * size
    batches = values[:, :length].reshape(len(values), -1, size).mean(2).ravel()
    return float(batches.std(ddof=1) / math.sqrt(len(batches)))
