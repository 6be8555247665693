"""Axes in which a posterior that is Gaussian given one unknown noise sd is a sum over single numbers.

u = (h, x): with the noise's log sd h held, x is Gaussian of precision P + lambda G, lambda = exp(-2 rate h),
P the prior's and G the data's. In the eigenvectors of G relative to P everything is a scalar at any h: the
same decomposition as in Bates and DebRoy (2004, Linear mixed models and penalized least squares).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayestie._latent_scale import LatentScale, value_and_slope
from bayestie._quadratic import Quadratic
from bayestie._workers import eigh

# How far, in logs, from the noise that residuals about the prior's mean say its mode is looked for.
WIDEST = 12.0
_GRID = 241
_ZOOMS, _ZOOM = 4, 21
_POLISH = 4


@dataclass(frozen=True)
class NoiseAxes:
    """x = centre + to_latent y; the y are independent given h, of precision 1 + lambda eigenvalues.

    log p = constant + log_prior(h) - count rate h - lambda least / 2
            + sum_i y_i (from_prior + lambda from_data)_i - y_i^2 (1 + lambda eigenvalues)_i / 2

    Shapes: centre, eigenvalues, from_data, from_prior (P, D - 1); to_latent and to_axes (P, D - 1, D - 1),
    inverse to one another; log_det (P,) of the former; constant and least (P,). ``mode`` is what
    `noise_mode` has found, if it is known.
    """

    scale: LatentScale
    others: Tensor  # (D - 1,): the latents but h
    centre: Tensor
    to_latent: Tensor
    to_axes: Tensor
    log_det: Tensor
    eigenvalues: Tensor
    from_data: Tensor
    from_prior: Tensor
    least: Tensor
    constant: Tensor
    mode: tuple[Tensor, Tensor, Tensor] | None = None

    def take(self, points: Tensor) -> "NoiseAxes":
        """Some of the points."""
        names = ("centre", "to_latent", "to_axes", "log_det", "eigenvalues", "from_data", "from_prior")
        kept = {name: getattr(self, name)[points] for name in (*names, "least", "constant")}
        mode = None if self.mode is None else tuple(x[points] for x in self.mode)
        return replace(self, scale=self.scale.take(points), mode=mode, **kept)

    def pull(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Linear coefficients and precisions of the y at h (P, n): (P, n, D - 1) each."""
        precision = self.scale.precision(h).unsqueeze(-1)
        linear = self.from_prior.unsqueeze(1) + precision * self.from_data.unsqueeze(1)
        return linear, 1.0 + precision * self.eigenvalues.unsqueeze(1)

    def marginal(self, h: Tensor) -> Tensor:
        """Log joint of h (P, n) and the data, the y integrated out, but for a constant."""
        scale, (linear, spread) = self.scale, self.pull(h)
        precision = scale.precision(h)
        # Squares completed: where residuals vanish, differences of large numbers would leave rounding times
        # the precision. Directions of which the data say next to nothing have none to complete.
        known = self.eigenvalues > 1e-12 * self.eigenvalues.amax(1, keepdim=True)
        estimate = torch.where(known, self.from_data / torch.where(known, self.eigenvalues, 1.0), 0.0)
        least = (self.least - (estimate * self.from_data).sum(1)).clamp(min=0.0)
        apart = (estimate - self.from_prior).square().unsqueeze(1) * (1.0 - 1.0 / spread)
        each = torch.where(known.unsqueeze(1), -apart, linear.square() / spread) - spread.log()
        count = scale.count.unsqueeze(1) * scale.rate
        alone = scale.log_prior(h) - count * h - 0.5 * precision * least.unsqueeze(1)
        return alone + 0.5 * each.sum(-1)

    def noise_mode(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where the marginal of h is highest (P,), its number of maxima and its second derivative there.

        The joint density may have no mode at all: where every residual can vanish, it grows without bound as
        the noise goes to 0, however little mass there is. The second derivative is NaN where none was found.
        """
        if self.mode is not None:
            return self.mode
        # Residuals about the prior's own mean: the noise is hardly larger.
        about = self.least - 2.0 * (self.from_data * self.from_prior).sum(-1)
        about = about + (self.eigenvalues * self.from_prior.square()).sum(-1)
        start = 0.5 * (about.clamp(min=1e-300) / self.scale.count).log() / self.scale.rate
        h, num_modes = maxima(self.marginal, start, WIDEST / abs(self.scale.rate))
        slope, bend = torch.full_like(h, torch.inf), torch.full_like(h, torch.nan)
        for _ in range(_POLISH):
            slope, bend = slope_and_bend(lambda at: self.marginal(at.unsqueeze(1)).squeeze(1), h)
            h = torch.where(bend < 0, h - slope / bend, h)
        found = torch.isfinite(h) & (bend < 0) & (slope.square() <= -1e-10 * bend)
        return h, num_modes.clamp(min=1), torch.where(found, bend, torch.nan)

    def gaussian(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A Gaussian near the posterior: centre (P, D), covariance (P, D, D), number of modes, found or not.

        h with the curvature of its marginal, the others given h, their means moving with h as they do there.
        """
        h, num_modes, bend = self.noise_mode()
        found = torch.isfinite(bend)
        variance = torch.where(found, -1.0 / bend, 1.0)
        linear, spread = (part.squeeze(1) for part in self.pull(h.unsqueeze(1)))
        y = linear / spread
        by_h = -2.0 * self.scale.rate * self.scale.precision(h).unsqueeze(1)
        moved = by_h * (self.from_data - self.eigenvalues * y) / spread  # dy / dh
        across = torch.bmm(self.to_latent, moved.unsqueeze(-1))
        inner = torch.bmm(self.to_latent / spread.unsqueeze(1), self.to_latent.mT)
        inner = inner + variance.view(-1, 1, 1) * across * across.mT
        j, others = self.scale.column, self.others
        covariance = h.new_zeros(len(h), len(others) + 1, len(others) + 1)
        covariance[:, others.unsqueeze(1), others] = inner
        covariance[:, others, j] = covariance[:, j, others] = variance.unsqueeze(1) * across.squeeze(-1)
        covariance[:, j, j] = variance
        return self.to_position(h, y), covariance, num_modes, found

    def to_position(self, h: Tensor, y: Tensor) -> Tensor:
        """h (P,) and y (P, D - 1) -> latents (P, D)."""
        x = self.centre + torch.bmm(self.to_latent, y.unsqueeze(-1)).squeeze(-1)
        position = x.new_empty(len(x), x.shape[1] + 1)
        position[:, self.others], position[:, self.scale.column] = x, h
        return position


def find_noise_axes(scale: LatentScale, quadratic: Quadratic) -> NoiseAxes | None:
    """The axes at every point, about the posterior's centre; None where the prior is not proper."""
    dim, j = quadratic.slope.shape[1], scale.column
    others = torch.tensor([i for i in range(dim) if i != j], device=quadratic.slope.device)
    prior = -quadratic.curvature[:, others][:, :, others]
    data = 0.5 * scale.squares.curvature[:, others][:, :, others]
    factor, info = torch.linalg.cholesky_ex(prior)
    if bool((info != 0).any()) or not bool((scale.count > 0).all()):
        return None
    # Whitened by the prior, then turned to the eigenvectors of what the data add.
    half = torch.linalg.solve_triangular(factor, data, upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    eigenvalues, vectors = eigh(0.5 * (whitened + whitened.mT))
    to_latent = torch.linalg.solve_triangular(factor.mT, vectors, upper=True)
    axes = NoiseAxes(
        scale=scale,
        others=others,
        centre=torch.zeros_like(eigenvalues),
        to_latent=to_latent,
        to_axes=vectors.mT @ factor.mT,
        log_det=-factor.diagonal(dim1=1, dim2=2).log().sum(1),
        eigenvalues=eigenvalues.clamp(min=0.0),
        from_data=torch.zeros_like(eigenvalues),
        from_prior=torch.zeros_like(eigenvalues),
        least=torch.zeros_like(scale.count),
        constant=torch.zeros_like(scale.count),
    )  # directions alone: `_about` gives the rest
    # Sums of squares keep their digits about a centre near their least: first that of the data alone, then
    # the posterior's that is found from there.
    first = _about(axes, quadratic, scale.squares.centre)
    axes = _about(first, quadratic, first.gaussian()[0])
    return replace(axes, mode=axes.noise_mode())


def _about(axes: NoiseAxes, quadratic: Quadratic, centre: Tensor) -> NoiseAxes:
    at, others = centre.unsqueeze(1), axes.others
    least, slope = (part.squeeze(1) for part in axes.scale.squares.value_and_grad(at))
    constant, pull = (part.squeeze(1) for part in quadratic.value_and_grad(at))
    turned = axes.to_latent.mT @ torch.stack([-0.5 * slope[:, others], pull[:, others]], -1)
    return replace(
        axes,
        centre=centre[:, others],
        from_data=turned[..., 0],
        from_prior=turned[..., 1],
        least=least,
        constant=constant + axes.scale.constant,
    )


def maxima(function: Callable[[Tensor], Tensor], start: Tensor, width: float) -> tuple[Tensor, Tensor]:
    """Where a function of one number, at (P, n), is greatest near ``start`` (P,); its number of maxima."""
    offsets = torch.linspace(-width, width, _GRID).to(start)
    tried = start.unsqueeze(1) + offsets
    value = function(tried).nan_to_num(nan=-torch.inf)
    inner = (value[:, 1:-1] > value[:, :-2]) & (value[:, 1:-1] >= value[:, 2:])
    best, step = tried.gather(1, value.argmax(1, keepdim=True)).squeeze(1), 2.0 * width / (_GRID - 1)
    for _ in range(_ZOOMS):
        tried = best.unsqueeze(1) + torch.linspace(-step, step, _ZOOM).to(start)
        value = function(tried).nan_to_num(nan=-torch.inf)
        best = tried.gather(1, value.argmax(1, keepdim=True)).squeeze(1)
        step = 2.0 * step / (_ZOOM - 1)
    return best, inner.sum(1)


def slope_and_bend(function: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivatives of an elementwise function at (P,)."""
    with torch.enable_grad():
        leaf = at.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(function(leaf).sum(), leaf, create_graph=True)
        bend = torch.zeros_like(slope)
        if slope.requires_grad:
            (bend,) = torch.autograd.grad(slope.sum(), leaf)
    return slope.detach(), bend


class AxesDensity:
    """log p(h, y) of some points and its gradient in O(D): coordinates (P, batch, D) with h in its column."""

    def __init__(self, axes: NoiseAxes):
        self.axes, self.column = axes, axes.scale.column

        def whole(values: Tensor) -> Tensor:
            out = values.new_zeros(len(values), 1, values.shape[1] + 1)
            out[:, 0, axes.others] = values
            return out

        self.from_data, self.from_prior = whole(axes.from_data), whole(axes.from_prior)
        self.eigenvalues, self.ones = whole(axes.eigenvalues), whole(torch.ones_like(axes.eigenvalues))

    def value_and_grad(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Value (P, batch), the density of the latents, and gradient by the coordinates (P, batch, D)."""
        axes, scale, h = self.axes, self.axes.scale, at[..., self.column]
        log_prior, slope = value_and_slope(scale.log_prior, h)
        count, precision = scale.count.unsqueeze(1) * scale.rate, scale.precision(h)
        from_data = torch.addcmul(self.from_data, self.eigenvalues, at, value=-1.0)
        from_prior = torch.addcmul(self.from_prior, self.ones, at, value=-1.0)
        by_data = torch.linalg.vecdot(at, self.from_data + from_data)  # twice what they add to -squares / 2
        by_prior = 0.5 * torch.linalg.vecdot(at, self.from_prior + from_prior)
        squares = axes.least.unsqueeze(1) - by_data
        alone = axes.constant.unsqueeze(1) + log_prior - count * h - 0.5 * precision * squares
        grad = torch.addcmul(from_prior, precision.unsqueeze(-1), from_data)
        grad[..., self.column] = slope - count + scale.rate * precision * squares
        return alone + by_prior, grad
