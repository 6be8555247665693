"""Normal likelihoods with one unknown standard deviation: sums of squares stand for the observations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributions import ExpTransform, Normal, biject_to

from bayestie._families import Family
from bayestie._program import LaneProgram
from bayestie._quadratic import Quadratic


@dataclass(frozen=True)
class LatentScale:
    """Normal likelihoods of sd exp(rate h) times known ones, h one latent, and the prior of h.

    Their log density is constant - count rate h - exp(-2 rate h) squares(u) / 2, squares the weighted sum of
    squares of residuals, a quadratic in the other latents: the observations themselves are not needed again.
    """

    column: int  # of h among the latents
    rate: float
    count: Tensor  # (P,), weighted number of observations
    constant: Tensor  # (P,)
    squares: Quadratic
    log_prior: Callable[[Tensor], Tensor]  # of h, elementwise

    def take(self, points: Tensor) -> "LatentScale":
        """Some of the points."""
        count, constant = self.count[points], self.constant[points]
        return replace(self, count=count, constant=constant, squares=self.squares.take(points))

    def precision(self, h: Tensor) -> Tensor:
        """exp(-2 rate h): what the squares are multiplied by."""
        return torch.exp(-2.0 * self.rate * h)

    def value_and_grad(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Value (P, batch) and gradient (P, batch, D) at positions (P, batch, D)."""
        h = position[..., self.column]
        squares, grad = self.squares.value_and_grad(position)
        log_prior, slope = value_and_slope(self.log_prior, h)
        count, precision = self.count.unsqueeze(1), self.precision(h)
        value = log_prior + self.constant.unsqueeze(1) - count * self.rate * h - 0.5 * precision * squares
        grad = -0.5 * precision.unsqueeze(-1) * grad
        grad[..., self.column] += slope + self.rate * (precision * squares - count)
        return value, grad

    def hessian(self, position: Tensor) -> Tensor:
        """Second derivatives (P, D, D) at one position per point (P, D)."""
        h, j = position[:, self.column], self.column
        squares, grad = (x.squeeze(1) for x in self.squares.value_and_grad(position.unsqueeze(1)))
        precision = self.precision(h)
        hessian = -0.5 * precision.view(-1, 1, 1) * self.squares.curvature
        cross = self.rate * precision.unsqueeze(1) * grad
        hessian[:, j] += cross
        hessian[:, :, j] += cross
        with torch.enable_grad():
            leaf = h.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(self.log_prior(leaf).sum(), leaf, create_graph=True)
            bend = torch.zeros_like(h)
            if slope.requires_grad:
                (bend,) = torch.autograd.grad(slope.sum(), leaf)
        hessian[:, j, j] += bend - 2.0 * self.rate**2 * precision * squares
        return hessian


def value_and_slope(function: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    """An elementwise function and its derivative."""
    with torch.enable_grad():
        leaf = at.detach().requires_grad_(True)
        value = function(leaf)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), slope


@dataclass(frozen=True)
class ScaleSite:
    """One latent h that the sds of Normal likelihoods are exp(rate h) of, times known ones."""

    column: int
    rate: float
    families: list[int]  # which ones
    log_prior: Callable[[Tensor], Tensor]  # elementwise, with the Jacobian


def find_scale_site(program: LaneProgram, families: Sequence[Family], matrix: Tensor) -> ScaleSite | None:
    """The latent that is nothing but the common sd of Normal likelihoods, if there is one.

    ``matrix`` (P, M, D) maps latents to the predictors of all families. That the prior found is h's share of
    the rest of the model is left for the caller to check.
    """
    column, rate, own, start = None, 0.0, [], 0
    for number, family in enumerate(families):
        loc, scale = start, start + family.size
        start += family.size * len(family.names)
        is_normal = issubclass(family.distribution, Normal) and family.names == ("loc", "scale")
        if not (is_normal and isinstance(family.links[1], ExpTransform)):
            continue
        moved = matrix[:, scale : scale + family.size]
        # Entries are differences of values: an ulp is nothing.
        columns = torch.nonzero(moved.abs().amax((0, 1)) > _NOTHING).squeeze(1)
        if len(columns) != 1 or (column is not None and int(columns) != column):
            continue
        j = int(columns)
        first = float(moved[0, 0, j])
        known = bool((matrix[:, loc : loc + family.size, j].abs() <= _NOTHING).all())
        rate = first if column is None else rate
        if known and bool(((moved[..., j] - rate).abs() <= 1e-9 * abs(rate)).all()):
            column = j
            own.append(number)
    prior = None if column is None else _prior_of(program, column)
    return None if column is None or prior is None else ScaleSite(column, rate, own, prior)


