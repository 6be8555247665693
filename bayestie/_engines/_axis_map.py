"""Coordinates in which a posterior is nearly standard normal: along its axes, the map that makes it so.

u = mode + factor T(z), T_j increasing and smooth, from the profile along axis j (`_axes.py`). A sampler's
step size is set by the stiffest place it meets; a skew axis is stiff on one side only, and T evens it out.
Hoffman et al. (2019), NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo, learn such a map; here it is
read off the density.
"""

from dataclasses import dataclass, replace

import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from bayestie._engines._axes import axis_proposal
from bayestie._engines._laplace_fit import LaplaceFit
from bayestie._engines._protocol import Task

REACH = 6.0  # beyond, the map is a straight line
_CELLS = 48
MAX_AXES = 300  # profiles of more axes cost as much as the chains
_PROBE = 64


@dataclass
class AxisMap:
    """A cubic spline per point and axis: coefficients (P, D, cells, 4), highest power first."""

    coefficients: Tensor

    def take(self, index: Tensor) -> "AxisMap":
        return replace(self, coefficients=self.coefficients[index])

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (P, batch, D) -> T, T' and T'' at it."""
        num_points, _, dim = z.shape
        width = 2.0 * REACH / _CELLS
        inside = z.clamp(-REACH, REACH)
        cell = ((inside + REACH) / width).long().clamp(max=_CELLS - 1)
        row = torch.arange(num_points * dim, device=z.device).view(num_points, 1, dim) * _CELLS + cell
        found = self.coefficients.view(-1, 4).index_select(0, row.view(-1))
        c3, c2, c1, c0 = found.view(*z.shape, 4).unbind(-1)
        s = inside - (cell * width - REACH)
        slope = (3.0 * c3 * s + 2.0 * c2) * s + c1
        value = ((c3 * s + c2) * s + c1) * s + c0 + slope * (z - inside)
        return value, slope, torch.where(z == inside, 6.0 * c3 * s + 2.0 * c2, 0.0)


def axis_map(task: Task, fit: LaplaceFit) -> AxisMap | None:
    """The map where it makes the posterior more normal at a point, the identity elsewhere; None: nowhere."""
    dim = fit.mode.shape[1]
    usable = dim <= MAX_AXES and task.density.is_skew_along_axes  # a funnel turns: its map would mislead
    if not usable or not bool(fit.converged.any()):
        return None
    proposal = axis_proposal(task, fit)
    knots = torch.linspace(-REACH, REACH, _CELLS + 1).to(fit.mode)
    t = proposal.along_axes(torch.special.ndtr(knots).expand(len(fit.points), dim, -1))[0]
    found = _spline(knots, t)
    identity = _spline(knots, knots.expand_as(t))
    middles = 0.5 * (knots[1:] + knots[:-1])
    everywhere = torch.cat([knots, middles]).view(1, -1, 1).expand(len(t), -1, dim)
    slope = AxisMap(found)(everywhere)[1]
    rising = torch.isfinite(found).flatten(2).all(-1) & (slope > 0.02).all(1)
    found = torch.where(rising.view(*rising.shape, 1, 1), found, identity)
    better = _spread(task, fit, proposal.factor, AxisMap(found)) < 0.9 * _spread(
        task, fit, proposal.factor, AxisMap(identity)
    )
    if not bool(better.any()):
        return None
    return AxisMap(torch.where(better.view(-1, 1, 1, 1), found, identity))


def _spline(knots: Tensor, t: Tensor) -> Tensor:
    coefficients = CubicSpline(
        knots.cpu().numpy(), t.nan_to_num().cpu().numpy(), axis=-1
    ).c  # (4, cells, P, D)
    return torch.as_tensor(coefficients).to(t).permute(2, 3, 1, 0).contiguous()


def _spread(task: Task, fit: LaplaceFit, factor: Tensor, map: AxisMap) -> Tensor:
    """Standard deviation of log density ratios to the standard normal in the map's coordinates, (P,)."""
    dim = fit.mode.shape[1]
    z = torch.stack([task.normals((_PROBE, dim), 203, int(point)) for point in fit.points])
    t, slope, _ = map(z)
    position = fit.mode.unsqueeze(1) + torch.bmm(t, factor.mT)
    value = task.density.value(fit.points, position) + slope.log().sum(-1)
    ratio = value + 0.5 * z.square().sum(-1)
    return torch.nan_to_num(ratio.std(1), nan=torch.inf)
