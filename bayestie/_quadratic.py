"""A quadratic function of the latents at every point of a sweep."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Quadratic:
    """constant + d (slope + curvature d / 2) with d = u - centre, at every point."""

    centre: Tensor  # (P, D)
    constant: Tensor  # (P,)
    slope: Tensor  # (P, D)
    curvature: Tensor  # (P, D, D)

    def take(self, points: Tensor) -> "Quadratic":
        """Some of the points."""
        return Quadratic(*(x[points] for x in (self.centre, self.constant, self.slope, self.curvature)))

    def value_and_grad(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Value (P, batch) and gradient (P, batch, D) at positions (P, batch, D)."""
        step = position - self.centre.unsqueeze(1)
        half = 0.5 * torch.bmm(step, self.curvature)
        slope = self.slope.unsqueeze(1) + half
        return self.constant.unsqueeze(1) + (step * slope).sum(-1), slope + half
