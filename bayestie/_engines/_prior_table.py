"""A density of one number as a table: values and slopes on a fine grid, cubics between.

The prior of a noise's log sd is some thirty operations of torch on a few hundred numbers; in a posterior
whose gradient is one compiled pass they would take most of the time.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bayestie._engines import _axes_kernels
from bayestie._latent_scale import value_and_slope

_CELLS = 1 << 15
_ACCURACY = 1e-10  # of values, relative to 1 + their size; otherwise there is no table


class PriorTable:
    """log p(h) and its derivative at any h (P, batch), by table where it is as good as the function."""

    def __init__(self, function: Callable[[Tensor], Tensor], low: float, high: float):
        self.function, self.low, self.high = function, low, high
        nodes = torch.linspace(low, high, _CELLS + 1, dtype=torch.float64)
        values, slopes = value_and_slope(function, nodes)
        self.step = (high - low) / _CELLS
        self.table = torch.stack([values, slopes * self.step], 1).numpy()
        between = nodes[:-1] + 0.5 * self.step
        found, _ = self._from_table(between.unsqueeze(0))
        expected = function(between)
        error = (found.squeeze(0) - expected).abs() / (1.0 + expected.abs())
        self.is_good = bool((error <= _ACCURACY).all())

    def __call__(self, h: Tensor) -> tuple[Tensor, Tensor]:
        if self.is_good and bool((h > self.low).all()) and bool((h < self.high).all()):
            return self._from_table(h)
        return self.exactly(h)

    def exactly(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """By the function, wherever h is."""
        return value_and_slope(self.function, h)

    @property
    def within(self) -> tuple[float, float]:
        """Where the table serves: between these, (0, 0) if nowhere."""
        return (self.low, self.high) if self.is_good else (0.0, 0.0)

    def _from_table(self, h: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = np.empty(h.shape), np.empty(h.shape)
        _axes_kernels.interpolate(h.numpy(), self.low, self.step, self.table, value, slope)
        return torch.from_numpy(value), torch.from_numpy(slope)
