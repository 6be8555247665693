"""Laplace with a sparse factor, for models in the coordinates of their copies.

Where the likelihoods are Gaussian given a few latents, draws are exact, or weighted by importance in those
few. Elsewhere chains are run: `bayestie._engines._sparse_chains`.
"""

import math
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from bayestie._copy_coordinates import NotSparse
from bayestie._engines._importance import NEARLY_CONSTANT, mean_error, needed_ess
from bayestie._engines._protocol import Draws, Interrupted, Task
from bayestie._engines._sparse_chains import run_chains
from bayestie._engines._sparse_hyper import NODES, HyperFit, fit_hyper, gather
from bayestie._engines._streamed import Summary, summarised, weighted
from bayestie._engines._whitened import Whitened, sparse_rows
from bayestie._errors import InferenceError
from bayestie._psis import good_k, psis
from bayestie._sparse_collect import Columns
from bayestie._sparse_factor import NotPositive, variances
from bayestie._sparse_joint import ScaledJoint, SparseJoint
from bayestie._sparse_mode import SparseFit, find_mode, log_likelihood, log_prior, shifted_mean
from bayestie._sparse_numbers import Numbers
from bayestie._sparse_structure import Structure

STORED_BYTES = 2_000_000_000  # of draws, over all points
_INDEPENDENT = (math.nan, math.nan, math.nan)
_BATCH = 8  # draws made at once
ENOUGH = 0.7  # effective draws of one, with which nodes are dense enough


@dataclass
class PointDraws:
    """What one point of the sweep gives: rows (chains, kept draws, width) and how good they are."""

    rows: np.ndarray
    log_density: np.ndarray
    certified: bool
    reason: str
    log_evidence: float
    error: float = 0.0
    exact: bool = False
    engine: str = "laplace"
    khat: float = -math.inf
    ess: float = math.inf
    quality: tuple[float, float, float] = _INDEPENDENT
    summary: Summary | None = None
    stats: dict[str, np.ndarray] = field(default_factory=dict)
    whitened: Whitened | None = None


def kept_draws(task: Task, width: int) -> int:
    """Draws per chain that are stored: fewer than asked where all would not fit comfortably."""
    room = STORED_BYTES // (8 * width * task.num_points * task.num_chains)
    return min(task.num_draws, max(10, room))


