"""Tie: a weighted graph over copies, its spectrum and its fast maps."""

import math
import operator
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from bayestie._components import (
    Complete,
    Component,
    Frozen,
    Graph,
    Lattice,
    Ring,
    Star,
    Walk,
    outside_transforms,
)
from bayestie._errors import ShapeError, TieError

# Up to here one matrix product beats the transforms; beyond, no K x K matrix is formed for structured kinds.
_DENSE_COPIES = 256
_DESCRIBED_EDGES = 20_000


@dataclass(frozen=True)
class _Block:
    """All components that are the same graph, as one batch."""

    component: Component
    count: int


@dataclass(frozen=True, repr=False)
class Tie(Frozen):
    """A weighted graph over K copies: an edge says that two copies should be close.

    L = sum_e w_e (e_i - e_j)(e_i - e_j)^T has eigenpairs (l_j, u_j); the prior of theta is Gaussian along them.
    Build one with a constructor: `exchangeable`, `complete`, `chain`, `ring`, `grid`, `tree`, `edges`, `groups`,
    `disjoint`. Connected components are numbered by their first copy, and each has a level of its own.
    Every constructor takes ``scaled``: multiply L, per component, by the geometric mean of diag L^+ (single copies
    skipped), so that the geometric mean of the deviations' prior variances at sigma = 1 is 1 and one sigma means
    the same on every graph. Edge weights, energies and resistances below are those of the scaled L.

    Ties are immutable, hashable, picklable and equal when built alike.

    Example:
        >>> tie = Tie.chain(4)
        >>> tie.num_copies, tie.num_components, tie.rank
        (4, 1, 3)
        >>> round(float((tie.edge_weights * tie.effective_resistances()).sum()), 12)  # K - c
        3.0

    Reference: Sorbye and Rue (2014), Scaling intrinsic Gaussian Markov random field priors, Spatial Statistics 8.
    """

    kind: str
    shape: tuple[int, ...]
    components: tuple[Component, ...]
    # Copy at each place of the components laid end to end; None where that is 0 .. K - 1.
    order: tuple[int, ...] | None = None

    # -- constructors ---------------------------------------------------------------------------------------------

    @staticmethod
    def exchangeable(num_copies: int, *, scaled: bool = False) -> "Tie":
        """K copies around a hub: theta_k = level + sigma z_k; the level is the hub, not the mean of the copies.

        Args:
            num_copies: K >= 1.
            scaled: changes nothing here, deviations have variance sigma^2 already.

        Raises:
            TieError: K < 1.
        """
        size = _count(num_copies, "num_copies")
        return Tie("exchangeable", (size,), (Star(scaled, size),))

    @staticmethod
    def complete(num_copies: int, *, scaled: bool = False) -> "Tie":
        """Every pair of K copies tied, deviations of variance sigma^2 / K along each contrast.

        With a flat level, theta_k ~ N(mu, tau) is this tie at sigma = tau sqrt(K).

        Args:
            num_copies: K >= 1.
            scaled: see `Tie`.

        Raises:
            TieError: K < 1.
        """
        size = _count(num_copies, "num_copies")
        return Tie("complete", (size,), (Complete(scaled, size),))

    @staticmethod
    def chain(num_copies: int, anchored: bool = False, *, scaled: bool = False) -> "Tie":
        """Neighbours in a sequence of K copies tied: a random walk with steps of sd sigma.

        Args:
            num_copies: K >= 1.
            anchored: the level is the first copy (the walk starts at the base) instead of the mean; form `level` only.
            scaled: see `Tie`; an anchored chain uses the factor of the chain, so steps agree between the two.

        Raises:
            TieError: K < 1.
        """
        size = _count(num_copies, "num_copies")
        part = Walk(scaled, size) if anchored else Lattice(scaled, (size,))
        return Tie("anchored_chain" if anchored else "chain", (size,), (part,))

    @staticmethod
    def ring(num_copies: int, *, scaled: bool = False) -> "Tie":
        """A chain of K copies closed into a cycle; with one or two copies, the chain itself.

        Args:
            num_copies: K >= 1.
            scaled: see `Tie`.

        Raises:
            TieError: K < 1.
        """
        size = _count(num_copies, "num_copies")
        part = Ring(scaled, size) if size > 2 else Lattice(scaled, (size,))
        return Tie("ring", (size,), (part,))

    @staticmethod
    def grid(*shape: int, scaled: bool = False) -> "Tie":
        """Neighbours along every axis of a grid tied; copies are numbered row-major.

        Args:
            *shape: length of each axis, >= 1.
            scaled: see `Tie`.

        Raises:
            TieError: no axis, or a length < 1.

        Example:
            >>> Tie.grid(2, 3).edge_index.T.tolist()
            [[0, 3], [1, 4], [2, 5], [0, 1], [1, 2], [3, 4], [4, 5]]
        """
        if not shape:
            raise TieError(
                "shape", found="no axis", expected="one length per axis", fix="Write Tie.grid(rows, columns)."
            )
        axes = tuple(_count(n, "shape") for n in shape)
        return Tie("grid", axes, (Lattice(scaled, axes),))

    @staticmethod
    def tree(parents: Sequence[int] | Tensor | np.ndarray, *, scaled: bool = False) -> "Tie":
        """Each node tied to its parent.

        Args:
            parents: parent index of each of the K nodes, -1 for a root; several roots make several components.
            scaled: see `Tie`.

        Raises:
            TieError: empty, an index outside -1 .. K - 1, or a cycle.
        """
        array = _integers(parents, "parents", 1)
        size = _count(len(array), "parents")
        for node, parent in enumerate(array.tolist()):
            if not -1 <= parent < size or parent == node:
                raise TieError(
                    f"parents[{node}]",
                    found=str(parent),
                    expected=f"another node in 0 .. {size - 1}, or -1 for a root",
                    fix="Number the nodes from 0 and mark every root with -1.",
                )
        children = np.flatnonzero(array >= 0)
        edges = np.stack([array[children], children], -1)
        num_roots = size - len(children)
        if _component_labels(size, edges)[0] != num_roots:
            raise TieError(
                "parents",
                found="a cycle",
                expected="a path from every node to a root",
                fix="Use Tie.edges for a graph with cycles.",
            )
        return _from_graph("tree", size, edges, np.ones(len(edges)), scaled)

    @staticmethod
    def edges(
        num_copies: int,
        edges: Iterable[Sequence[int]] | Tensor | np.ndarray,
        weights: Iterable[float] | Tensor | np.ndarray | None = None,
        *,
        scaled: bool = False,
    ) -> "Tie":
        """Any undirected graph; it may be disconnected.

        Args:
            num_copies: K >= 1.
            edges: pairs of 0-based copies, shape (num_edges, 2), each pair once and in either direction.
            weights: w_e > 0, one per edge; 1 where left out. Its unit is that of 1 / sigma^2 times theta^2.
            scaled: see `Tie`.

        Raises:
            TieError: an index out of range, a self-loop, a pair twice, a weight that is not positive and finite.

        Example:
            >>> Tie.edges(4, [(0, 1), (1, 2)]).labels.tolist()
            [0, 0, 0, 1]
        """
        size = _count(num_copies, "num_copies")
        pairs = _integers(edges, "edges", 2)
        if weights is None:
            values = np.ones(len(pairs))
        else:
            values = np.asarray(
                weights.tolist() if isinstance(weights, Tensor) else list(weights), dtype=np.float64
            )
        _check_edges(size, pairs, values)
        return _from_graph("edges", size, pairs, values, scaled)

    @staticmethod
    def groups(
        labels: Iterable[Hashable] | Tensor | np.ndarray,
        within: Callable[[int], "Tie"] | None = None,
        *,
        scaled: bool = False,
    ) -> "Tie":
        """A tie of one kind inside each label, a level each.

        Args:
            labels: the group of each copy, any hashables, a tensor or an array. Groups are numbered in order of first
                appearance; `labels` of the result gives the number of each copy.
            within: number of copies in a group -> tie of that group; `Tie.exchangeable` where left out.
            scaled: see `Tie`; or set it in `within`.

        Raises:
            TieError: no label, a missing label (None or NaN), a category without copies, or a `within` of another size.

        Example:
            >>> tie = Tie.groups(["oslo", "rome", "oslo"])
            >>> tie.num_components, tie.labels.tolist()
            (2, [0, 1, 0])
        """
        _check_categories(labels)
        groups: dict[Hashable, list[int]] = {}
        for copy, label in enumerate(labels.tolist() if isinstance(labels, (Tensor, np.ndarray)) else labels):
            if label is None or label != label:
                raise TieError(
                    f"labels[{copy}]",
                    found=repr(label),
                    expected="the group of the copy",
                    fix="Give a copy without a group a label of its own.",
                )
            groups.setdefault(label, []).append(copy)
        within = Tie.exchangeable if within is None else within
        made: dict[int, Tie] = {}
        pieces = []
        for label, copies in groups.items():
            size = len(copies)
            if size not in made:
                made[size] = within(size)
            tie = made[size]
            if tie.num_copies != size:
                raise TieError(
                    f"within({size}), group {label!r}",
                    found=f"a tie of {tie.num_copies} copies",
                    expected=f"{size} copies",
                    fix="Return a tie over as many copies as the argument says.",
                )
            pieces.append((tie, np.asarray(copies)))
        return _assemble("groups", pieces, scaled)

    @staticmethod
    def disjoint(*ties: "Tie", scaled: bool = False) -> "Tie":
        """Several ties side by side, nothing tied between them; copies are numbered tie after tie.

        Args:
            *ties: at least one; kinds may be mixed.
            scaled: scale every component; where False, each tie keeps its own setting.

        Raises:
            TieError: no tie.
        """
        starts = np.cumsum([0] + [tie.num_copies for tie in ties])
        pieces = [
            (tie, np.arange(tie.num_copies) + start) for tie, start in zip(ties, starts[:-1], strict=True)
        ]
        return _assemble("disjoint", pieces, scaled)

    # -- size -----------------------------------------------------------------------------------------------------

    @cached_property
    def num_copies(self) -> int:
        """K."""
        return sum(part.num_copies for part in self.components)

    @property
    def num_components(self) -> int:
        """c, the number of connected components, each with a level."""
        return len(self.components)

    @cached_property
    def rank(self) -> int:
        """r, the number of coefficients z per event element: K - c, and K for `exchangeable`."""
        return sum(part.rank for part in self.components)

    @cached_property
    def num_edges(self) -> int:
        """Number of edges, without listing them."""
        return sum(part.num_edges for part in self.components)

    @property
    def scaled(self) -> bool:
        """Whether every component is scaled."""
        return all(part.scaled for part in self.components)

    @property
    def anchored(self) -> bool:
        """Whether some component has its level at its first copy."""
        return any(part.anchored for part in self.components)

    @cached_property
    def has_hub(self) -> bool:
        """Whether some component is exchangeable, its level a node of its own."""
        return any(part.hub for part in self.components)

    # -- layout ---------------------------------------------------------------------------------------------------

    @cached_property
    def labels(self) -> Tensor:
        """Component of each copy, (K,)."""
        with outside_transforms():
            sizes = torch.tensor([part.num_copies for part in self.components], device="cpu")
            laid = torch.arange(self.num_components, device="cpu").repeat_interleave(sizes)
            return laid if self.order is None else laid[self._place]

    @cached_property
    def component_sizes(self) -> Tensor:
        """Number of copies of each component, (c,)."""
        with outside_transforms():
            return torch.tensor([part.num_copies for part in self.components], device="cpu")

    @cached_property
    def _copies(self) -> tuple[Tensor, ...]:
        """Copies of each component, in the component's own order."""
        with outside_transforms():
            laid = range(self.num_copies) if self.order is None else self.order
            return torch.tensor(laid, device="cpu").split([part.num_copies for part in self.components])

    @cached_property
    def first_copies(self) -> Tensor:
        """First copy of each component, (c,); the level of an anchored one."""
        with outside_transforms():
            return torch.stack([copies[0] for copies in self._copies])

    @cached_property
    def hub_mask(self) -> Tensor:
        """Whether each component is exchangeable, (c,)."""
        with outside_transforms():
            return torch.tensor([part.hub for part in self.components], device="cpu")

    @cached_property
    def anchored_mask(self) -> Tensor:
        """Whether each component is anchored, (c,)."""
        with outside_transforms():
            return torch.tensor([part.anchored for part in self.components], device="cpu")

    @cached_property
    def contrast_shares(self) -> Tensor:
        """Contrasts per coefficient once hubs are integrated out, (r,): (K_c - 1) / K_c where exchangeable, else 1."""
        with outside_transforms():
            shares = [1 - part.hub / part.num_copies for part in self.components]
            return torch.tensor(shares, dtype=torch.float64, device="cpu")[self.coefficient_labels]

    @cached_property
    def _place(self) -> Tensor:
        """Inverse of `order`: where each copy lies when components are laid end to end."""
        order = torch.tensor(self.order, device="cpu")
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device="cpu")
        return place

    @cached_property
    def _hubs_only(self) -> bool:
        return all(part.hub for part in self.components)

    @cached_property
    def _blocks(self) -> tuple[_Block, ...]:
        """Equal components side by side, and the coefficients in the same order."""
        counts: dict[Component, int] = {}
        for part in self.components:
            counts[part] = counts.get(part, 0) + 1
        return tuple(_Block(part, count) for part, count in counts.items())

    @cached_property
    def _block_order(self) -> Tensor | None:
        """Copy at each place of the blocks laid end to end; None where that is 0 .. K - 1."""
        with outside_transforms():
            copies: dict[Component, list[Tensor]] = {}
            for part, own in zip(self.components, self._copies, strict=True):
                copies.setdefault(part, []).append(own)
            order = torch.cat([own for same in copies.values() for own in same])
            return None if bool((order == torch.arange(len(order), device="cpu")).all()) else order

    def _inverse_block_order(self) -> Tensor:
        assert self._block_order is not None
        return torch.argsort(self._block_order)

    @cached_property
    def coefficient_labels(self) -> Tensor:
        """Component of each coefficient, (r,)."""
        if self._hubs_only:
            return self.labels
        with outside_transforms():
            numbers: dict[Component, list[int]] = {}
            for number, part in enumerate(self.components):
                numbers.setdefault(part, []).append(number)
            laid = [
                torch.tensor(same, device="cpu").repeat_interleave(part.rank)
                for part, same in numbers.items()
            ]
            return torch.cat(laid)

    # -- spectrum -------------------------------------------------------------------------------------------------

    @cached_property
    def scale_factor(self) -> Tensor:
        """What multiplies L, (c,): 1 where not scaled. The raw strength is sigma / sqrt(scale_factor)."""
        with outside_transforms():
            return torch.tensor(
                [self._block_of(part).scale_factor for part in self.components],
                dtype=torch.float64,
                device="cpu",
            )

    @cached_property
    def typical_variance(self) -> Tensor:
        """Geometric mean of diag L^+ before scaling, (c,), 1 for a single copy.

        sigma sqrt(typical_variance) is the scaled strength of an unscaled tie.
        """
        with outside_transforms():
            values = [self._block_of(part).typical_variance for part in self.components]
            return torch.tensor(values, dtype=torch.float64, device="cpu")

    def _block_of(self, part: Component) -> Component:
        # Equal components share one object's cached spectrum.
        return self._representatives[part]

    @cached_property
    def _representatives(self) -> dict[Component, Component]:
        return {block.component: block.component for block in self._blocks}

    @cached_property
    def eigenvalues(self) -> Tensor:
        """Eigenvalue l_j > 0 of each coefficient, (r,) in float64; the prior variance along it is sigma^2 / l_j.

        Ones for `exchangeable`; for an anchored chain the weight of each step.
        """
        with outside_transforms():
            if self._hubs_only:
                return torch.ones(self.rank, dtype=torch.float64, device="cpu")
            parts = [
                (block.component.raw_eigenvalues() * block.component.scale_factor).repeat(block.count)
                for block in self._blocks
            ]
            return torch.cat(parts)

    @cached_property
    def log_pseudo_determinant(self) -> float:
        """log |L|_+, the sum of the logarithms of the eigenvalues."""
        with outside_transforms():
            return float(self.eigenvalues.log().sum())

    def synthesize(self, coefficients: Tensor) -> Tensor:
        """x = U c: coefficients along the eigenvectors to values on the copies.

        Args:
            coefficients: (..., r).

        Returns:
            (..., K). The identity for `exchangeable`; for an anchored chain, running sums from 0.
        """
        if self._hubs_only:
            return coefficients
        if self.num_copies <= _DENSE_COPIES:
            return coefficients @ self._dense(coefficients).mT
        return self._synthesize_by_transforms(coefficients)

    def analyze(self, x: Tensor) -> Tensor:
        """c = U^T x, the inverse of `synthesize` on deviations.

        Args:
            x: (..., K).

        Returns:
            (..., r). The identity for `exchangeable`; for an anchored chain, the steps.
        """
        if self._hubs_only:
            return x
        if self.num_copies <= _DENSE_COPIES:
            return x @ self.cast("analysis", self._analysis, dtype=x.dtype, device=x.device).mT
        return self._analyze_by_transforms(x)

    def _dense(self, like: Tensor) -> Tensor:
        return self.cast("synthesis", self._synthesis, dtype=like.dtype, device=like.device)

    def _synthesis(self) -> Tensor:
        return self._synthesize_by_transforms(
            torch.eye(self.rank, dtype=torch.float64, device="cpu")
        ).mT.contiguous()

    def _analysis(self) -> Tensor:
        return self._analyze_by_transforms(
            torch.eye(self.num_copies, dtype=torch.float64, device="cpu")
        ).mT.contiguous()

    def _synthesize_by_transforms(self, coefficients: Tensor) -> Tensor:
        return self._per_block(lambda part, own: part.synthesize(own), coefficients)

    def _analyze_by_transforms(self, x: Tensor) -> Tensor:
        pieces = [part.analyze(own).flatten(-2) for part, own in self._in_blocks(x)]
        return torch.cat(pieces, -1)

    def diagonal(self, v: Tensor) -> Tensor:
        """Variance of each copy's deviation, diag(U diag(v) U^T), from variances v of the coefficients.

        Args:
            v: (..., r), equal where eigenvalues of a component are equal.

        Returns:
            (..., K).
        """
        return v if self._hubs_only else self._per_block(lambda part, own: part.diagonal(own), v)

    def _per_block(self, apply: Callable[[Component, Tensor], Tensor], coefficients: Tensor) -> Tensor:
        """(..., r) -> (..., K), each block of coefficients by its own component."""
        sizes = [block.count * block.component.rank for block in self._blocks]
        pieces = [
            apply(block.component, own.unflatten(-1, (block.count, block.component.rank))).flatten(-2)
            if block.component.rank
            else own.new_zeros(*own.shape[:-1], block.count)
            for block, own in zip(self._blocks, coefficients.split(sizes, -1), strict=True)
        ]
        laid = torch.cat(pieces, -1)
        if self._block_order is None:
            return laid
        place = self.cast("place", self._inverse_block_order, dtype=torch.int64, device=laid.device)
        return laid.index_select(-1, place)

    def _in_blocks(self, x: Tensor) -> list[tuple[Component, Tensor]]:
        """(..., K) -> per block (..., count, copies of the component)."""
        order = self._block_order
        if order is not None:
            x = x.index_select(-1, self.cast("order", lambda: order, dtype=torch.int64, device=x.device))
        sizes = [block.count * block.component.num_copies for block in self._blocks]
        return [
            (block.component, own.unflatten(-1, (block.count, block.component.num_copies)))
            for block, own in zip(self._blocks, x.split(sizes, -1), strict=True)
        ]

    # -- edges ----------------------------------------------------------------------------------------------------

    @cached_property
    def edge_index(self) -> Tensor:
        """Both ends of every edge, (2, num_edges); the hub of exchangeable component j is node K + j."""
        with outside_transforms():
            found = []
            for number, (part, copies) in enumerate(zip(self.components, self._copies, strict=True)):
                nodes = torch.cat([copies, torch.tensor([self.num_copies + number], device="cpu")])
                found.append(nodes[part.edges()])
            return torch.cat(found, -1)

    @cached_property
    def edge_weights(self) -> Tensor:
        """Weight w_e of every edge after scaling, (num_edges,) in float64."""
        with outside_transforms():
            return torch.cat([self._block_of(part).weights_of_edges() for part in self.components])

    def effective_resistances(self) -> Tensor:
        """R_e = (e_i - e_j)^T L^+ (e_i - e_j) of every edge after scaling, (num_edges,) in float64.

        sigma sqrt(R_e) is the prior sd of the difference across the edge; sum_e w_e R_e = K - c
        (K for `exchangeable`, whose hubs are nodes too).
        """
        with outside_transforms():
            once = {
                block.component: block.component.raw_resistances() / block.component.scale_factor
                for block in self._blocks
            }
            return torch.cat([once[part] for part in self.components])

    def energy(self, theta: Tensor, level: Tensor | None = None, *, event_dim: int = 0) -> Tensor:
        """q = sum_e w_e |theta_i - theta_j|^2 per event element; the prior is exp(-q / (2 sigma^2)).

        Args:
            theta: (..., K, *E).
            level: (..., *E), or (..., c, *E) for several components; needed for exchangeable components only.
            event_dim: number of dims of E.

        Returns:
            (..., *E), exactly 0 where all copies of every component are equal.

        Raises:
            ShapeError: theta does not have K copies, or the level is missing.
        """
        if theta.dim() <= event_dim or theta.shape[-1 - event_dim] != self.num_copies:
            raise ShapeError(
                "theta",
                found=f"shape {tuple(theta.shape)}",
                expected=f"{self.num_copies} copies at dim {-1 - event_dim}",
                fix="Give event_dim, the number of dims right of the copies.",
            )
        if self.has_hub and level is None:
            raise ShapeError(
                "level",
                found="None",
                expected="the hubs of the exchangeable components",
                fix="Pass the level that the copies deviate from.",
            )
        x = theta.movedim(-1 - event_dim, -1)
        hubs = None
        if self.has_hub and level is not None:
            hubs = level[..., None] if self.num_components == 1 else level.movedim(-1 - event_dim, -1)
        total = torch.zeros_like(x[..., 0])
        for number, (part, own) in enumerate(self._in_blocks(x)):
            own_hubs = (
                None if hubs is None else hubs.index_select(-1, self._components_of_block(number, x.device))
            )
            total = total + part.energy(own, own_hubs).sum(-1)
        return total

    def _components_of_block(self, number: int, device: torch.device) -> Tensor:
        part = self._blocks[number].component

        def numbers() -> Tensor:
            return torch.tensor([n for n, other in enumerate(self.components) if other == part], device="cpu")

        return self.cast(f"components of block {number}", numbers, dtype=torch.int64, device=device)

    # -- words ----------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What results record about the tie, in plain JSON types; edges where there are at most 20,000."""
        described: dict[str, Any] = {
            "kind": self.kind,
            "shape": list(self.shape),
            "num_copies": self.num_copies,
            "num_components": self.num_components,
            "rank": self.rank,
            "num_edges": self.num_edges,
            "scaled": self.scaled,
            "scale_factor": self.scale_factor.tolist(),
            "typical_variance": self.typical_variance.tolist(),
        }
        if self.num_edges <= _DESCRIBED_EDGES:
            described["edges"] = self.edge_index.T.tolist()
            described["edge_weights"] = self.edge_weights.tolist()
        return described

    def __repr__(self) -> str:
        size = "x".join(map(str, self.shape))
        apart = f", {self.num_components} components" if self.num_components > 1 else ""
        return f"Tie<{self.kind} {size}{apart}{', scaled' if self.scaled else ''}>"


