"""Exact draws where a posterior is Gaussian given one unknown noise standard deviation.

In the axes of `_noise_axes` everything is a scalar at any noise: its marginal posterior is known pointwise,
is put on a fine grid and drawn from, and the other latents follow from their conditional. The way of INLA
(Rue, Martino and Chopin 2009) with a Gaussian likelihood; the importance weights check the grid.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bayestie._affine import AffineDensity
from bayestie._engines._axes import AxisProposal, fine_edges, piecewise
from bayestie._engines._by_points import ByPoints
from bayestie._engines._protocol import Task
from bayestie._noise_axes import NoiseAxes


@dataclass
class ConditionalProposal(ByPoints):
    """h from its marginal, the others from their Gaussian given h.

    Shapes: centre (P, D - 1), to_latent and to_noise (P, D - 1, D - 1) inverse to one another, log_det (P,)
    of the former, eigenvalues and pull (P, D - 1).
    """

    column: int
    rate: float
    hyper: AxisProposal
    centre: Tensor
    to_latent: Tensor
    to_noise: Tensor
    log_det: Tensor
    eigenvalues: Tensor
    pull: Tensor

    @property
    def num_noise(self) -> int:
        return self.centre.shape[1] + 1

    def take(self, index: Tensor) -> "ConditionalProposal":
        names = ("centre", "to_latent", "to_noise", "log_det", "eigenvalues", "pull")
        kept = (getattr(self, name)[index] for name in names)
        return ConditionalProposal(self.column, self.rate, self.hyper.take(index), *kept)

    def _propose(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        here, others = noise[..., :1], noise[..., 1:]
        h, log_density = self.hyper.propose(here)
        mean, sd = self._moments(h)
        x = self.centre.unsqueeze(1) + torch.bmm(mean + sd * others, self.to_latent.mT)
        j = self.column
        return torch.cat([x[..., :j], h, x[..., j:]], -1), log_density + self._given_noise(others, sd)

    def _log_density(self, position: Tensor) -> Tensor:
        j = self.column
        h, x = position[..., j : j + 1], torch.cat([position[..., :j], position[..., j + 1 :]], -1)
        mean, sd = self._moments(h)
        noise = (torch.bmm(x - self.centre.unsqueeze(1), self.to_noise.mT) - mean) / sd
        return self.hyper.log_density(h) + self._given_noise(noise, sd)

    def _moments(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Means and sds of the coordinates given h (P, batch, 1), (P, batch, D - 1)."""
        precision = torch.exp(-2.0 * self.rate * h)
        variance = 1.0 / (1.0 + precision * self.eigenvalues.unsqueeze(1))
        return precision * self.pull.unsqueeze(1) * variance, variance.sqrt()

    def _given_noise(self, noise: Tensor, sd: Tensor) -> Tensor:
        constant = 0.5 * noise.shape[-1] * math.log(2.0 * math.pi)
        return -(0.5 * noise.square() + sd.log()).sum(-1) - constant - self.log_det.unsqueeze(1)


def conditional_proposal(task: Task, points: Tensor) -> ConditionalProposal | None:
    """The proposal at ``points``; None where the model is not of this kind."""
    density = task.density
    if not isinstance(density, AffineDensity) or density.noise_axes is None:
        return None
    axes = density.noise_axes.take(points)
    shift = axes.from_prior  # the prior's pull at the centre, given as a shift of the centre
    return ConditionalProposal(
        axes.scale.column,
        axes.scale.rate,
        _on_grid(axes),
        axes.centre + torch.bmm(axes.to_latent, shift.unsqueeze(-1)).squeeze(-1),
        axes.to_latent,
        axes.to_axes,
        axes.log_det,
        axes.eigenvalues,
        axes.from_data - axes.eigenvalues * shift,
    )


def _on_grid(axes: NoiseAxes) -> AxisProposal:
    """The marginal of h, known pointwise but for its constant, by a fine grid about its mode."""
    mode, _, bend = axes.noise_mode()
    sd = torch.where(bend < 0, -bend, 1.0).rsqrt()
    edges = fine_edges().to(mode)
    height = axes.marginal(mode.unsqueeze(1) + sd.unsqueeze(1) * edges)
    return piecewise(mode.unsqueeze(1), sd.view(-1, 1, 1), sd.log(), edges, height.unsqueeze(1))
