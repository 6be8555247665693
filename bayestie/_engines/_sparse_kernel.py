"""Metropolis-Hastings on blocks given their boundaries, all blocks at once.

q is the Gaussian with the sparse precision Q. As pi(x) = q(x) exp(sum_i r_i(eta_i)), r_i what likelihood i
leaves beyond its quadratic, a block proposed from q given the variables held still is accepted with
exp(change of its own observations' r): the cost of a sweep is a triangular solve, and its acceptance does not
fall with the number of copies (Knorr-Held and Rue 2002, On block updating in Markov random field models for
disease mapping). Proposals may be autoregressive about q's conditional mean (Crank-Nicolson), which the same
ratio makes exact. Means of copies, whose prior no block sees alone, are a second acceptance (Liu 2001,
section 9.4.3, surrogate transitions); hubs, levels and fixed effects move with what responds to them.
"""

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg

from bayestie._engines._blocks import Groups, Partition, partitions
from bayestie._engines._sparse_target import Target

if TYPE_CHECKING:
    from bayestie._engines._native_chains import NativeMoves

_GOOD_ACCEPTANCE = 0.85
_FAIR_ACCEPTANCE = 0.6  # of blocks of up to
_LONG_BLOCK = 200
_POOR_BLOCK = 0.25
_CACHED = 100_000
_LONG = 5_000  # variables whose chains pay for the compiler


@dataclass
class State:
    """Chains side by side: x = mean + step (batch, n), their observations' remainders (batch, M)."""

    step: np.ndarray
    rest: np.ndarray


class Kernel:
    """Moves of chains at one point."""

    def __init__(self, target: Target, sweeps: list[list[Partition]], groups: Groups, temper: float = 1.0):
        self.target, self.sweeps, self.groups, self.temper = target, sweeps, groups, temper
        self.native = self._compiled()
        self.forget()
        self._directions()

    def _compiled(self) -> "NativeMoves | None":
        """Compiled moves, of long chains with an observation per variable."""
        if self.target.structure.size < _LONG:
            return None
        # Here, because the compiler takes half a second to import.
        from bayestie._engines._native_chains import native_moves

        return native_moves(self.target, [partition for sweep in self.sweeps for partition in sweep])

    def forget(self) -> None:
        """Acceptance is counted anew."""
        self.accepted = [[np.zeros(p.num_blocks) for p in sweep] for sweep in self.sweeps]
        self.tried = np.zeros(len(self.sweeps))

    def twin(self) -> "Kernel":
        """The same moves, for another thread: its acceptance is its own."""
        other = copy.copy(self)
        other.native = None if self.native is None else self.native.twin()
        other.forget()
        return other

    def count(self, other: "Kernel") -> None:
        """Add a twin's acceptance."""
        for ours, theirs in zip(self.accepted, other.accepted, strict=True):
            for own, more in zip(ours, theirs, strict=True):
                own += more
        self.tried += other.tried

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
        if self.native is not None:
            return self.native.move(state.step, state.rest, partition, inertia, self.temper, rng)
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
        if self.native is None:
            step = state.step + (then - now) @ self.carry
            rest = self.target.rest(step)
        else:
            step, rest = self.native.shifted(state.step, then - now, self.carry)
        gain = self.temper * (rest.sum(1) - state.rest.sum(1))
        accept = np.log(rng.uniform(size=len(gain))) < gain
        np.copyto(state.step, step, where=accept[:, None])
        np.copyto(state.rest, rest, where=accept[:, None])
        if not self.frozen:
            self.inertia = min(max(self.inertia + 0.04 * (0.5 - float(accept.mean())), 0.0), 0.999)

    def acceptance(self) -> np.ndarray:
        """Of each block of each partition."""
        rates = [
            a / max(tried, 1) for sweep, tried in zip(self.accepted, self.tried, strict=True) for a in sweep
        ]
        return np.concatenate(rates) if rates else np.ones(1)


def suitable_kernel(
    target: Target, groups: Groups, largest: int, rng: np.random.Generator
) -> tuple[Kernel, int]:
    """The largest blocks whose proposals are accepted well."""
    size = largest
    count = together(target.structure.size, 8)
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


def together(size: int, most: int) -> int:
    """Chains that are moved as one batch: their state stays in the cache."""
    return int(min(max(_CACHED // size, 1), most))
