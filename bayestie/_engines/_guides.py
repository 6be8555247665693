"""Gaussian guides at every point at once: full rank, low rank plus diagonal, mean field.

A guide is u = loc + M n with n standard normal, M its own kind of matrix. Its parameters are moved in
local coordinates, where the guide itself is standard normal (Glasmachers et al. 2010, Exponential natural
evolution strategies; Lin, Nielsen, Khan and Schmidt 2021, Tractable structured natural-gradient descent):
the same step means the same on every model, whatever its scales.

The gradient of the ELBO is the path gradient (Roeder, Wu and Duvenaud 2017, Sticking the landing): with the
score s = grad log p(u) and the guide's own path term e = -grad log q(u), parameters held fixed in log q,

    d ELBO / d loc = E[s + e],    d ELBO / d M = E[(s + e) n^T],

which has no variance where the guide is the posterior.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Gradient = tuple[Tensor, ...]  # per parameter, in local coordinates, each leading with the points axis


@dataclass(frozen=True)
class Curvature:
    """The quadratic of a Laplace fit: log p(u) = const - (u - centre)^T precision (u - centre) / 2.

    Shapes: centre (P, D), factor (P, D, D) with factor factor^T = precision^-1, precision (P, D, D),
    known (P,): False where the fit failed and the numbers mean nothing.
    """

    centre: Tensor
    factor: Tensor
    precision: Tensor
    known: Tensor

    def take(self, index: Tensor) -> "Curvature":
        return _take(self, index)

    def score(self, position: Tensor) -> Tensor:
        """Gradient of the quadratic at positions (P, batch, D)."""
        return torch.bmm(self.centre.unsqueeze(1) - position, self.precision)


@dataclass(frozen=True)
class Guide(ABC):
    """Laws: `log_density` is the density of `position(noise)`; `quadratic_gradient` is the expectation of
    `gradient` for the quadratic's score with ``path`` one; `blend` with share 1 is the other guide."""

    loc: Tensor  # (P, D)

    @property
    @abstractmethod
    def num_noise(self) -> int:
        """Standard normals per draw."""

    @property
    def num_parameters(self) -> int:
        """Free parameters per point."""
        return sum(x[0].numel() for x in vars(self).values() if isinstance(x, Tensor))

    @abstractmethod
    def offset(self, noise: Tensor) -> Tensor:
        """M n for noise (P, batch, num_noise): (P, batch, D)."""

    @abstractmethod
    def log_density(self, position: Tensor) -> Tensor:
        """log q at positions (P, batch, D): (P, batch)."""

    @abstractmethod
    def path_term(self, noise: Tensor) -> Tensor:
        """-grad log q at the draws of ``noise``: (P, batch, D)."""

    @abstractmethod
    def gradient(self, score: Tensor, noise: Tensor, path: Tensor) -> Gradient:
        """ELBO gradient averaged over the batch, from scores (P, batch, D) and ``path`` (P,) times e."""

    @abstractmethod
    def step(self, step: Gradient) -> "Guide":
        """The guide after a step in its local coordinates."""

    def position(self, noise: Tensor) -> Tensor:
        return self.loc.unsqueeze(1) + self.offset(noise)

    def propose(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        position = self.position(noise)
        return position, self.log_density(position)

    def take(self, index: Tensor) -> "Guide":
        return _take(self, index)

    def put(self, index: Tensor, other: "Guide") -> "Guide":
        """This guide with the points in ``index`` replaced by those of ``other``."""
        return _zip(lambda mine, new: mine.index_copy(0, index, new), self, other)

    def blend(self, other: "Guide", share: float) -> "Guide":
        """(1 - share) of this guide's parameters plus share of the other's."""
        return _zip(lambda mine, new: torch.lerp(mine, new, share), self, other)


@dataclass(frozen=True)
class FullRank(Guide):
    """u = loc + tril n; tril (P, D, D) lower triangular with positive diagonal."""

    tril: Tensor

    @property
    def num_noise(self) -> int:
        return self.loc.shape[1]

    @property
    def num_parameters(self) -> int:
        dim = self.loc.shape[1]
        return dim + dim * (dim + 1) // 2

    def offset(self, noise: Tensor) -> Tensor:
        return torch.bmm(noise, self.tril.mT)

    def log_density(self, position: Tensor) -> Tensor:
        centred = (position - self.loc.unsqueeze(1)).mT
        whitened = torch.linalg.solve_triangular(self.tril, centred, upper=False).mT
        return _standard_normal(whitened) - _log_diagonal(self.tril)

    def path_term(self, noise: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.tril.mT, noise.mT, upper=True).mT

    def gradient(self, score: Tensor, noise: Tensor, path: Tensor) -> Gradient:
        local = torch.bmm(score, self.tril) + path.view(-1, 1, 1) * noise
        shape = torch.bmm(local.mT, noise).tril() / noise.shape[1]
        # The diagonal is moved as a logarithm, whose Fisher information is 2.
        return local.mean(1), shape - 0.5 * torch.diag_embed(shape.diagonal(dim1=-2, dim2=-1))

    def step(self, step: Gradient) -> "FullRank":
        mean, shape = step
        scale = shape.diagonal(dim1=-2, dim2=-1).exp()
        return FullRank(
            self.loc + torch.bmm(self.tril, mean.unsqueeze(-1)).squeeze(-1),
            torch.bmm(self.tril, shape.tril(-1) + torch.diag_embed(scale)),
        )


@dataclass(frozen=True)
class _Scaled(Guide):
    """A guide in units of one scale per latent; its mean moves along the Laplace fit's axes where known.

    Without them the mean of a guide with independent scales crawls along a narrow ridge.
    """

    scale: Tensor  # (P, D)
    curvature: Curvature | None = dataclasses.field(kw_only=True, default=None)

    @abstractmethod
    def quadratic_gradient(self, curvature: Curvature) -> Gradient:
        """Exact ELBO gradient for the quadratic log p of ``curvature``."""

    def _mean_gradient(self, mean: Tensor) -> Tensor:
        own = self.scale * mean
        if self.curvature is None:
            return own
        axes = torch.bmm(mean.unsqueeze(1), self.curvature.factor).squeeze(1)
        return torch.where(self.curvature.known.unsqueeze(1), axes, own)

    def _moved(self, mean: Tensor) -> Tensor:
        own = self.scale * mean
        if self.curvature is not None:
            axes = torch.bmm(self.curvature.factor, mean.unsqueeze(-1)).squeeze(-1)
            own = torch.where(self.curvature.known.unsqueeze(1), axes, own)
        return self.loc + own


@dataclass(frozen=True)
class MeanField(_Scaled):
    """u_j = loc_j + scale_j n_j."""

    @property
    def num_noise(self) -> int:
        return self.loc.shape[1]

    def offset(self, noise: Tensor) -> Tensor:
        return self.scale.unsqueeze(1) * noise

    def log_density(self, position: Tensor) -> Tensor:
        whitened = (position - self.loc.unsqueeze(1)) / self.scale.unsqueeze(1)
        return _standard_normal(whitened) - self.scale.log().sum(-1, keepdim=True)

    def path_term(self, noise: Tensor) -> Tensor:
        return noise / self.scale.unsqueeze(1)

    def gradient(self, score: Tensor, noise: Tensor, path: Tensor) -> Gradient:
        total = score + path.view(-1, 1, 1) * self.path_term(noise)
        return self._mean_gradient(total.mean(1)), 0.5 * self.scale * (total * noise).mean(1)

    def quadratic_gradient(self, curvature: Curvature) -> Gradient:
        mean = curvature.score(self.loc.unsqueeze(1)).squeeze(1)
        diagonal = curvature.precision.diagonal(dim1=-2, dim2=-1)
        return self._mean_gradient(mean), 0.5 * (1.0 - self.scale.square() * diagonal)

    def step(self, step: Gradient) -> "MeanField":
        mean, log_scale = step
        return dataclasses.replace(self, loc=self._moved(mean), scale=self.scale * log_scale.exp())


@dataclass(frozen=True)
class LowRank(_Scaled):
    """u = loc + scale (n_1 + factor n_2): covariance diag(scale) (I + factor factor^T) diag(scale).

    factor (P, D, r); noise holds D and then r standard normals.
    """

    factor: Tensor

    @property
    def num_noise(self) -> int:
        return self.loc.shape[1] + self.factor.shape[2]

    def _scaled_offset(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        own, common = noise.split(self.factor.shape[1:], -1)
        return own + torch.bmm(common, self.factor.mT), common

    def _inner(self) -> Tensor:
        rank = self.factor.shape[2]
        inner = torch.bmm(self.factor.mT, self.factor) + torch.eye(rank).to(self.factor)
        return torch.linalg.cholesky_ex(inner)[0]

    def _whiten(self, scaled: Tensor) -> Tensor:
        """(I + factor factor^T)^-1 of rows (P, batch, D), by Woodbury."""
        common = torch.cholesky_solve(torch.bmm(scaled, self.factor).mT, self._inner())
        return scaled - torch.bmm(self.factor, common).mT

    def offset(self, noise: Tensor) -> Tensor:
        return self.scale.unsqueeze(1) * self._scaled_offset(noise)[0]

    def log_density(self, position: Tensor) -> Tensor:
        scaled = (position - self.loc.unsqueeze(1)) / self.scale.unsqueeze(1)
        quadratic = (scaled * self._whiten(scaled)).sum(-1)
        log_det = self.scale.log().sum(-1, keepdim=True) + _log_diagonal(self._inner())
        return -0.5 * quadratic - 0.5 * scaled.shape[-1] * math.log(2.0 * math.pi) - log_det

    def path_term(self, noise: Tensor) -> Tensor:
        return self._whiten(self._scaled_offset(noise)[0]) / self.scale.unsqueeze(1)

    def gradient(self, score: Tensor, noise: Tensor, path: Tensor) -> Gradient:
        scaled, common = self._scaled_offset(noise)
        total = score + path.view(-1, 1, 1) * self._whiten(scaled) / self.scale.unsqueeze(1)
        local = self.scale.unsqueeze(1) * total
        return self._conditioned(
            total.mean(1), (local * scaled).mean(1), torch.bmm(local.mT, common) / noise.shape[1]
        )

    def quadratic_gradient(self, curvature: Curvature) -> Gradient:
        mean = curvature.score(self.loc.unsqueeze(1)).squeeze(1)
        across = self.scale.unsqueeze(-1) * torch.bmm(
            curvature.precision, self.scale.unsqueeze(-1) * self.factor
        )
        diagonal = self.scale.square() * curvature.precision.diagonal(dim1=-2, dim2=-1)
        log_scale = 1.0 - diagonal - (across * self.factor).sum(-1)
        return self._conditioned(mean, log_scale, self._whiten(self.factor.mT).mT - across)

    def _conditioned(self, mean: Tensor, log_scale: Tensor, factor: Tensor) -> Gradient:
        # Fisher information of a log scale in this family is 1 + C_jj (C^-1)_jj, C = I + factor factor^T;
        # C on the left makes a step on the factor relative to the variance already there.
        variance = 1.0 + self.factor.square().sum(-1)
        precision = 1.0 - (self.factor * torch.cholesky_solve(self.factor.mT, self._inner()).mT).sum(-1)
        return (
            self._mean_gradient(mean),
            log_scale / (1.0 + variance * precision),
            factor + torch.bmm(self.factor, torch.bmm(self.factor.mT, factor)),
        )

    def step(self, step: Gradient) -> "LowRank":
        mean, log_scale, factor = step
        return dataclasses.replace(
            self,
            loc=self._moved(mean),
            scale=self.scale * log_scale.exp(),
            factor=self.factor + factor,
        )


def _standard_normal(x: Tensor) -> Tensor:
    return -0.5 * x.square().sum(-1) - 0.5 * x.shape[-1] * math.log(2.0 * math.pi)


def _log_diagonal(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)


def _take(record: Any, index: Tensor) -> Any:
    """A dataclass of tensors (or of such dataclasses) at the points in ``index``."""
    if record is None:
        return None
    if isinstance(record, Tensor):
        return record[index]
    fields = {f.name: _take(getattr(record, f.name), index) for f in dataclasses.fields(record)}
    return type(record)(**fields)


def _zip(function: Callable[[Tensor, Tensor], Tensor], mine: Any, other: Any) -> Any:
    """``function`` of the parameters of two guides of one kind, pair by pair; what is fixed stays mine."""
    changed = {
        f.name: function(getattr(mine, f.name), getattr(other, f.name))
        for f in dataclasses.fields(mine)
        if isinstance(getattr(mine, f.name), Tensor)
    }
    return dataclasses.replace(mine, **changed)
