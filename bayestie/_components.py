"""Connected components of a tie: each kind with its spectrum, its fast maps and its edges.

Laws, for every component but `Star` and `Walk`, with U = synthesize on the identity and l = eigenvalues:
U^T U = I, U^T 1 = 0, U diag(l) U^T = L, analyze(x) = U^T x, diagonal(v) = diag(U diag(v) U^T),
sum over edges of w_e R_e = K - 1. `Star` and `Walk` keep analyze(synthesize(c)) = c and the density
exp(-q / 2) with q = sum_j l_j c_j^2, which is all that a prior needs.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from bayestie import _transforms as transforms
from bayestie._workers import eigh


@contextmanager
def outside_transforms() -> Iterator[None]:
    """Build constants as plain tensors even when first asked for under vmap, grad, make_fx or inference mode.

    A cached tensor born inside a functorch transform stays wrapped at a level that is dead afterwards.
    """
    with torch._C._DisableFuncTorch(), _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        yield


@dataclass(frozen=True)
class Frozen:
    """Derived tensors are cached on the instance; pickles and copies carry the fields alone."""

    def __getstate__(self) -> dict:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def cast(self, name: str, make: Callable[[], Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The constant `make()`, kept per dtype and device: a step on an accelerator copies nothing."""
        cache = self.__dict__.setdefault("_casts", {})
        key = (name, dtype, device)
        if key not in cache:
            with outside_transforms():
                cache[key] = make().to(device=device, dtype=dtype)
        return cache[key]


def _arange(num: int) -> Tensor:
    return torch.arange(num, device="cpu")


