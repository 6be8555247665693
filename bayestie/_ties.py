"""Tie: a weighted graph over copies, its spectrum and its fast maps."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayestie._components import Complete, Component, Frozen, Lattice, Ring, Star, Walk, outside_transforms
from bayestie._errors import ShapeError, TieError
from bayestie._graphs import count, grouped, lay_out, parent_edges, split_graph, weighted_edges
from bayestie._layouts import Layout

_DESCRIBED_EDGES = 20_000


@lru_cache(maxsize=8)
def _layout(part: Component) -> Layout:
    """The same object at every run of a model, so that what it derives is derived once."""
    return Layout((part,))


@dataclass(frozen=True, repr=False)
class Tie(Frozen):
    """A weighted graph over K copies: an edge says that two copies should be close.

    L = sum_e w_e (e_i - e_j)(e_i - e_j)^T has eigenpairs (l_j, u_j); the prior of theta is Gaussian along
    them. Build one with a constructor: `exchangeable`, `complete`, `chain`, `ring`, `grid`, `tree`, `edges`,
    `groups`, `disjoint`. Connected components are numbered by their first copy, and each has a level of its
    own. Every constructor takes ``scaled``: multiply L, per component, by the geometric mean of diag L^+
    (single copies skipped), so that the geometric mean of the deviations' prior variances at sigma = 1 is 1
    and one sigma means the same on every graph. Edge weights, energies and resistances are those of the
    scaled L.

    Ties are immutable, hashable, picklable, and equal when built alike.

    Example:
        >>> tie = Tie.chain(4)
        >>> tie.num_copies, tie.num_components, tie.rank
        (4, 1, 3)
        >>> round(float((tie.edge_weights * tie.effective_resistances()).sum()), 12)  # K - c
        3.0

    Reference: Sorbye and Rue (2014), Scaling intrinsic Gaussian Markov random field priors in spatial
    modelling, Spatial Statistics 8, 39-51.
    """

    kind: str
    shape: tuple[int, ...]
    layout: Layout

    # -- constructors ----------------------------------------------------------------------------------------

    @staticmethod
    def exchangeable(num_copies: int, *, scaled: bool = False) -> "Tie":
        """K copies around a hub: theta_k = level + sigma z_k; the level is the hub, not the copies' mean.

        Args:
            num_copies: K >= 1.
            scaled: changes nothing here, deviations have variance sigma^2 already.

        Raises:
            TieError: K < 1.
        """
        size = count(num_copies, "num_copies")
        return Tie("exchangeable", (size,), _layout(Star(scaled, size)))

    @staticmethod
    def complete(num_copies: int, *, scaled: bool = False) -> "Tie":
        """Every pair of K copies tied: deviations of variance sigma^2 / K along each contrast.

        With a flat level, theta_k ~ N(mu, tau) is this tie at sigma = tau sqrt(K).

        Args:
            num_copies: K >= 1.
            scaled: see `Tie`.

        Raises:
            TieError: K < 1.
        """
        size = count(num_copies, "num_copies")
        return Tie("complete", (size,), _layout(Complete(scaled, size)))

    @staticmethod
    def chain(num_copies: int, anchored: bool = False, *, scaled: bool = False) -> "Tie":
        """Neighbours in a sequence of K copies tied: a random walk with steps of sd sigma.

        Args:
            num_copies: K >= 1.
            anchored: the level is the first copy (the walk starts at the base) instead of the mean; form
                `level` only.
            scaled: see `Tie`; an anchored chain uses the factor of the chain, so that steps agree.

        Raises:
            TieError: K < 1.
        """
        size = count(num_copies, "num_copies")
        part = Walk(scaled, size) if anchored else Lattice(scaled, (size,))
        return Tie("anchored_chain" if anchored else "chain", (size,), _layout(part))

    @staticmethod
    def ring(num_copies: int, *, scaled: bool = False) -> "Tie":
        """A chain of K copies closed into a cycle; with one or two copies, the chain itself.

        Args:
            num_copies: K >= 1.
            scaled: see `Tie`.

        Raises:
            TieError: K < 1.
        """
        size = count(num_copies, "num_copies")
        part = Ring(scaled, size) if size > 2 else Lattice(scaled, (size,))
        return Tie("ring", (size,), _layout(part))

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
        count(len(shape), "number of axes")
        axes = tuple(count(n, "shape") for n in shape)
        return Tie("grid", axes, _layout(Lattice(scaled, axes)))

    @staticmethod
    def tree(parents: Sequence[int] | Tensor | np.ndarray, *, scaled: bool = False) -> "Tie":
        """Each node tied to its parent.

        Args:
            parents: parent index of each of the K nodes, -1 for a root; several roots, several components.
            scaled: see `Tie`.

        Raises:
            TieError: empty, an index outside -1 .. K - 1, or a cycle.
        """
        size, edges = parent_edges(parents)
        return Tie("tree", (size,), split_graph(size, edges, np.ones(len(edges)), scaled))

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
            weights: w_e > 0, one per edge, without unit; 1 where left out.
            scaled: see `Tie`.

        Raises:
            TieError: an index out of range, a self-loop, a pair twice, a weight that is not positive and
                finite.

        Example:
            >>> Tie.edges(4, [(0, 1), (1, 2)]).labels.tolist()
            [0, 0, 0, 1]
        """
        size = count(num_copies, "num_copies")
        return Tie("edges", (size,), split_graph(size, *weighted_edges(size, edges, weights), scaled))

    @staticmethod
    def groups(
        labels: Iterable[Hashable] | Tensor | np.ndarray,
        within: "Callable[[int], Tie] | None" = None,
        *,
        scaled: bool = False,
    ) -> "Tie":
        """A tie of one kind inside each label, a level each.

        Args:
            labels: the group of each copy: any hashables, a tensor or an array. Groups are numbered in order
                of first appearance; the result's `labels` holds those numbers.
            within: number of copies in a group -> tie of that group; `Tie.exchangeable` where left out.
            scaled: see `Tie`; or set it in `within`.

        Raises:
            TieError: no label, a missing label (None or NaN), a category without copies, or a `within` of
                another size.

        Example:
            >>> tie = Tie.groups(["oslo", "rome", "oslo"])
            >>> tie.num_components, tie.labels.tolist()
            (2, [0, 1, 0])
        """
        within = Tie.exchangeable if within is None else within
        made: dict[int, Tie] = {}
        pieces = []
        for label, copies in grouped(labels).items():
            size = len(copies)
            if size not in made:
                made[size] = within(size)
            if made[size].num_copies != size:
                raise TieError(
                    f"within({size}), group {label!r}",
                    found=f"a tie of {made[size].num_copies} copies",
                    expected=f"{size} copies",
                    fix="Return a tie over as many copies as the argument says.",
                )
            pieces.append((made[size], np.asarray(copies)))
        return _side_by_side("groups", pieces, scaled)

    @staticmethod
    def disjoint(*ties: "Tie", scaled: bool = False) -> "Tie":
        """Several ties side by side, nothing tied between them; copies are numbered tie after tie.

        Args:
            *ties: at least one; kinds may be mixed.
            scaled: scale every component; where False, each tie keeps its own setting.

        Raises:
            TieError: no tie.
        """
        count(len(ties), "number of ties")
        starts = np.cumsum([0] + [tie.num_copies for tie in ties])[:-1]
        pieces = [(tie, np.arange(tie.num_copies) + start) for tie, start in zip(ties, starts, strict=True)]
        return _side_by_side("disjoint", pieces, scaled)

    # -- size ------------------------------------------------------------------------------------------------

    @property
    def components(self) -> tuple[Component, ...]:
        """The connected components, numbered by their first copy."""
        return self.layout.components

    @property
    def num_copies(self) -> int:
        """K."""
        return self.layout.num_copies

    @property
    def num_components(self) -> int:
        """c, the number of connected components, each with a level."""
        return len(self.components)

    @property
    def rank(self) -> int:
        """r, the number of coefficients z per event element: K - c, and K for `exchangeable`."""
        return self.layout.rank

    @cached_property
    def num_edges(self) -> int:
        """Number of edges, without listing them."""
        return sum(part.num_edges for part in self.components)

    @property
    def scaled(self) -> bool:
        """Whether every component is scaled."""
        return all(part.scaled for part in self.components)

    @cached_property
    def anchored(self) -> bool:
        """Whether some component has its level at its first copy."""
        return any(part.anchored for part in self.components)

    @cached_property
    def has_hub(self) -> bool:
        """Whether some component is exchangeable, its level a node of its own."""
        return any(part.hub for part in self.components)

    @property
    def labels(self) -> Tensor:
        """Component of each copy, (K,)."""
        return self.layout.labels

    # -- spectrum --------------------------------------------------------------------------------------------

    @property
    def eigenvalues(self) -> Tensor:
        """Eigenvalue l_j > 0 of each coefficient, (r,) in float64; the prior variance along it is sigma^2 /
        l_j.

        Ones for `exchangeable`; for an anchored chain the weight of each step.
        """
        return self.layout.eigenvalues

    @cached_property
    def log_pseudo_determinant(self) -> float:
        """log |L|_+, the sum of the logarithms of the eigenvalues."""
        with outside_transforms():
            return float(self.eigenvalues.log().sum())

    @cached_property
    def scale_factor(self) -> Tensor:
        """What multiplies L, (c,) in float64, 1 where not scaled; the raw strength is sigma / sqrt of it."""
        with outside_transforms():
            factors = [part.scale_factor for part in self.layout.shared]
            return torch.tensor(factors, dtype=torch.float64, device="cpu")

    @cached_property
    def typical_variance(self) -> Tensor:
        """Geometric mean of diag L^+ before scaling, (c,) in float64, 1 for a single copy.

        The strength that a scaled tie would show for an unscaled sigma is sigma sqrt(typical_variance).
        """
        with outside_transforms():
            variances = [part.typical_variance for part in self.layout.shared]
            return torch.tensor(variances, dtype=torch.float64, device="cpu")

    def synthesize(self, coefficients: Tensor) -> Tensor:
        """x = U c: coefficients along the eigenvectors to values on the copies.

        Args:
            coefficients: (..., r).

        Returns:
            (..., K). The identity for `exchangeable`; for an anchored chain, running sums from 0.
        """
        return self.layout.synthesize(coefficients)

    def analyze(self, x: Tensor) -> Tensor:
        """c = U^T x, the inverse of `synthesize` on deviations.

        Args:
            x: (..., K).

        Returns:
            (..., r). The identity for `exchangeable`; for an anchored chain, the steps.
        """
        return self.layout.analyze(x)

    def diagonal(self, v: Tensor) -> Tensor:
        """Variance of each copy's deviation, diag(U diag(v) U^T), from variances v of the coefficients.

        Args:
            v: (..., r), equal where eigenvalues of a component are equal.

        Returns:
            (..., K).
        """
        return self.layout.diagonal(v)

    # -- edges -----------------------------------------------------------------------------------------------

    @cached_property
    def edge_index(self) -> Tensor:
        """Both ends of every edge, (2, num_edges); the hub of exchangeable component j is node K + j."""
        with outside_transforms():
            found = []
            for number, (part, copies) in enumerate(zip(self.components, self.layout.copies, strict=True)):
                nodes = torch.cat([copies, torch.tensor([self.num_copies + number], device="cpu")])
                found.append(nodes[part.edges()])
            return torch.cat(found, -1)

    @cached_property
    def edge_weights(self) -> Tensor:
        """Weight w_e of every edge after scaling, (num_edges,) in float64."""
        with outside_transforms():
            return torch.cat([part.weights_of_edges() for part in self.layout.shared])

    def effective_resistances(self) -> Tensor:
        """R_e = (e_i - e_j)^T L^+ (e_i - e_j) of every edge after scaling, (num_edges,) in float64.

        sigma sqrt(R_e) is the prior sd of the difference across the edge; sum_e w_e R_e = K - c
        (K for `exchangeable`, whose hub is a node too).
        """
        with outside_transforms():
            once = {part: part.raw_resistances() / part.scale_factor for part in self.layout.blocks}
            return torch.cat([once[part] for part in self.components])

    def energy(self, theta: Tensor, level: Tensor | None = None, *, event_dim: int = 0) -> Tensor:
        """q = sum_e w_e |theta_i - theta_j|^2 per event element; the prior's factor is exp(-q / (2 sigma^2)).

        Args:
            theta: (..., K, *E).
            level: (..., *E), or (..., c, *E) for several components; needed with exchangeable components
                only.
            event_dim: number of dims of E.

        Returns:
            (..., *E), exactly 0 where all copies of every component equal one another (and their hub).

        Raises:
            ShapeError: theta does not have K copies, or the level is missing.
        """
        dim = -1 - event_dim
        if theta.dim() <= event_dim or theta.shape[dim] != self.num_copies:
            raise ShapeError(
                "theta",
                found=f"shape {tuple(theta.shape)}",
                expected=f"{self.num_copies} copies at dim {dim}",
                fix="Give event_dim, the number of dims right of the copies.",
            )
        x = theta.movedim(dim, -1)
        hubs = None
        if self.has_hub:
            if level is None:
                raise ShapeError(
                    "level",
                    found="None",
                    expected="the hubs of the exchangeable components",
                    fix="Pass the level that the copies deviate from.",
                )
            hubs = level[..., None] if self.num_components == 1 else level.movedim(dim, -1)
        total = torch.zeros_like(x[..., 0])
        for part, own in self.layout.in_blocks(x):
            if part.hub and hubs is not None:
                own = own - hubs[..., self.layout.blocks[part], None]
            total = total + part.energy(own).sum(-1)
        return total

    # -- words -----------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What results record about the tie, in plain JSON types; its edges where at most 20,000."""
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


def _side_by_side(kind: str, pieces: list[tuple[Tie, np.ndarray]], scaled: bool) -> Tie:
    parts = [
        (replace(part, scaled=True) if scaled else part, copies[own.numpy()])
        for tie, copies in pieces
        for part, own in zip(tie.components, tie.layout.copies, strict=True)
    ]
    return Tie(kind, (sum(len(copies) for _, copies in pieces),), lay_out(parts))