class SparseRun:
    """One sweep's work: shared columns, warm starts along the strengths, draws point by point."""

    def __init__(self, task: Task):
        assert task.sparse is not None
        self.task, self.density = task, task.sparse
        self.copies = task.sparse.copies
        self.columns = Columns(self.copies)
        self.kept = kept_draws(task, self.columns.width)
        self.starts: dict[int, np.ndarray] = {}  # id of a structure -> where its last mode was
        self.hyper_start = np.zeros(self.copies.num_hyper)
        self.hyper_spread: np.ndarray | None = None
        self.memory: dict[str, Any] = {}  # what chains learned at the strength before
        self.carried = sparse_rows(task.num_points, task.num_chains, self.kept, self.copies.num_x)

    # -- one point ---------------------------------------------------------------------------------------

    def mode(self, point: int, hyper: np.ndarray) -> SparseFit:
        structure, numbers = self.density.at(point, torch.from_numpy(hyper))
        fit = find_mode(structure, numbers, self.starts.get(id(structure)))
        self.starts[id(structure)] = fit.gaussian.mean
        return fit

    def point(self, point: int) -> PointDraws:
        if self.copies.num_hyper:
            return self._hyper(point)
        fit = self.mode(point, self.hyper_start)
        if not fit.converged:
            raise InferenceError(
                f"point {point} of the sweep",
                found="no mode after Newton's method with a sparse factor",
                expected="a mode",
                fix="Check the data and the strength; engine='svi' serves this size too.",
            )
        if fit.numbers.is_gaussian:
            return self._exact(point, fit)
        found = run_chains(self.task, point, fit, self.kept, self.carried, self.memory, self._rows)
        stream = found.pop("stream", None)
        if stream is not None:
            found["summary"] = self._streamed_summary(fit, stream.summary(), found["rows"])
        return PointDraws(**found)

    def _streamed_summary(self, fit: SparseFit, own: Summary, rows: np.ndarray) -> Summary:
        """Of reduced variables to rows; levels and h from the rows that are kept."""
        expand = fit.structure.expand
        flat = rows.reshape(-1, rows.shape[-1])[:, expand.shape[0] :]
        num = float(len(flat))
        kept = summarised(flat.mean(0), flat.std(0, ddof=1), None, np.array(num), np.array(num))

        def both(name: str, shift: np.ndarray | float = 0.0) -> np.ndarray:
            ours, theirs = getattr(own, name)[..., : expand.shape[1]], getattr(kept, name)
            return np.concatenate([(expand @ ours.T).T + shift, theirs], -1)

        shift = fit.numbers.shift
        return Summary(
            both("mean", shift), both("sd"), both("quantiles", shift),
            both("mcse_mean"), both("mcse_sd"), both("mcse_quantiles"),
        )  # fmt: skip

    def _rows(self, structure: Structure, numbers: Numbers, x: np.ndarray, hyper: np.ndarray | None = None):
        """Reduced variables (batch, n) -> rows (batch, width)."""
        if hyper is None:
            hyper = np.zeros((len(x), 0))
        full = self.density.full(structure, numbers, x)
        return self.columns.row(full, self.density.levels(structure, numbers, x), hyper)

    # -- exact -------------------------------------------------------------------------------------------

    def _exact(self, point: int, fit: SparseFit) -> PointDraws:
        task, gaussian = self.task, fit.gaussian
        total = task.num_chains * self.kept
        rng = task.generator(201, point)
        rows = np.empty((total, self.columns.width))
        lp = np.empty(total)
        chosen = np.zeros((task.num_chains, self.kept), dtype=bool)
        chosen[:, [] if self.carried is None else self.carried] = True
        carried = []
        for start in range(0, total, _BATCH):
            count = min(_BATCH, total - start)
            noise = rng.standard_normal((count, fit.structure.size))
            carried.append(noise[chosen.ravel()[start : start + count]])
            step, square = gaussian.draw(noise.T)
            lp[start : start + count] = fit.log_joint - 0.5 * square
            x = gaussian.mean + step.T
            rows[start : start + count] = self._rows(fit.structure, fit.numbers, x)
            if start == 0:
                self._check_exact(fit, x, lp[:count])
        reason = "the posterior is Gaussian to rounding: draws are exact"
        summary = None
        if self.kept < task.num_draws:
            reason += f"; {total} of {task.num_chains * task.num_draws} were made, as more would not fit"
            summary = self._exact_summary(fit, rows)
        beyond = np.full((task.num_chains, self.kept), fit.log_evidence)
        whitened = Whitened(gaussian, fit.log_evidence, None, np.concatenate(carried), beyond)
        return PointDraws(
            rows.reshape(task.num_chains, self.kept, -1),
            lp.reshape(task.num_chains, self.kept),
            True,
            reason,
            fit.log_evidence,
            exact=True,
            quality=(1.0, float(total), float(total))
            if self.kept < task.num_draws
            else (math.nan, math.nan, math.nan),
            summary=summary,
            whitened=None if self.carried is None else whitened,
        )

    @staticmethod
    def _check_exact(fit: SparseFit, x: np.ndarray, lp: np.ndarray) -> None:
        """The Gaussian's own density against the log joint at a few draws."""
        for row, value in list(zip(x, lp, strict=True))[:3]:
            eta = fit.structure.map @ row + fit.numbers.offset
            found = log_prior(fit.structure, fit.numbers, row) + log_likelihood(fit.numbers, eta)
            if abs(found - value) > 1e-7 * (1.0 + abs(value)):
                raise InferenceError(
                    "the sparse route",
                    found=f"a log joint {found - value:g} away from its Gaussian",
                    expected="rounding alone",
                    fix="Report this; engine='svi' serves this size too.",
                )

    def _exact_summary(self, fit: SparseFit, rows: np.ndarray) -> Summary:
        mean = self._rows(fit.structure, fit.numbers, fit.gaussian.mean[None])[0]
        spread = self._exact_sd(fit)
        found = rows.std(0, ddof=1)
        exact = np.full(len(mean), np.inf)
        if spread is None:
            return summarised(mean, found, None, exact, np.full(len(mean), float(len(rows))))
        sd = np.concatenate([spread, found[len(spread) :]])
        tail = np.where(np.arange(len(mean)) < len(spread), np.inf, float(len(rows)))
        return summarised(mean, sd, None, exact, tail)

    def _exact_sd(self, fit: SparseFit) -> np.ndarray | None:
        """Of the copies and Gaussian latents, where the selected inverse is cheap."""
        gaussian, structure = fit.gaussian, fit.structure
        found = variances(gaussian.factor)
        if found is None:
            return None
        if gaussian.response is not None:
            found = found - ((gaussian.response @ gaussian.inverse) * gaussian.response).sum(1)
        return np.sqrt(np.maximum(structure.expand @ found, 0.0))

    # -- exact given a few latents -----------------------------------------------------------------------

    def _hyper(self, point: int) -> PointDraws:
        def objective(hyper: np.ndarray) -> float:
            try:
                fit = self.mode(point, hyper)
            except (NotPositive, FloatingPointError):
                return -math.inf
            return fit.log_evidence

        first = self.mode(point, self.hyper_start)
        if not first.numbers.is_gaussian:
            raise InferenceError(
                "the sparse route",
                found=f"latents {list(self.copies.hyper)} outside the Gaussian part, and a likelihood "
                "that is not normal",
                expected="one or the other",
                fix="Fix or sweep these latents, or use engine='svi'.",
            )
        hyper_fit = fit_hyper(objective, self.hyper_start, self.hyper_spread)
        if hyper_fit.converged:
            self.hyper_start = hyper_fit.mode
            self.hyper_spread = np.sqrt(np.square(hyper_fit.factor).sum(1))
        wanted = self.task.num_chains * self.task.num_draws
        needed = needed_ess(self.task)
        pool = _Pool(self, point, hyper_fit)
        pool.grow(wanted)
        while pool.ess < needed and pool.khat < 0.8 and len(pool.log_weight) < 8 * wanted:
            pool.grow(wanted)
        return pool.draws(needed)