def _count(value: Any, what: str) -> int:
    try:
        found = operator.index(value)
    except TypeError:
        found = 0
    if isinstance(value, bool) or found < 1:
        raise TieError(
            what, found=repr(value), expected="an integer >= 1", fix="A tie needs at least one copy."
        )
    return found


def _integers(values: Any, what: str, ndim: int) -> np.ndarray:
    rows = (
        values.tolist()
        if isinstance(values, Tensor)
        else values
        if isinstance(values, np.ndarray)
        else list(values)
    )
    try:
        array = np.asarray(rows)
    except ValueError:
        array = np.asarray(0.5)
    if array.size == 0:
        return np.zeros((0, 2) if ndim == 2 else 0, dtype=np.int64)
    if array.ndim != ndim or array.dtype.kind not in "iu" or (ndim == 2 and array.shape[1] != 2):
        raise TieError(
            what,
            found=f"shape {array.shape} of {array.dtype}",
            expected="integers of shape (num_edges, 2)" if ndim == 2 else "integers of shape (K,)",
            fix="Give 0-based copy numbers.",
        )
    return array.astype(np.int64)


def _check_edges(size: int, pairs: np.ndarray, weights: np.ndarray) -> None:
    if weights.shape != (len(pairs),):
        raise TieError(
            "weights",
            found=f"shape {weights.shape}",
            expected=f"one per edge, ({len(pairs)},)",
            fix="Give a weight per edge, or none for weights of 1.",
        )
    seen: set[tuple[int, int]] = set()
    for number, ((i, j), weight) in enumerate(zip(pairs.tolist(), weights.tolist(), strict=True)):
        where = f"edges[{number}]"
        if not (0 <= i < size and 0 <= j < size):
            raise TieError(
                where, found=f"({i}, {j})", expected=f"copies in 0 .. {size - 1}", fix="Number copies from 0."
            )
        if i == j:
            raise TieError(
                where,
                found=f"the self-loop ({i}, {j})",
                expected="two copies",
                fix="Leave it out: it ties nothing.",
            )
        if (min(i, j), max(i, j)) in seen:
            raise TieError(
                where,
                found=f"({i}, {j}) again",
                expected="each pair once, in either direction",
                fix="Add its weight to the edge that is already there.",
            )
        if not (weight > 0 and math.isfinite(weight)):
            raise TieError(
                f"weights[{number}]",
                found=str(weight),
                expected="a positive, finite number",
                fix="Leave an edge of weight 0 out.",
            )
        seen.add((min(i, j), max(i, j)))


