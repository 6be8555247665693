"""NUTS coordinates of posteriors that are Gaussian given one unknown noise: a gradient is O(D)."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayestie._affine import AffineDensity
from bayestie._engines._lanes import Momenta
from bayestie._engines._laplace_fit import LaplaceFit
from bayestie._engines._protocol import Task
from bayestie._engines._trajectories import Trajectories
from bayestie._noise_axes import AxesDensity, NoiseAxes

if TYPE_CHECKING:
    from bayestie._engines._native_axes import NativeAxes, NativeTicks
    from bayestie._engines._prior_table import PriorTable

_REACH = 40.0  # sds of h about its mode that its prior is tabulated over


@dataclass
class NoiseCoordinates:
    """z of every point: (h, y) = centre + width scale z in the axes of `NoiseAxes`, linear in the latents."""

    task: Task
    fit: LaplaceFit
    axes: NoiseAxes
    centre: Tensor  # (P, D)
    width: Tensor  # (P, D)
    scale: Tensor  # (P, D), learned in the warmup
    prior: "PriorTable | None" = None  # of h, where ticks are compiled

    def __post_init__(self) -> None:
        self._width = self.width * self.scale
        # The axes' map, with a place for h that leaves it as it is.
        others, j = self.axes.others, self.axes.scale.column
        self._start, size = torch.zeros_like(self.centre), self.centre.shape[1]
        self._start[:, others] = self.axes.centre
        self._to_latent = self.centre.new_zeros(len(self.centre), size, size)
        self._to_latent[:, others.unsqueeze(1), others] = self.axes.to_latent
        self._to_latent[:, j, j] = 1.0
        self._native = None if self.prior is None else self._compiled(self.prior)

    @property
    def points(self) -> Tensor:
        return self.fit.points

    def take(self, index: Tensor) -> "NoiseCoordinates":
        """Some of the points."""
        kept = {name: getattr(self, name)[index] for name in ("centre", "width", "scale")}
        return replace(self, fit=self.fit.take(index), axes=self.axes.take(index), **kept)

    def to_position(self, z: Tensor) -> Tensor:
        """(P, batch, D) -> (P, batch, num_latent)."""
        return torch.baddbmm(self._start.unsqueeze(1), self._at(z), self._to_latent.mT)

    def evaluate(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `Coordinates.evaluate`."""
        if self._native is not None:
            value, grad = self._native.value_and_grad(z)
        else:
            value, grad = AxesDensity(self.axes).value_and_grad(self._at(z))
            grad = grad * self._width.unsqueeze(1)
        return value, value, grad

    def whole_ticks(self, state: Trajectories, uniforms: Tensor, momenta: Momenta) -> "NativeTicks | None":
        """The ticks of a block, compiled on the CPU."""
        if self._native is None:
            return None
        from bayestie._engines._native_axes import NativeTicks

        return NativeTicks(self._native, state, uniforms, momenta)

    def _compiled(self, prior: "PriorTable") -> "NativeAxes":
        from bayestie._engines._native_axes import NativeAxes  # the compiler takes long to import

        return NativeAxes(AxesDensity(self.axes), self.centre, self._width, prior)

    def _at(self, z: Tensor) -> Tensor:
        return torch.addcmul(self.centre.unsqueeze(1), self._width.unsqueeze(1), z)


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
    coordinates = NoiseCoordinates(task, fit, axes, centre, width, torch.ones_like(centre))
    if centre.device.type != "cpu":
        return coordinates
    from bayestie._engines._prior_table import PriorTable

    reach = _REACH * width[:, j]
    low, high = float((centre[:, j] - reach).min()), float((centre[:, j] + reach).max())
    return replace(coordinates, prior=PriorTable(axes.scale.log_prior, low, high))