class _Pool:
    """Weighted joint draws of (x, h) at one point; rows are kept for the draws that resampling keeps."""

    def __init__(self, run: SparseRun, point: int, hyper_fit: HyperFit):
        self.run, self.point, self.hyper_fit = run, point, hyper_fit
        self.rows: list[np.ndarray] = []
        self.value = np.zeros(0)
        self.log_weight = np.zeros(0)
        self.rounds, self.most = 0, NODES[0]
        self.joint: SparseJoint | ScaledJoint | None = None
        fit = run.mode(point, hyper_fit.mode)
        joint = ScaledJoint.of(run.density, point, fit, hyper_fit.mode)
        joint = joint or SparseJoint.of(run.density, point, fit.structure)
        if joint is not None and self._agrees(joint, fit):
            self.joint = joint

    def grow(self, num: int) -> None:
        """Add ``num`` draws; the first also find out how many nodes it takes.

        Few do where h is known well: what nodes leave out is in the weights, and seen there.
        """
        rows, value, log_weight = self._draw(num)
        while not self.rows and self.most < NODES[-1] and _share(log_weight) < ENOUGH:
            self.most = NODES[NODES.index(self.most) + 1]
            rows, value, log_weight = self._draw(num)
        self.rows.append(rows)
        self.value = np.concatenate([self.value, value])
        self.log_weight = np.concatenate([self.log_weight, log_weight])
        smoothed, khat = psis(torch.from_numpy(self.log_weight)[None])
        self.smoothed, self.khat = smoothed[0], float(khat[0])
        self.ess = float(torch.exp(-torch.logsumexp(2.0 * self.smoothed, 0)))

    def _draw(self, num: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows, log joints and log weights."""
        run, task = self.run, self.run.task
        rng = task.generator(202, self.point, self.rounds)
        self.rounds += 1
        h, log_h = self.hyper_fit.propose(rng, num)
        nodes, label = gather(h, self.hyper_fit.factor, self.most, task.seed % 2**31)
        rows = np.empty((num, run.columns.width))
        value, log_weight = np.empty(num), np.empty(num)
        for g, node in enumerate(nodes):
            own = np.flatnonzero(label == g)
            fit = run.mode(self.point, node)
            slope = self._mean_slope(fit, node) if len(own) > 1 else np.zeros((fit.structure.size, len(node)))
            noise = rng.standard_normal((len(own), fit.structure.size)).T
            step, square = fit.gaussian.draw(noise)
            log_q = fit.gaussian.log_height - 0.5 * square
            x = fit.gaussian.mean[:, None] + slope @ (h[own] - node).T + step
            value[own] = self._log_joint(fit, x.T, h[own])
            log_weight[own] = value[own] - log_h[own] - log_q
            rows[own] = run._rows(fit.structure, fit.numbers, x.T, h[own])
        return rows, value, np.nan_to_num(log_weight, nan=-np.inf)

    def _agrees(self, joint: SparseJoint | ScaledJoint, fit: SparseFit) -> bool:
        """With the density read at the mode."""
        x, h = fit.gaussian.mean[None], self.hyper_fit.mode[None]
        expected = self._log_joint(fit, x, h)
        try:
            found = joint(x, self.run.density.full(fit.structure, fit.numbers, x), h)
        except (RuntimeError, ValueError, NotImplementedError, TypeError):
            return False  # what vmap cannot do, in whatever words: the density is read for every draw
        return bool(abs(found[0] - expected[0]) <= 1e-9 * (1.0 + abs(expected[0])))

    def _log_joint(self, fit: SparseFit, x: np.ndarray, h: np.ndarray) -> np.ndarray:
        """At reduced variables (batch, n) and h (batch, d), (batch,)."""
        run, point = self.run, self.point
        if self.joint is not None:
            return self.joint(x, run.density.full(fit.structure, fit.numbers, x), h)
        found = np.empty(len(x))
        for s, at in enumerate(x):
            structure, numbers = run.density.at(point, torch.from_numpy(h[s]))
            eta = structure.map @ at + numbers.offset
            found[s] = log_prior(structure, numbers, at) + log_likelihood(numbers, eta)
        return found

    def _mean_slope(self, fit: SparseFit, node: np.ndarray) -> np.ndarray:
        """d x_hat / d h at a node, by a Newton step from its mean at h a little beside it."""
        out = np.empty((fit.structure.size, len(node)))
        for i in range(len(node)):
            step = 0.1 * self.hyper_fit.factor[i, i] * np.eye(len(node))[i]
            beside = self.run.density.at(self.point, torch.from_numpy(node + step))
            moved = shifted_mean(*beside, fit.gaussian, fit.gaussian.mean)
            out[:, i] = (moved - fit.gaussian.mean) / step[i]
        return out

    def draws(self, needed: float) -> PointDraws:
        run, task = self.run, self.run.task
        total = task.num_chains * run.kept
        rng = task.generator(203, self.point)
        cumulative = np.cumsum(np.exp(self.smoothed.numpy()))
        row = np.searchsorted(cumulative / cumulative[-1], (np.arange(total) + rng.uniform()) / total)
        row = np.minimum(row, len(cumulative) - 1)[rng.permutation(total)]
        rows = np.concatenate(self.rows)[row]
        worth = total**2 / float(np.square(np.bincount(row)).sum())
        log_mean = float(torch.logsumexp(torch.from_numpy(self.log_weight), 0)) - math.log(
            len(self.log_weight)
        )
        relative = torch.from_numpy(np.exp(self.log_weight - log_mean))
        certified, reason = self._verdict(needed)
        return PointDraws(
            rows.reshape(task.num_chains, run.kept, -1),
            self.value[row].reshape(task.num_chains, run.kept),
            certified,
            reason,
            log_mean,
            float(mean_error(relative, self.khat)),
            khat=self.khat,
            ess=self.ess,
            quality=(1.0, worth, worth),
            summary=self._summary() if run.kept < task.num_draws else None,
        )

    def _summary(self) -> Summary:
        return weighted(np.concatenate(self.rows), self.smoothed.numpy(), self.ess)

    def _verdict(self, needed: float) -> tuple[bool, str]:
        names = ", ".join(self.run.copies.hyper)
        if not self.hyper_fit.converged:
            return False, f"no mode of the posterior of {names} was found"
        spread = float(self.log_weight.max() - self.log_weight.min())
        given = f"Gaussian given {names}; importance weights"
        if spread < NEARLY_CONSTANT:
            return True, f"{given} are within {math.expm1(spread):.1%} of one another"
        threshold = good_k(len(self.log_weight))
        if self.khat >= threshold:
            return False, f"{given} have khat {self.khat:.2f}, not below {threshold:.2f}"
        if self.ess < needed:
            return False, f"{given} have an effective sample size of {self.ess:.0f}, below {needed:.0f}"
        return True, f"{given} have khat {self.khat:.2f} and effective sample size {self.ess:.0f}"


def _share(log_weight: np.ndarray) -> float:
    """Effective draws of one."""
    weight = np.exp(log_weight - log_weight.max())
    return float(weight.sum() ** 2 / np.square(weight).sum() / len(weight))


def run_sparse(task: Task) -> Draws:
    """Draws at every point in the coordinates of the copies, one point after another.

    Raises:
        InferenceError: a point that the sparse route cannot serve after all.
    """
    task.progress({"stage": "laplace", "message": "sparse factor, copies as coordinates"})
    run = SparseRun(task)
    done: list[PointDraws] = []
    seconds: list[float] = []
    try:
        for point in range(task.num_points):
            begin = time.perf_counter()
            try:
                done.append(run.point(point))
            except (NotSparse, NotPositive) as error:
                raise InferenceError(
                    f"point {point} of the sweep",
                    found=str(error) or "a precision that is not positive definite",
                    expected="a model that the sparse route serves at every strength",
                    fix="Leave that strength out, or use engine='svi'.",
                ) from error
            seconds.append(time.perf_counter() - begin)
            task.progress(
                {"stage": "laplace", "strengths_done": len(done), "strengths_total": task.num_points}
            )
    except KeyboardInterrupt as interruption:
        raise Interrupted(_draws(task, done, seconds)) from interruption
    return _draws(task, done, seconds)


def _draws(task: Task, done: list[PointDraws], seconds: list[float]) -> Draws:
    def column(name: str) -> torch.Tensor:
        return torch.tensor([getattr(d, name) for d in done], dtype=torch.float64)

    summaries = {}
    if done and all(d.summary is not None for d in done):
        found = [d.summary.variables() for d in done if d.summary is not None]
        summaries = {name: torch.from_numpy(np.stack([f[name] for f in found])) for name in found[0]}
    whitened = [d.whitened for d in done if d.whitened is not None]
    names = set().union(*(d.stats for d in done)) if done else set()
    empty = np.zeros(done[0].log_density.shape) if done else np.zeros(0)
    return Draws(
        points=torch.arange(len(done)),
        position=_stack([d.rows for d in done]),
        log_density=_stack([d.log_density for d in done]),
        engine=[d.engine for d in done],
        certified=[d.certified for d in done],
        reason=[d.reason for d in done],
        exact=[d.exact for d in done],
        khat=column("khat"),
        ess_weights=column("ess"),
        log_evidence=column("log_evidence"),
        log_evidence_error=column("error"),
        seconds=torch.tensor(seconds[: len(done)], dtype=torch.float64),
        quality=torch.tensor([d.quality for d in done], dtype=torch.float64).reshape(-1, 3),
        stats={n: _stack([d.stats.get(n, empty) for d in done]) for n in sorted(names)},
        summary=summaries,
        whitened=whitened if len(whitened) == len(done) else [],
    )


def _stack(arrays: list[np.ndarray]) -> torch.Tensor:
    if len(arrays) == 1:  # no second copy of what may be two gigabytes
        return torch.from_numpy(arrays[0])[None]
    return torch.from_numpy(np.stack(arrays)) if arrays else torch.zeros(0)
