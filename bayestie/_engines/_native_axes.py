"""The density of `NoiseCoordinates` on the CPU, compiled: one pass over the coordinates of a lane."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayestie._engines import _kernels
from bayestie._noise_axes import AxesDensity

ValueAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]


def native_density(density: AxesDensity, centre: Tensor, width: Tensor, prior: ValueAndGrad) -> ValueAndGrad:
    """`AxesDensity.value_and_grad` at centre + width z, by z; ``prior`` gives that of h and its slope."""
    axes, scale, j = density.axes, density.axes.scale, density.column
    by_latent = (density.from_data, density.from_prior, density.eigenvalues, density.ones)
    arrays = [x.numpy() for x in (centre, width, *(x.squeeze(1) for x in by_latent), axes.least)]
    fixed = (*arrays, j, scale.rate, (scale.count * scale.rate).numpy())

    def value_and_grad(z: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.addcmul(centre[:, j : j + 1], width[:, j : j + 1], z[..., j])
        log_prior, slope = prior(h)
        known = ((axes.constant.unsqueeze(1) + log_prior).numpy(), slope.numpy())
        arguments: tuple[Any, ...] = (z.numpy(), *fixed, *known)
        value, grad = _kernels.axes_density(*arguments)
        return torch.from_numpy(value), torch.from_numpy(grad)

    return value_and_grad
