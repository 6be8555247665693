"""NUTS coordinates of posteriors that are Gaussian given one unknown noise: a gradient is O(D)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bayestie._affine import AffineDensity
from bayestie._engines._laplace_fit import LaplaceFit
from bayestie._engines._protocol import Task
from bayestie._noise_axes import AxesDensity, NoiseAxes


@dataclass
class NoiseCoordinates:
    """z of every point: (h, y) = centre + width z in the axes of `NoiseAxes`, a linear map of the latents."""

    task: Task
    fit: LaplaceFit
    axes: NoiseAxes
    centre: Tensor  # (P, D)
    width: Tensor  # (P, D)
    scale: Tensor  # (P, D), learned in the warmup

    def __post_init__(self) -> None:
        self.density = AxesDensity(self.axes)

    def take(self, index: Tensor) -> "NoiseCoordinates":
        """Some of the points."""
        kept = (getattr(self, name)[index] for name in ("centre", "width", "scale"))
        return NoiseCoordinates(self.task, self.fit.take(index), self.axes.take(index), *kept)

    def to_position(self, z: Tensor) -> Tensor:
        """(P, batch, D) -> (P, batch, num_latent)."""
        at, axes = self._at(z), self.axes
        position = at.clone()
        position[..., axes.others] = axes.centre.unsqueeze(1) + at[..., axes.others] @ axes.to_latent.mT
        return position

    def evaluate(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `Coordinates.evaluate`."""
        value, grad = self.density.value_and_grad(self._at(z))
        return value, value, grad * (self.width * self.scale).unsqueeze(1)

    def _at(self, z: Tensor) -> Tensor:
        return torch.addcmul(self.centre.unsqueeze(1), (self.width * self.scale).unsqueeze(1), z)


def noise_coordinates(task: Task, fit: LaplaceFit) -> NoiseCoordinates | None:
    """The coordinates about the fit's modes; None where the model is not of this kind."""
    density = task.density
    if not isinstance(density, AffineDensity) or density.noise_axes is None:
        return None
    axes = density.noise_axes.take(fit.points)
    j, others = axes.scale.column, axes.others
    centre = fit.mode.clone()
    away = (fit.mode[:, others] - axes.centre).unsqueeze(-1)
    centre[:, others] = torch.bmm(axes.to_axes, away).squeeze(-1)
    width = torch.ones_like(centre)
    width[:, others] = axes.pull(fit.mode[:, j : j + 1])[1].squeeze(1).rsqrt()
    # The sd of h alone, the other latents integrated out: the marginal covariance's diagonal.
    width[:, j] = fit.factor[:, j].norm(dim=1)
    return NoiseCoordinates(task, fit, axes, centre, width, torch.ones_like(centre))