_LIKE = torch.zeros((), dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class Component(Frozen, ABC):
    """One connected component: `num_copies` copies, `rank` coefficients.

    hub: the level is a node of its own, so every copy has a coefficient.
    anchored: the level is the first copy, not the mean of the copies.
    """

    scaled: bool

    hub = False
    anchored = False

    @property
    @abstractmethod
    def num_copies(self) -> int: ...

    @property
    def rank(self) -> int:
        return self.num_copies - 1

    @property
    @abstractmethod
    def num_edges(self) -> int: ...

    @abstractmethod
    def raw_eigenvalues(self) -> Tensor:
        """Positive Laplacian eigenvalues before scaling, (rank,)."""

    @abstractmethod
    def synthesize(self, coefficients: Tensor) -> Tensor:
        """(..., rank) -> (..., num_copies)."""

    @abstractmethod
    def analyze(self, x: Tensor) -> Tensor:
        """(..., num_copies) -> (..., rank)."""

    @abstractmethod
    def diagonal(self, v: Tensor) -> Tensor:
        """Variance of each copy's deviation from variances of the coefficients, (..., rank) -> (..., K)."""

    @abstractmethod
    def edges(self) -> Tensor:
        """(2, num_edges); the hub, where there is one, is node num_copies."""

    def raw_weights(self) -> Tensor:
        return torch.ones(self.num_edges, dtype=torch.float64, device="cpu")

    def eigenvalues(self) -> Tensor:
        return self.raw_eigenvalues() * self.scale_factor

    def weights_of_edges(self) -> Tensor:
        return self.raw_weights() * self.scale_factor

    @abstractmethod
    def raw_resistances(self) -> Tensor:
        """Effective resistance of every edge before scaling, (num_edges,)."""

    @cached_property
    def typical_variance(self) -> float:
        """Geometric mean of diag L^+ before scaling; 1 for a single copy (Sorbye and Rue 2014)."""
        if self.num_copies == 1:
            return 1.0
        with outside_transforms():
            return math.exp(self.diagonal(1 / self.raw_eigenvalues()).log().mean().item())

    @cached_property
    def scale_factor(self) -> float:
        return self.typical_variance if self.scaled else 1.0

    def energy(self, x: Tensor) -> Tensor:
        """q = sum_e w_e (x_i - x_j)^2, (..., K) -> (...); the hub, where there is one, lies at 0."""
        i, j = self.cast("edges", self.edges, torch.int64, x.device)
        weights = self.cast("weights", self.weights_of_edges, x.dtype, x.device)
        return (weights * (x.index_select(-1, i) - x.index_select(-1, j)).square()).sum(-1)


@dataclass(frozen=True)
class Sized(Component):
    """A component stated by its number of copies, as all are but grids."""

    size: int

    @property
    def num_copies(self) -> int:
        return self.size


@dataclass(frozen=True)
class Star(Sized):
    """Exchangeable copies around a hub: theta_k = level + sigma z_k."""

    hub = True

    @property
    def rank(self) -> int:
        return self.size

    @property
    def num_edges(self) -> int:
        return self.size

    @cached_property
    def typical_variance(self) -> float:
        return 1.0

    def raw_eigenvalues(self) -> Tensor:
        return torch.ones(self.size, dtype=torch.float64, device="cpu")

    def synthesize(self, coefficients: Tensor) -> Tensor:
        return coefficients

    def analyze(self, x: Tensor) -> Tensor:
        return x

    def diagonal(self, v: Tensor) -> Tensor:
        return v

    def edges(self) -> Tensor:
        copies = _arange(self.size)
        return torch.stack([copies, torch.full_like(copies, self.size)])

    def raw_resistances(self) -> Tensor:
        return torch.ones(self.size, dtype=torch.float64, device="cpu")

    def energy(self, x: Tensor) -> Tensor:
        return x.square().sum(-1)


@dataclass(frozen=True)
class Complete(Sized):
    """Every pair tied: L = K I - 1 1^T, Householder basis."""

    @property
    def num_edges(self) -> int:
        return self.size * (self.size - 1) // 2

    def raw_eigenvalues(self) -> Tensor:
        return torch.full((self.rank,), float(self.size), dtype=torch.float64, device="cpu")

    def synthesize(self, coefficients: Tensor) -> Tensor:
        return transforms.householder_synthesize(coefficients)

    def analyze(self, x: Tensor) -> Tensor:
        return transforms.householder_analyze(x)

    def diagonal(self, v: Tensor) -> Tensor:
        # v is a function of the eigenvalue, so constant here: v (I - 1 1^T / K).
        mean = v.sum(-1, keepdim=True) / self.size
        return mean.expand(*mean.shape[:-1], self.size)

    def edges(self) -> Tensor:
        return torch.triu_indices(self.size, self.size, 1, device="cpu")

    def raw_resistances(self) -> Tensor:
        return torch.full((self.num_edges,), 2 / self.size, dtype=torch.float64, device="cpu")

    def energy(self, x: Tensor) -> Tensor:
        # From the first copy, so that equal copies give exactly 0.
        centred = x - x[..., :1]
        centred = centred - centred.mean(-1, keepdim=True)
        return self.scale_factor * self.size * centred.square().sum(-1)


@dataclass(frozen=True)
class Lattice(Component):
    """A grid of any number of axes with an edge between neighbours (a chain has one axis); DCT basis."""

    axes: tuple[int, ...]

    @property
    def num_copies(self) -> int:
        return math.prod(self.axes)

    @property
    def num_edges(self) -> int:
        return sum((n - 1) * (self.num_copies // n) for n in self.axes)

    def _each_axis(self, operator, x: Tensor) -> Tensor:
        for axis in range(-len(self.axes), 0):
            x = operator(x.movedim(axis, -1)).movedim(-1, axis)
        return x

    def _with_constant(self, coefficients: Tensor) -> Tensor:
        padded = torch.cat([torch.zeros_like(coefficients[..., :1]), coefficients], -1)
        return padded.unflatten(-1, self.axes)

    def raw_eigenvalues(self) -> Tensor:
        total = torch.zeros(self.axes, dtype=torch.float64, device="cpu")
        for axis, num in enumerate(self.axes):
            shape = [1] * len(self.axes)
            shape[axis] = num
            total = total + transforms.path_eigenvalues(num, _LIKE).reshape(shape)
        return total.flatten()[1:]

    def synthesize(self, coefficients: Tensor) -> Tensor:
        padded = self._with_constant(coefficients)
        return self._each_axis(transforms.inverse_dct, padded).flatten(-len(self.axes))

    def analyze(self, x: Tensor) -> Tensor:
        gridded = x.unflatten(-1, self.axes)
        return self._each_axis(transforms.dct, gridded).flatten(-len(self.axes))[..., 1:]

    def diagonal(self, v: Tensor) -> Tensor:
        return self._each_axis(transforms.cosine_squares, self._with_constant(v)).flatten(-len(self.axes))

    def edges(self) -> Tensor:
        index = _arange(self.num_copies).reshape(self.axes)
        pairs = [
            torch.stack([index.narrow(axis, 0, n - 1).flatten(), index.narrow(axis, 1, n - 1).flatten()])
            for axis, n in enumerate(self.axes)
        ]
        return torch.cat(pairs, -1)

    def raw_resistances(self) -> Tensor:
        if self.num_copies == 1:
            return torch.zeros(0, dtype=torch.float64, device="cpu")
        inverse = self._with_constant(1 / self.raw_eigenvalues())
        found = []
        for along in range(len(self.axes)):
            x = inverse
            for axis in range(len(self.axes)):
                operator = transforms.cosine_step_squares if axis == along else transforms.cosine_squares
                x = operator(x.movedim(axis, -1)).movedim(-1, axis)
            found.append(x.flatten())
        return torch.cat(found)

    def energy(self, x: Tensor) -> Tensor:
        gridded = x.unflatten(-1, self.axes)
        total = torch.zeros_like(x[..., 0])
        for axis in range(-len(self.axes), 0):
            total = total + gridded.diff(dim=axis).square().flatten(-len(self.axes)).sum(-1)
        return self.scale_factor * total


@dataclass(frozen=True)
class Walk(Sized):
    """A chain whose level is its first copy: theta = level + sigma cumsum([0, z])."""

    anchored = True

    @property
    def num_edges(self) -> int:
        return self.size - 1

    @cached_property
    def typical_variance(self) -> float:
        # The same graph as the chain, so the same unit of sigma: only the base sits elsewhere.
        return Lattice(False, (self.size,)).typical_variance

    def raw_eigenvalues(self) -> Tensor:
        return torch.ones(self.rank, dtype=torch.float64, device="cpu")

    def synthesize(self, coefficients: Tensor) -> Tensor:
        shape = (*coefficients.shape[:-1], 1)
        return torch.cat([coefficients.new_zeros(shape), coefficients.cumsum(-1)], -1)

    def analyze(self, x: Tensor) -> Tensor:
        return x.diff(dim=-1)

    def diagonal(self, v: Tensor) -> Tensor:
        return self.synthesize(v)

    def edges(self) -> Tensor:
        return Lattice(False, (self.size,)).edges()

    def raw_resistances(self) -> Tensor:
        return torch.ones(self.num_edges, dtype=torch.float64, device="cpu")

    def energy(self, x: Tensor) -> Tensor:
        return self.scale_factor * x.diff(dim=-1).square().sum(-1)


@dataclass(frozen=True)
class Ring(Sized):
    """A cycle of at least three copies; real Fourier basis."""

    @property
    def num_edges(self) -> int:
        return self.size

    def raw_eigenvalues(self) -> Tensor:
        frequency = _arange(self.size // 2 + 1).double()[1:]
        values = 4 * (frequency * (math.pi / self.size)).sin().square()
        return torch.cat([values, values[: (self.size - 1) // 2]])

    def synthesize(self, coefficients: Tensor) -> Tensor:
        return transforms.fourier_synthesize(coefficients)

    def analyze(self, x: Tensor) -> Tensor:
        return transforms.fourier_analyze(x)

    def diagonal(self, v: Tensor) -> Tensor:
        # v is a function of the eigenvalue: a circulant matrix has a constant diagonal.
        mean = v.sum(-1, keepdim=True) / self.size
        return mean.expand(*mean.shape[:-1], self.size)

    def edges(self) -> Tensor:
        copies = _arange(self.size)
        return torch.stack([copies, copies.roll(-1)])

    def raw_resistances(self) -> Tensor:
        return torch.full((self.size,), (self.size - 1) / self.size, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class Graph(Sized):
    """Any connected weighted graph; dense eigenvectors, O(K^3) once and O(K^2) per map."""

    pairs: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]

    @property
    def num_edges(self) -> int:
        return len(self.pairs)

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        with outside_transforms():
            laplacian = torch.zeros(self.size, self.size, dtype=torch.float64, device="cpu")
            i, j = self.edges()
            weights = self.raw_weights()
            laplacian[i, j] = laplacian[j, i] = -weights
            laplacian.diagonal().copy_(-laplacian.sum(-1))
            values, vectors = (part.squeeze(0) for part in eigh(laplacian.unsqueeze(0)))
            # Connected, so exactly the first eigenvalue is zero; centring keeps U^T 1 = 0 to rounding.
            vectors = vectors[:, 1:]
            return values[1:], vectors - vectors.mean(0)

    def raw_eigenvalues(self) -> Tensor:
        return self._spectrum[0]

    def _vectors(self, like: Tensor) -> Tensor:
        return self.cast("vectors", lambda: self._spectrum[1], like.dtype, like.device)

    def synthesize(self, coefficients: Tensor) -> Tensor:
        return coefficients @ self._vectors(coefficients).mT

    def analyze(self, x: Tensor) -> Tensor:
        return x @ self._vectors(x)

    def diagonal(self, v: Tensor) -> Tensor:
        return v @ self._vectors(v).square().mT

    def edges(self) -> Tensor:
        return torch.tensor(self.pairs, dtype=torch.int64, device="cpu").reshape(-1, 2).mT

    def raw_weights(self) -> Tensor:
        return torch.tensor(self.weights, dtype=torch.float64, device="cpu")

    def raw_resistances(self) -> Tensor:
        values, vectors = self._spectrum
        inverse = (vectors / values) @ vectors.mT
        i, j = self.edges()
        return inverse[i, i] + inverse[j, j] - 2 * inverse[i, j]
