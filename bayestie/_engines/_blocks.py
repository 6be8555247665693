"""Partitions of variables into blocks that do not see one another, given the variables held still.

Of a chain: runs of copies between single copies that are held; of any graph: Voronoi cells about random
seeds without the nodes that touch another cell. Held sets change from partition to partition, so all move.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components, dijkstra

from bayestie._sparse_factor import Factor
from bayestie._sparse_gaussian import Gaussian
from bayestie._sparse_structure import Structure

_VARIANTS = 3


@dataclass
class Partition:
    """Free variables in blocks, with the Gaussian of the free given the held.

    label: block of each variable, num_blocks where it is held; row_label: of each observation, likewise.
    """

    free: np.ndarray
    label: np.ndarray
    row_label: np.ndarray
    num_blocks: int
    factor: Factor
    coupling: Any  # Q between free (rows) and held (columns)

    @classmethod
    def of(cls, structure: Structure, gaussian: Gaussian, label: np.ndarray, num_blocks: int) -> "Partition":
        """From the block of each variable, num_blocks where it is held."""
        free = label < num_blocks
        pattern = structure.pattern
        row, col = pattern.row, pattern.col
        cut = ~(free[row] & free[col])
        data = np.where(cut, np.where(row == col, 1.0, 0.0), gaussian.unpinned)
        across = np.flatnonzero(free[row] != free[col])
        inner = np.where(free[row[across]], row[across], col[across])
        outer = np.where(free[row[across]], col[across], row[across])
        coupling = sp.csr_array((gaussian.unpinned[across], (inner, outer)), shape=(structure.size,) * 2)
        design = structure.map
        row_label = np.full(design.shape[0], num_blocks)
        entry_row = np.repeat(np.arange(design.shape[0]), np.diff(design.indptr))
        own = label[design.indices]
        row_label[entry_row[own < num_blocks]] = own[own < num_blocks]
        return cls(free, label, row_label, num_blocks, pattern.factor(data), coupling)

    def __post_init__(self) -> None:
        self.held = np.flatnonzero(~self.free)
        self.all_free = not len(self.held)
        self.response = self._chain_response()
        self._row_labels: dict[int, np.ndarray] = {}

    def centre(self, step: np.ndarray) -> np.ndarray | None:
        """Mean of the free given the held, (batch, n), 0 where held; None where nothing is coupled."""
        if not self.coupling.nnz:
            return None
        if self.response is not None:
            return (self.response @ step.T).T
        return -self.factor.solve(np.asfortranarray(self.coupling @ step.T)).T

    def _chain_response(self) -> Any:
        """-Q_ff^-1 Q_fh of a chain: a free variable answers to the two held ones at its sides alone.

        Two solves give it whole, and it fades within a few correlation lengths.
        """
        if not self.coupling.nnz or not self.factor.pattern.whole or self.factor.pattern.band != 1:
            return None
        size, entries = len(self.free), self.coupling.tocoo()
        rows, cols, values = [], [], []
        for side in (-1, 1):
            own = entries.col - entries.row == side
            right = np.zeros(size)
            right[entries.row[own]] = -entries.data[own]
            answer = self.factor.solve(right)
            beside = np.full(self.num_blocks + 1, -1)
            beside[self.label[entries.row[own]]] = entries.col[own]
            kept = np.flatnonzero((np.abs(answer) > 1e-18) & self.free)
            kept = kept[beside[self.label[kept]] >= 0]
            rows.append(kept)
            cols.append(beside[self.label[kept]])
            values.append(answer[kept])
        places = np.concatenate(rows), np.concatenate(cols)
        return sp.csr_array((np.concatenate(values), places), shape=(size, size))

    def row_labels(self, batch: int) -> np.ndarray:
        """Block of each observation of each chain, numbered on from chain to chain, flat."""
        if batch not in self._row_labels:
            first = np.arange(batch)[:, None] * (self.num_blocks + 1)
            self._row_labels[batch] = (first + self.row_label).ravel()
        return self._row_labels[batch]


@dataclass
class Groups:
    """Variables by site, each with its graph, and the hubs that stand outside."""

    hubs: np.ndarray
    members: list[np.ndarray]
    graphs: list[Any]
    is_chain: list[bool]

    @classmethod
    def of(cls, structure: Structure, max_hubs: int = 32) -> "Groups":
        row, col = structure.pattern.row, structure.pattern.col
        size = structure.size
        degree = np.bincount(row, minlength=size) + np.bincount(col, minlength=size) - 2
        limits = np.append(structure.starts, size)
        alone = np.zeros(size, dtype=bool)
        for start, stop in itertools.pairwise(limits.tolist()):
            alone[start:stop] = stop - start <= 8
        busy = alone | (degree > max(64, 0.2 * size))
        hubs = np.flatnonzero(busy)
        if len(hubs) > max_hubs:
            hubs = hubs[np.argsort(-degree[hubs])[:max_hubs]]
        is_hub = np.zeros(size, dtype=bool)
        is_hub[hubs] = True
        members, graphs, chains = [], [], []
        for start, stop in itertools.pairwise(limits.tolist()):
            own = np.flatnonzero(~is_hub[start:stop]) + start
            if not len(own):
                continue
            place = np.full(size, -1)
            place[own] = np.arange(len(own))
            inside = (place[row] >= 0) & (place[col] >= 0) & (row != col)
            i, j = place[row[inside]], place[col[inside]]
            members.append(own)
            graphs.append(sp.csr_array((np.ones(2 * len(i)), (np.r_[i, j], np.r_[j, i])), (len(own),) * 2))
            chains.append(bool(len(i)) and int(np.abs(i - j).max()) == 1)
        return cls(hubs, members, graphs, chains)

    def labels(self, which: int, target: int, rng: np.random.Generator) -> list[tuple[np.ndarray, int]]:
        """Blocks of about ``target`` variables of one group, in several ways; num_blocks where held."""
        graph, count = self.graphs[which], len(self.members[which])
        number, component = connected_components(graph, directed=False)
        if int(np.bincount(component).max()) <= target:
            return [(component, number)]
        if self.is_chain[which]:
            place = np.arange(count)
            found = []
            for k in range(2):
                step = target + 1
                first = int(rng.integers(0, max(1, step // 4))) + k * step // 2
                held = (place - first) % step == 0
                label = np.cumsum(held)
                found.append((np.where(held, label[-1] + 1, label), int(label[-1]) + 1))
            return found
        return [self._cells(graph, count, target, rng) for _ in range(_VARIANTS)]

    @staticmethod
    def _cells(graph: Any, count: int, target: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        seeds = rng.choice(count, max(2, min(count, round(count / target))), replace=False)
        _, _, source = dijkstra(
            graph, unweighted=True, indices=seeds, min_only=True, return_predecessors=True
        )
        cell = np.full(count, len(seeds))
        place = np.zeros(count, dtype=int)
        place[seeds] = np.arange(len(seeds))
        reached = source >= 0
        cell[reached] = place[source[reached]]
        edges = graph.tocoo()
        held = np.zeros(count, dtype=bool)
        held[edges.row[cell[edges.row] < cell[edges.col]]] = True
        cell[~reached] = len(seeds)  # components without a seed are held this time
        return np.where(held, len(seeds), cell), len(seeds)


def partitions(
    structure: Structure, gaussian: Gaussian, groups: Groups, target: int, rng: np.random.Generator
) -> list[list[Partition]]:
    """Sweeps: each a list of partitions, one per group, that together move every variable but the held."""
    choices = []
    for which, members in enumerate(groups.members):
        own = []
        for label, num_blocks in groups.labels(which, target, rng):
            whole = np.full(structure.size, num_blocks)
            whole[members] = label
            own.append(Partition.of(structure, gaussian, whole, num_blocks))
        choices.append(own)
    length = max((len(c) for c in choices), default=0)
    return [[own[k % len(own)] for own in choices] for k in range(length)]
