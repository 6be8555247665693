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
# A profile that a cubic through its neighbours misses by more, where it matters, is put on a grid of its own.
_MISSED = 0.3  # times the root of the density relative to its top
_FAR = 1e8
_PLACINGS = 2  # each narrows a wall between two edges about a hundredfold


@dataclass
class AxisProposal(ByPoints):
    """Independent piecewise log-linear densities along the columns of ``factor``, -inf outside the cells.

    Shapes: mode (P, D), factor (P, D, D), log_det (P,), edges (P, D, F + 1) of the cells, log_height
    (P, D, F + 1) normalised, cumulative (P, D, F + 1).
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
        names = ("mode", "factor", "log_det", "edges", "log_height", "cumulative")
        return replace(self, **{name: getattr(self, name)[index] for name in names})

    def _propose(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        t, log_density = self.along_axes(torch.special.ndtr(noise).mT)
        position = self.mode.unsqueeze(1) + torch.bmm(t.mT, self.factor.mT)
        return position, log_density.sum(1) - self.log_det.unsqueeze(1)

    def along_axes(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Quantiles t at probabilities (P, D, n), and the log density of every axis there."""
        uniform = uniform.contiguous()
        cell = torch.searchsorted(self.cumulative, uniform, right=True).clamp(1, self.edges.shape[-1] - 1) - 1
        left, right = self.edges.gather(-1, cell), self.edges.gather(-1, cell + 1)
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
        cell = torch.searchsorted(self.edges, t.contiguous(), right=True)
        cell = cell.clamp(1, self.edges.shape[-1] - 1) - 1
        low, high = self.log_height.gather(-1, cell), self.log_height.gather(-1, cell + 1)
        left = self.edges.gather(-1, cell)
        share = (t - left) / (self.edges.gather(-1, cell + 1) - left)
        inside = ((share >= 0) & (share <= 1)).all(1)
        total = (low + share * (high - low)).sum(1) - self.log_det.unsqueeze(1)
        return torch.where(inside, total, -torch.inf)


def axis_proposal(task: Task, fit: LaplaceFit) -> AxisProposal:
    """Profiles of the posterior along the oriented axes of a Laplace fit, at each of its points."""
    factor = task.density.axes(fit.points, fit.factor)
    nodes = torch.as_tensor(_nodes()).to(fit.mode)
    profile = task.density.profile(fit.points, fit.mode, factor, nodes)
    missed = _missed(nodes, profile)
    profile = _below_top(profile)
    edges = fine_edges().to(fit.mode)
    height = PchipInterpolator(_nodes(), profile.cpu().numpy(), axis=-1)(edges.cpu().numpy())
    height = torch.as_tensor(height).to(fit.mode)
    edges = edges.expand_as(height)
    if bool(missed.any()):
        edges, height = _placed(task, fit, factor, missed, edges, height, nodes, profile)
    return piecewise(fit.mode, factor, fit.log_det, edges, height)


def _below_top(profile: Tensor) -> Tensor:
    top = profile.nan_to_num(nan=-torch.inf, posinf=-torch.inf).amax(-1, keepdim=True)
    return torch.nan_to_num(profile - top, nan=-_DROP, neginf=-_DROP).clamp(min=-_DROP)


def _missed(nodes: Tensor, profile: Tensor) -> Tensor:
    """Which axes (P, D) are rougher than their nodes show: a wall beside a plain, as of separated data.

    Every node is foretold from its two neighbours on either side, exactly so were the profile a cubic.
    """
    low = profile - profile.nan_to_num(nan=-torch.inf, posinf=-torch.inf).amax(-1, keepdim=True)
    x, near = nodes.unfold(0, 5, 1), low.nan_to_num(nan=-_FAR).clamp(min=-_FAR).unfold(-1, 5, 1)
    foretold: Tensor = torch.zeros_like(profile[..., 2:-2])
    for i in (0, 1, 3, 4):
        others = [k for k in (0, 1, 3, 4) if k != i]
        share = torch.stack([(x[:, 2] - x[:, k]) / (x[:, i] - x[:, k]) for k in others]).prod(0)
        foretold = foretold + share * near[..., i]
    missed = (foretold - near[..., 2]).abs() * torch.exp(0.5 * near[..., 2])
    return ~(missed <= _MISSED).all(-1)


def _placed(
    task: Task,
    fit: LaplaceFit,
    factor: Tensor,
    missed: Tensor,
    edges: Tensor,
    height: Tensor,
    nodes: Tensor,
    profile: Tensor,
) -> tuple[Tensor, Tensor]:
    """Edges and heights (P, D, F + 1), those of the axes in ``missed`` placed where their profiles bend."""
    axis = torch.nonzero(missed.any(0)).squeeze(1)
    here = missed[:, axis]
    columns = factor[:, :, axis] * here.unsqueeze(1)  # an axis that stays still costs no evaluation
    own = _spread_edges(nodes.expand_as(profile[:, axis]), profile[:, axis], edges.shape[-1])
    for last in range(_PLACINGS, 0, -1):
        found = _below_top(task.density.profile(fit.points, fit.mode, columns, own))
        if last > 1:
            own = _spread_edges(own, found, edges.shape[-1])
    edges, height, here = edges.clone(), height.clone(), here.unsqueeze(-1)
    edges[:, axis] = torch.where(here, own, edges[:, axis])
    height[:, axis] = torch.where(here, found, height[:, axis])
    return edges, height


def _spread_edges(at: Tensor, profile: Tensor, num: int) -> Tensor:
    """``num`` edges that share equally what is in the cells ``at`` (..., G): mass, ascent and length."""
    low, high = profile[..., :-1], profile[..., 1:]
    mass = torch.exp(torch.maximum(low, high)) * at.diff()
    ascent = high.clamp(min=-_DROP / 2).sub(low.clamp(min=-_DROP / 2)).abs()
    length = torch.ones_like(mass)
    parts = (x / x.sum(-1, keepdim=True).clamp(min=1e-300) for x in (mass, ascent, length))
    total = torch.nn.functional.pad(sum(parts, torch.zeros_like(mass)).cumsum(-1), (1, 0))
    wanted = torch.linspace(0.0, 1.0, num).to(at) * total[..., -1:]
    cell = torch.searchsorted(total, wanted.contiguous(), right=True).clamp(1, at.shape[-1] - 1) - 1
    start, step = total.gather(-1, cell), total.gather(-1, cell + 1) - total.gather(-1, cell)
    share = ((wanted - start) / step).clamp(0.0, 1.0)
    return at.gather(-1, cell) * (1.0 - share) + at.gather(-1, cell + 1) * share


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
    """The proposal of densities known at the edges, (P, D, F + 1) or (F + 1,), but for a constant each."""
    edges = edges.expand_as(log_height).contiguous()
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