def _prior_of(program: LaneProgram, column: int) -> Callable[[Tensor], Tensor] | None:
    name = next(n for n, site in program.latent.items() if site.slice.start <= column < site.slice.stop)
    where = program.latent[name].slice
    if where.stop - where.start != 1:
        return None
    position = torch.zeros(program.num_latent, dtype=program.dtype, device=program.device)
    with torch.no_grad(), program.quiet():
        msg = program.run_lane(position, program.point(0)).messages[name]
    fn, transform = msg["fn"], biject_to(msg["fn"].support)
    if fn.event_shape or fn.batch_shape.numel() != 1:
        return None
    shape = fn.batch_shape

    def log_prior(h: Tensor) -> Tensor:
        x = h.reshape(-1, *(1 for _ in shape))
        value = transform(x)
        return (fn.log_prob(value) + transform.log_abs_det_jacobian(x, value)).reshape(h.shape)

    return log_prior


def latent_scale(site: ScaleSite, families: Sequence[Family], matrix: Tensor, offset: Tensor) -> LatentScale:
    """The site's likelihoods as sums of squares, about the least squares of what they say alone."""
    num_points, _, dim = matrix.shape
    curvature, pull = matrix.new_zeros(num_points, dim, dim), matrix.new_zeros(num_points, dim)
    count, constant = matrix.new_zeros(num_points), matrix.new_zeros(num_points)
    blocks, start = [], 0
    for number, family in enumerate(families):
        stop = start + family.size
        if number in site.families:
            here = family.constants
            weight = (here["<scale>"] * here["<weight>"] * here["<mask>"]).expand(num_points, -1)
            log_known = offset[:, stop : stop + family.size]
            precision = weight * torch.exp(-2.0 * log_known)
            residual = here["<value>"] - offset[:, start:stop]
            own = matrix[:, start:stop]
            curvature += torch.bmm((own * precision.unsqueeze(-1)).mT, own)
            pull += torch.bmm(own.mT, (precision * residual).unsqueeze(-1)).squeeze(-1)
            count += weight.sum(1)
            constant -= (weight * (log_known + 0.5 * _LOG_TWO_PI)).sum(1)
            blocks.append((own, residual, precision))
        start += family.size * len(family.names)
    # Sums of squares keep their digits about a centre near their minimum; a small ridge finds one.
    ridge = curvature.diagonal(dim1=1, dim2=2).amax(1).clamp(min=1e-300).view(-1, 1, 1) * 1e-8
    eye = torch.eye(dim, dtype=matrix.dtype, device=matrix.device)
    factor, info = torch.linalg.cholesky_ex(curvature + ridge * eye)
    centre = torch.cholesky_solve(pull.unsqueeze(-1), factor).squeeze(-1)
    centre = torch.where((info == 0).unsqueeze(1) & torch.isfinite(centre), centre, 0.0)
    least, slope = matrix.new_zeros(num_points), torch.zeros_like(pull)
    for own, residual, precision in blocks:
        left = residual - torch.bmm(own, centre.unsqueeze(-1)).squeeze(-1)
        least += (precision * left.square()).sum(1)
        slope -= 2.0 * torch.bmm(own.mT, (precision * left).unsqueeze(-1)).squeeze(-1)
    squares = Quadratic(centre, least, slope, 2.0 * curvature)
    return LatentScale(site.column, site.rate, count, constant, squares, site.log_prior)


_NOTHING = 1e-12
_LOG_TWO_PI = 1.8378770664093453
