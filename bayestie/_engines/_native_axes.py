"""NUTS in the coordinates of `NoiseAxes` on the CPU, compiled: one pass over the coordinates of a lane."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bayestie._engines import _axes_kernels
from bayestie._engines._prior_table import PriorTable
from bayestie._engines._trajectories import Trajectories
from bayestie._noise_axes import AxesDensity

if TYPE_CHECKING:
    from bayestie._engines._lanes import Momenta, Slots


class NativeAxes:
    """`AxesDensity` at centre + width z, by z, the prior of h from its table."""

    def __init__(self, density: AxesDensity, centre: Tensor, width: Tensor, prior: PriorTable):
        axes, scale = density.axes, density.axes.scale
        by_latent = (density.from_data, density.from_prior, density.eigenvalues, density.ones)
        by_point = (axes.least, scale.count * scale.rate, axes.constant)
        arrays = (centre, width, *(x.squeeze(1) for x in by_latent), *by_point)
        self.fixed = (tuple(x.contiguous().numpy() for x in arrays), density.column, scale.rate)
        self.h = (
            centre[:, density.column : density.column + 1],
            width[:, density.column : density.column + 1],
        )
        self.prior, self.column = prior, density.column

    def value_and_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """At (P, batch, D): values (P, batch) and gradients."""
        log_prior, slope = self.prior(torch.addcmul(*self.h, z[..., self.column]))
        known = (log_prior.numpy(), slope.numpy())
        value, grad = _axes_kernels.axes_density(z.contiguous().numpy(), *self.fixed, *known)
        return torch.from_numpy(value), torch.from_numpy(grad)


class NativeTicks:
    """A block of ticks, compiled whole; lanes go on one after the other, and never wait for one another.

    A lane stands still where it needs what the compiled program has not: another momentum, or the prior of h
    where there is no table. It is given that, and goes on from there.
    """

    def __init__(self, density: NativeAxes, state: Trajectories, uniforms: Tensor, momenta: "Momenta"):
        self.density, self.state, self.momenta = density, state, momenta
        self.uniforms = uniforms.numpy()
        lanes = len(state.counts)
        self.tick, self.stands = np.zeros(lanes, dtype=np.int64), np.zeros(lanes, dtype=np.int64)
        self.given, self.is_given = np.zeros((lanes, 2)), np.zeros(lanes, dtype=np.bool_)
        self.wanted = np.zeros(lanes)
        axes, *rest = density.fixed
        self.fixed = (axes, *rest, lanes // len(axes[0]))
        names = ("last", "drawn", "sub", "ends", "sums", "checkpoints", "numbers", "counts")
        self.trees = tuple(getattr(state, name).numpy() for name in names)

    def run(self, until: int, steps: Tensor, pending: Tensor, tally: Tensor, slots: "Slots") -> int:
        """As `WholeTicks.run`."""
        state, table, leapfrogs = self.state, self.density.prior, 0
        while True:
            leapfrogs += _axes_kernels.block(
                self.trees,
                (state.forward.numpy(), state.diverging.numpy(), state.max_depth),
                (self.uniforms, self.momenta.ready.numpy(), steps.numpy()),
                (self.tick, self.stands, pending.numpy(), self.momenta.used.numpy()),
                (*(x.numpy() for x in slots), tally.numpy()),
                self.fixed,
                (table.within, table.step, table.table, self.given, self.is_given, self.wanted),
                until,
            )
            if (self.stands == _axes_kernels.MOVES).all():
                break
            if (self.stands == _axes_kernels.WANTS_MOMENTUM).any():
                self.momenta.extend()
            without = np.flatnonzero(self.stands == _axes_kernels.WANTS_PRIOR)
            if len(without):
                value, slope = table.exactly(torch.from_numpy(self.wanted[without]))
                self.given[without, 0], self.given[without, 1] = value.numpy(), slope.numpy()
                self.is_given[without] = True
        return leapfrogs