def _check_categories(labels: Any) -> None:
    """A pandas categorical may hold a category that no copy has."""
    categorical = getattr(labels, "cat", labels)
    categories = getattr(categorical, "categories", None)
    if categories is None:
        return
    empty = [c for c in categories.tolist() if c not in set(labels.tolist())]
    if empty:
        raise TieError(
            "labels",
            found=f"empty group {empty[0]!r}",
            expected="at least one copy in every category",
            fix="Drop it with remove_unused_categories().",
        )


def _component_labels(size: int, pairs: np.ndarray) -> tuple[int, np.ndarray]:
    adjacency = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(size, size))
    return connected_components(adjacency, directed=False)


def _from_graph(kind: str, size: int, pairs: np.ndarray, weights: np.ndarray, scaled: bool) -> Tie:
    """Split a graph into its connected components."""
    num, labels = _component_labels(size, pairs)
    by_component = np.argsort(labels, kind="stable")
    copies = np.split(by_component, np.cumsum(np.bincount(labels, minlength=num))[:-1])
    local = np.empty(size, dtype=np.int64)
    for own in copies:
        local[own] = np.arange(len(own))
    own_edges: list[list[int]] = [[] for _ in range(num)]
    for number, (i, _) in enumerate(pairs.tolist()):
        own_edges[labels[i]].append(number)
    parts = []
    for own, numbers in zip(copies, own_edges, strict=True):
        if len(own) == 1:
            part: Component = Lattice(scaled, (1,))
        else:
            part = Graph(
                scaled,
                len(own),
                tuple((int(local[i]), int(local[j])) for i, j in pairs[numbers]),
                tuple(weights[numbers].tolist()),
            )
        parts.append((part, own))
    return _ordered(kind, size, parts)


def _assemble(kind: str, pieces: list[tuple[Tie, np.ndarray]], scaled: bool) -> Tie:
    if not pieces:
        raise TieError(
            kind, found="nothing", expected="at least one copy", fix="A tie needs at least one copy."
        )
    parts = []
    for tie, copies in pieces:
        for part, own in zip(tie.components, tie._copies, strict=True):
            if scaled and not part.scaled:
                part = replace(part, scaled=True)
            parts.append((part, copies[own.numpy()]))
    return _ordered(kind, sum(tie.num_copies for tie, _ in pieces), parts)


def _ordered(kind: str, size: int, parts: list[tuple[Component, np.ndarray]]) -> Tie:
    """Number components by their first copy."""
    parts = sorted(parts, key=lambda pair: int(pair[1].min()))
    order = np.concatenate([copies for _, copies in parts])
    same = bool((order == np.arange(size)).all())
    return Tie(kind, (size,), tuple(part for part, _ in parts), None if same else tuple(order.tolist()))
