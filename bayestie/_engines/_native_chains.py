"""Blocks of a long chain moved by compiled code.

What `_sparse_kernel` does in a dozen array operations, each through fresh memory, in one pass that stays in
the cache; the interpreter lock is released, so that chains on two threads take half the time of one.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bayestie._engines._affine_kernels import LOGISTIC, POISSON
from bayestie._engines._blocks import Partition
from bayestie._engines._chain_kernels import CHUNK, propose, remainders, settle
from bayestie._engines._sparse_target import Target
from bayestie._sparse_factor import BandCore

KINDS = {"logistic": LOGISTIC, "poisson": POISSON}


def native_moves(target: Target, partitions: Sequence[Partition]) -> "NativeMoves | None":
    """None where variables are no chains, an observation sees several, or the likelihood is another."""
    likelihood = _likelihood(target)
    chains = {id(partition): _chain(partition) for partition in partitions}
    if likelihood is None or not chains or None in chains.values():
        return None
    return NativeMoves(likelihood, chains, np.ascontiguousarray(target.means), target.numbers.variances)


def _likelihood(target: Target) -> Any:
    """Its kind, and eta, pull, half, weight and centre (n,) each: with an observation per variable remainders
    are x (pull + half x) - weight A(eta + x) - centre."""
    rest, parts = target.remainder, target.numbers.likelihoods
    if not (target.design.identity and len(parts) == 1 and isinstance(target.means, np.ndarray)):
        return None
    if (kind := KINDS.get(parts[0].cumulant.name)) is None:
        return None
    arrays = (rest.eta, rest.pull[0], rest.half, parts[0].weight, rest.at_centre)
    return kind, *(np.ascontiguousarray(np.broadcast_to(x, len(rest.eta)), dtype=float) for x in arrays)


def _chain(partition: Partition) -> Any:
    """L^T x = noise as x_i = scale_i noise_i - ratio_i x_i+1; what the free answer to the held, as a sparse
    matrix by rows; labels and number of the blocks."""
    factor, response = partition.factor, partition.response
    core = factor.core
    if not (factor.pattern.whole and isinstance(core, BandCore) and core.band == 1):
        return None
    if response is None and partition.coupling.nnz:
        return None
    size, scale = len(partition.label), 1.0 / core.banded[0]
    first, column, entries = np.zeros(size + 1, np.int64), np.zeros(0, np.int64), np.zeros(0)
    if response is not None:
        first, column = response.indptr.astype(np.int64), response.indices.astype(np.int64)
        entries = response.data
    label = np.ascontiguousarray(partition.label, dtype=np.int64)
    ratio = np.ascontiguousarray(core.banded[1] * scale)
    return scale, ratio, first, column, entries, label, partition.num_blocks


class NativeMoves:
    """Moves of chains at one point, with the memory that they work in: for one thread."""

    def __init__(self, likelihood: Any, chains: dict[int, Any], means: np.ndarray, variances: np.ndarray):
        self.likelihood, self.chains = likelihood, chains
        self.means, self.variances = means, variances
        self.noise = self.trial = self.fresh = np.empty((0, 0))
        self.work = np.empty((2, CHUNK))

    def twin(self) -> "NativeMoves":
        """The same for another thread."""
        return NativeMoves(self.likelihood, self.chains, self.means, self.variances)

    def _room(self, shape: tuple[int, ...]) -> None:
        if self.noise.shape != shape:
            self.noise, self.trial, self.fresh = (np.empty(shape) for _ in range(3))

    def move(
        self,
        step: np.ndarray,
        rest: np.ndarray,
        partition: Partition,
        inertia: float,
        temper: float,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """As `Kernel._blocks`, in place; how many of the chains moved each block."""
        self._room(step.shape)
        chain, batch, blocks = self.chains[id(partition)], len(step), partition.num_blocks
        rng.standard_normal(out=self.noise)
        gain, accepted = np.empty((batch, blocks + 1)), np.zeros(blocks)
        moves = (self.trial, self.fresh)
        propose(self.noise, step, rest, inertia, chain, self.likelihood, *moves, gain, self.work)
        with np.errstate(invalid="ignore", over="ignore"):
            accept = np.log(rng.uniform(size=gain.shape)) < temper * gain
        accept[:, blocks] = False
        refuse = np.log(rng.uniform(size=batch)) if len(self.variances) else np.full(batch, -np.inf)
        settle(step, rest, *moves, accept, refuse, chain[5], self.means, self.variances, accepted)
        return accepted

    def shifted(self, step: np.ndarray, by: np.ndarray, carry: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Steps moved along the directions, and their remainders: until the next move."""
        self._room(step.shape)
        np.matmul(by, carry, out=self.trial)
        self.trial += step
        remainders(self.trial, self.likelihood, self.fresh, self.work)
        return self.trial, self.fresh
