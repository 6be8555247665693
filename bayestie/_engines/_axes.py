"""A Laplace proposal corrected for skewness and tails, one whitened axis at a time.

u = mode + factor t with t_j drawn from the posterior's own profile along axis j: its density at
mode + factor e_j t_j on a grid, interpolated. This extends the correction of a Gaussian approximation's
marginals of Rue, Martino and Chopin (2009, section 3.2.3) to the joint distribution, and uses it as an
importance proposal: the weights see what it misses. The axes are the density's choice (`Density.axes`).
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from bayestie._engines._by_points import ByPoints
from bayestie._engines._laplace_fit import LaplaceFit
from bayestie._engines._protocol import Task
from bayestie._workers import solve

# Where a profile is evaluated, in Laplace standard deviations, on either side.
_SIDE = (0.4, 0.8, 1.3, 1.9, 2.6, 3.5, 4.7, 6.5, 9.0, 13.0, 20.0, 32.0, 50.0)
_CELLS = 12  # cells of the interpolation between two nodes
_DROP = 60.0  # a log density this far below the mode is nothing


@dataclass
class AxisProposal(ByPoints):
    """Independent piecewise log-linear densities along the columns of ``factor``, -inf outside the cells.

    Shapes: mode (P, D), factor (P, D, D), log_det (P,), edges (F + 1,) of the cells, log_height (P, D, F + 1)
    normalised, cumulative (P, D, F + 1).
    """

    mode: Tensor
    factor: Tensor
    log_det: Tensor
    edges: Tensor
    log_height: Tensor
    cumulative: Tensor

    @property
    def num_noise(self) -> int:
        return self.mode.shape[1]

    def take(self, index: Tensor) -> "AxisProposal":
        names = ("mode", "factor", "log_det", "log_height", "cumulative")
        return replace(self, **{name: getattr(self, name)[index] for name in names})

    def _propose(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        t, log_density = self.along_axes(torch.special.ndtr(noise).mT)
        position = self.mode.unsqueeze(1) + torch.bmm(t.mT, self.factor.mT)
        return position, log_density.sum(1) - self.log_det.unsqueeze(1)

    def along_axes(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Quantiles t at probabilities (P, D, n), and the log density of every axis there."""
        uniform = uniform.contiguous()
        cell = torch.searchsorted(self.cumulative, uniform, right=True).clamp(1, len(self.edges) - 1) - 1
        left, right = self.edges[cell], self.edges[cell + 1]
        low, high = self.log_height.gather(-1, cell), self.log_height.gather(-1, cell + 1)
        below, above = self.cumulative.gather(-1, cell), self.cumulative.gather(-1, cell + 1)
        share = ((uniform - below) / (above - below).clamp(min=1e-300)).clamp(0.0, 1.0)
        # Inverse of the distribution function of a density proportional to exp(slope s), 0 <= s <= 1.
        slope = high - low
        steep = slope.abs() > 1e-6
        safe = torch.where(steep, slope, 1.0)
        inside = torch.where(steep, torch.log1p(share * torch.expm1(safe)) / safe, share)
        inside = inside.clamp(0.0, 1.0)
        return left + (right - left) * inside, low + slope * inside

    def _log_density(self, position: Tensor) -> Tensor:
        t = solve(self.factor, (position - self.mode.unsqueeze(1)).mT)  # (P, D, batch)
        cell = torch.searchsorted(self.edges, t.contiguous(), right=True).clamp(1, len(self.edges) - 1) - 1
        low, high = self.log_height.gather(-1, cell), self.log_height.gather(-1, cell + 1)
        share = (t - self.edges[cell]) / (self.edges[cell + 1] - self.edges[cell])
        inside = ((share >= 0) & (share <= 1)).all(1)
        total = (low + share * (high - low)).sum(1) - self.log_det.unsqueeze(1)
        return torch.where(inside, total, -torch.inf)


def axis_proposal(task: Task, fit: LaplaceFit) -> AxisProposal:
    """Profiles of the posterior along the oriented axes of a Laplace fit, at each of its points."""
    factor = task.density.axes(fit.points, fit.factor)
    nodes = torch.as_tensor(_nodes()).to(fit.mode)
    profile = task.density.profile(fit.points, fit.mode, factor, nodes)
    top = profile.nan_to_num(nan=-torch.inf, posinf=-torch.inf).amax(-1, keepdim=True)
    profile = torch.nan_to_num(profile - top, nan=-_DROP, neginf=-_DROP).clamp(min=-_DROP)
    edges = fine_edges().to(fit.mode)
    height = PchipInterpolator(_nodes(), profile.cpu().numpy(), axis=-1)(edges.cpu().numpy())
    return piecewise(fit.mode, factor, fit.log_det, edges, torch.as_tensor(height).to(fit.mode))


def _nodes() -> np.ndarray:
    return np.array([-x for x in reversed(_SIDE)] + [0.0, *_SIDE])


def fine_edges() -> Tensor:
    """The edges of all cells, in standard deviations."""
    nodes = _nodes()
    places = np.arange((len(nodes) - 1) * _CELLS + 1) / _CELLS
    return torch.as_tensor(np.interp(places, np.arange(len(nodes)), nodes))


def piecewise(
    mode: Tensor, factor: Tensor, log_det: Tensor, edges: Tensor, log_height: Tensor
) -> AxisProposal:
    """The proposal of densities known at the edges (P, D, F + 1) but for a constant each."""
    top = log_height.nan_to_num(nan=-torch.inf, posinf=-torch.inf).amax(-1, keepdim=True)
    log_height = torch.nan_to_num(log_height - top, nan=-_DROP, neginf=-_DROP).clamp(min=-_DROP)
    mass = _cell_mass(log_height, edges)
    total = mass.sum(-1, keepdim=True)
    cumulative = torch.cat([torch.zeros_like(total), (mass / total).cumsum(-1)], -1)
    return AxisProposal(
        mode, factor, log_det, edges, log_height - total.log(), cumulative / cumulative[..., -1:]
    )


def _cell_mass(log_height: Tensor, edges: Tensor) -> Tensor:
    """Integral of exp over each cell, log density linear in it."""
    low, high = log_height[..., :-1], log_height[..., 1:]
    slope = high - low
    steep = slope.abs() > 1e-6
    safe = torch.where(steep, slope, 1.0)
    mean = torch.where(steep, torch.exp(low) * torch.expm1(safe) / safe, torch.exp(0.5 * (low + high)))
    return mean * edges.diff()
