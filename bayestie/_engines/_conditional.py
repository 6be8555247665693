"""Exact draws where a posterior is Gaussian given one unknown noise standard deviation.

In the axes of `_noise_axes` everything is a scalar at any noise: its marginal posterior is known pointwise,
is put on a fine grid and drawn from, and the other latents follow from their conditional. The way of INLA
(Rue, Martino and Chopin 2009) with a Gaussian likelihood; the importance weights check the grid.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayestie._affine import AffineDensity
from bayestie._engines._axes import AxisProposal, fine_edges, piecewise
from bayestie._engines._by_points import ByPoints
from bayestie._engines._protocol import Task
from bayestie._noise_axes import NoiseAxes


@dataclass
class ConditionalProposal(ByPoints):
    """h from its marginal, the others from their Gaussian given h: u = centre + to_latent (mean + sd z).

    Everything has a place for h, where u is h and the rest zeros: centre, eigenvalues, pull and is_other
    (P, D), to_latent and to_noise (P, D, D) inverse to one another, log_det (P,) of the former. The log joint
    density given h is top + log_prior(h) - count h - (exp(-2 rate h) squares + |y|^2) / 2 with squares =
    least - 2 y pull + eigenvalues y^2; top, count and least (P,).
    """

    column: int
    rate: float
    log_prior: Callable[[Tensor], Tensor]
    hyper: AxisProposal
    centre: Tensor
    to_latent: Tensor
    to_noise: Tensor
    log_det: Tensor
    eigenvalues: Tensor
    pull: Tensor
    is_other: Tensor
    top: Tensor
    count: Tensor
    least: Tensor

    @property
    def num_noise(self) -> int:
        return self.centre.shape[1]

    def take(self, index: Tensor) -> "ConditionalProposal":
        names = ("centre", "to_latent", "to_noise", "log_det", "eigenvalues", "pull", "is_other")
        kept = {name: getattr(self, name)[index] for name in (*names, "top", "count", "least")}
        return replace(self, hyper=self.hyper.take(index), **kept)

    def _propose(self, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        j = self.column
        h, log_h = self.hyper.propose(noise[..., j : j + 1])
        precision, h = torch.exp(-2.0 * self.rate * h), h.squeeze(-1)
        mean, sd, log_sd = self._moments(precision)
        y = torch.addcmul(mean, sd, noise)
        y[..., j] = 0.0
        by_data, size = torch.bmm(y.square(), torch.stack([self.eigenvalues, self.is_other], -1)).unbind(-1)
        squares = self.least.unsqueeze(1) + by_data - 2.0 * torch.bmm(y, self.pull.unsqueeze(-1)).squeeze(-1)
        value = self.top.unsqueeze(1) + self.log_prior(h) - self.count.unsqueeze(1) * h
        value -= 0.5 * (precision.squeeze(-1) * squares + size)
        y[..., j] = h
        position = torch.baddbmm(self.centre.unsqueeze(1), y, self.to_latent.mT)
        return position, log_h + self._given_noise(noise, log_sd), value

    def _log_density(self, position: Tensor) -> Tensor:
        h = position[..., self.column : self.column + 1]
        mean, sd, log_sd = self._moments(torch.exp(-2.0 * self.rate * h))
        noise = (torch.bmm(position - self.centre.unsqueeze(1), self.to_noise.mT) - mean) / sd
        return self.hyper.log_density(h) + self._given_noise(noise, log_sd)

    def _moments(self, precision: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means and sds of the coordinates given the noise's precision (P, batch, 1), the sum of log sds."""
        spread = torch.addcmul(torch.ones_like(precision), precision, self.eigenvalues.unsqueeze(1))
        sd = spread.rsqrt()
        mean = torch.bmm(precision, self.pull.unsqueeze(1)).mul_(sd).mul_(sd)
        return mean, sd, -0.5 * spread.log_().sum(-1)

    def _given_noise(self, noise: Tensor, log_sd: Tensor) -> Tensor:
        size = torch.bmm(noise.square(), self.is_other.unsqueeze(-1)).squeeze(-1)
        constant = 0.5 * (noise.shape[-1] - 1) * math.log(2.0 * math.pi)
        return -0.5 * size - log_sd - constant - self.log_det.unsqueeze(1)


def conditional_proposal(task: Task, points: Tensor) -> ConditionalProposal | None:
    """The proposal at ``points``; None where the model is not of this kind."""
    density = task.density
    if not isinstance(density, AffineDensity) or density.noise_axes is None:
        return None
    axes = density.noise_axes.take(points)
    others, j, scale = axes.others, axes.scale.column, axes.scale
    shift = axes.from_prior  # the prior's pull at the centre, given as a shift of the centre

    def whole(values: Tensor) -> Tensor:
        out = values.new_zeros(len(values), values.shape[1] + 1)
        out[:, others] = values
        return out

    def square(matrix: Tensor) -> Tensor:
        out = matrix.new_zeros(len(matrix), len(others) + 1, len(others) + 1)
        out[:, others.unsqueeze(1), others] = matrix
        out[:, j, j] = 1.0
        return out

    centre = axes.centre + torch.bmm(axes.to_latent, shift.unsqueeze(-1)).squeeze(-1)
    about = 2.0 * axes.from_data - axes.eigenvalues * shift
    return ConditionalProposal(
        j,
        scale.rate,
        scale.log_prior,
        _on_grid(axes),
        whole(centre),
        square(axes.to_latent),
        square(axes.to_axes),
        axes.log_det,
        whole(axes.eigenvalues),
        whole(axes.from_data - axes.eigenvalues * shift),
        whole(torch.ones_like(shift)),
        axes.constant + 0.5 * shift.square().sum(1),
        scale.count * scale.rate,
        axes.least - (shift * about).sum(1),
    )


def _on_grid(axes: NoiseAxes) -> AxisProposal:
    """The marginal of h, known pointwise but for its constant, by a fine grid about its mode."""
    mode, _, bend = axes.noise_mode()
    sd = torch.where(bend < 0, -bend, 1.0).rsqrt()
    edges = fine_edges().to(mode)
    height = axes.marginal(mode.unsqueeze(1) + sd.unsqueeze(1) * edges)
    return piecewise(mode.unsqueeze(1), sd.view(-1, 1, 1), sd.log(), edges, height.unsqueeze(1))
