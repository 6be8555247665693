"""The Gaussian prior of a tie: a strength as a filter on its spectrum. No Pyro statement is made here."""

import math
from collections.abc import Callable
from typing import Literal

import pyro.distributions as dist
import torch
from torch import Tensor

from bayestie._tie_arguments import TieArguments, split_shape


class TiePrior:
    """theta = level + U diag(sqrt v(sigma)) z.

    Shapes: K copies, r coefficients, c components, event shape E, batch dims B to the left.
    level (*B, *E), or (*B, c, *E) for several components; z (*B, r, *E); theta (*B, K, *E).
    """

    def __init__(self, args: TieArguments):
        self.args = args
        self.tie, self.form, self.layout = args.tie, args.form, args.tie.layout
        self.several = args.tie.num_components > 1
        self.known_level = args.base if isinstance(args.base, Tensor) else None
        self.level_distribution = (
            None if isinstance(args.base, Tensor) else self._level_distribution(args.base)
        )

    @property
    def batch_shape(self) -> torch.Size:
        """Batch dims of the parameters themselves."""
        args = self.args
        shapes = [split_shape(args.sigma.shape, args.event_dim)[0]]
        if args.event_scale_tril is not None:
            shapes.append(split_shape(args.event_scale_tril.shape[:-1], args.event_dim)[0])
        if self.known_level is not None:
            shapes.append(split_shape(self.known_level.shape, len(args.level_shape))[0])
        if self.level_distribution is not None:
            shapes.append(self.level_distribution.batch_shape)
        return torch.broadcast_shapes(*shapes)

    # -- alignment -------------------------------------------------------------------------------------------

    @property
    def _copy_dim(self) -> int:
        return -1 - self.args.event_dim

    def beside_copies(self, value: Tensor) -> Tensor:
        """(*B, *E) -> (*B, 1, *E), ready to broadcast against copies, coefficients or components."""
        return value.unsqueeze(self._copy_dim) if value.dim() > self.args.event_dim else value

    def beside_levels(self, value: Tensor) -> Tensor:
        """(*B, *E) to broadcast against levels (*B, [c,] *E)."""
        return self.beside_copies(value) if self.several else value

    def spread(self, value: Tensor, over: Literal["labels", "coefficient_labels"]) -> Tensor:
        """Something per level, (*B, [c,] *E), to every copy or coefficient of its component."""
        if not self.several:
            return self.beside_copies(value)
        if value.dim() <= self.args.event_dim or value.shape[self._copy_dim] == 1:
            return value
        return value.index_select(self._copy_dim, self.layout.index(over, self.args.device))

    def constant(self, name: str) -> Tensor:
        """A float attribute of the layout, (n,) -> (n, 1, ..., 1)."""
        args = self.args
        values = self.layout.cast(name, lambda: getattr(self.layout, name), args.dtype, args.device)
        return values.reshape(-1, *(1,) * args.event_dim)

    def per_level(self, name: str) -> Tensor:
        """A float attribute of the components, ready to broadcast against levels."""
        return self.constant(name) if self.several else self.constant(name)[0]

    def tril_beside_copies(self) -> Tensor:
        tril = self.args.event_scale_tril
        assert tril is not None
        return tril.unsqueeze(self._copy_dim - 1) if tril.dim() > self.args.event_dim + 1 else tril

    def _on_copies(self, apply: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return apply(x.movedim(self._copy_dim, -1)).movedim(-1, self._copy_dim)

    # -- the filter ------------------------------------------------------------------------------------------

    @property
    def base_loc(self) -> Tensor:
        """m0 of a Normal base."""
        return self.args.base_kernel.loc.to(self.args.dtype)

    @property
    def base_scale(self) -> Tensor:
        """s of a Normal base."""
        return self.args.base_kernel.scale.to(self.args.dtype)

    def coefficient_scale(self) -> Tensor:
        """sqrt v_j, broadcastable to (*B, r, *E).

        `level`: sigma / sqrt l_j; otherwise 1 / sqrt(l_j / sigma^2 + 1 / s^2), written so that sigma = 0 and
        sigma = inf give the limit with finite gradients.
        """
        eigenvalues = self.constant("eigenvalues")
        if self.form == "level":
            return self.beside_copies(self.args.sigma) / eigenvalues.sqrt()
        low, ratio, soft, scale = self._coefficient_ratio()
        firm = low / (eigenvalues + ratio.square()).sqrt()
        return torch.where(soft, scale / (1 + eigenvalues * ratio.square()).sqrt(), firm)

    def coefficient_variance(self) -> Tensor:
        """Marginal variance of each coefficient, (*B, r, *E), with the event's correlation."""
        variance = self.coefficient_scale().square()
        if self.args.event_scale_tril is None:
            return variance
        return variance * self.beside_copies(self.args.event_scale_tril.square().sum(-1))

    def level_scale(self) -> Tensor:
        """Standard deviation of the level in the forms `copies` and `matched`, broadcastable to (*B, [c,]
        *E).

        `copies`: s / sqrt K. `matched`: the square root of s^2 - sum_j v_j / K
        = s^2 (1 + sum_j l_j / (l_j + sigma^2 / s^2)) / K, a sum of positive terms;
        around a hub of s^2 - v = s^2 / (1 + sigma^2 / s^2).
        """
        sizes = self.per_level("component_sizes")
        if self.form == "copies":
            return self.base_scale / sizes.sqrt()
        low, ratio, soft, scale = _ratio(self.beside_levels(self.args.sigma), self.base_scale)
        hub = torch.where(soft, low * ratio, scale) / (1 + ratio.square()).sqrt()
        if self.layout.hubs_only:
            return hub
        _, ratio, soft, _ = self._coefficient_ratio()
        eigenvalues = self.constant("eigenvalues")
        inverse = eigenvalues * ratio.square()
        kept = torch.where(soft, inverse / (1 + inverse), eigenvalues / (eigenvalues + ratio.square()))
        mean = self.base_scale * ((1 + self._sum_per_component(kept, "coefficient_labels")) / sizes).sqrt()
        return torch.where(self.per_level("hub_mask") > 0, hub, mean) if self.tie.has_hub else mean

    def hub_variance(self) -> Tensor:
        """Variance of a deviation from a hub, (*B, [c,] *E)."""
        sigma = self.beside_levels(self.args.sigma)
        if self.form == "level":
            return sigma.square()
        low, ratio, _, _ = _ratio(sigma, self.base_scale)
        return low.square() / (1 + ratio.square())

    def _coefficient_ratio(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scale = self.spread(self.base_scale, "coefficient_labels")
        return _ratio(self.beside_copies(self.args.sigma), scale)

    def _sum_per_component(self, values: Tensor, over: Literal["labels", "coefficient_labels"]) -> Tensor:
        """(*B, K or r, *E) -> (*B, [c,] *E)."""
        if not self.several:
            return values.sum(self._copy_dim)
        shape = list(values.shape)
        shape[self._copy_dim] = self.tie.num_components
        index = self.layout.index(over, values.device)
        return values.new_zeros(shape).index_add(self._copy_dim, index, values)

    # -- the level -------------------------------------------------------------------------------------------

    @property
    def level_may_be_fixed(self) -> bool:
        """Whether the level's variance vanishes at some strength: around a hub, `matched`, sigma = inf."""
        return self.form == "matched" and self.tie.has_hub

    def _level_distribution(self, base):
        """The law of the level, event shape E or (c, *E)."""
        shape = self.args.level_shape
        if self.form != "level":
            loc, scale = self.base_loc, self.level_scale()
            full = torch.broadcast_shapes(loc.shape, scale.shape, shape)
            law = dist.Normal(loc.expand(full), scale.expand(full), validate_args=False)
            return law.to_event(len(shape))
        lead, _ = split_shape(base.batch_shape + base.event_shape, len(shape))
        kept = shape[: len(shape) - base.event_dim]
        return base.expand(lead + kept).to_event(len(kept))

    # -- maps ------------------------------------------------------------------------------------------------

    def combine(self, level: Tensor, z: Tensor | None) -> Tensor:
        """theta from the level and standard normal coefficients; z is None where the tie has no edge."""
        theta = self.spread(level, "labels")
        if z is not None:
            return theta + self.deviations(z)
        batch, _ = split_shape(theta.shape, 1 + self.args.event_dim)
        return theta.expand(*batch, self.tie.num_copies, *self.args.event_shape)

    def deviations(self, z: Tensor) -> Tensor:
        """U diag(sqrt v) z, with event_scale_tril T sigma T U diag(1 / sqrt l) z; (*B, K, *E)."""
        if self.args.event_scale_tril is None:
            return self._on_copies(self.tie.synthesize, self.coefficient_scale() * z)
        unit = self._on_copies(self.tie.synthesize, z / self.constant("eigenvalues").sqrt())
        return self.beside_copies(self.args.sigma) * (self.tril_beside_copies() @ unit[..., None])[..., 0]

    def location(self, theta: Tensor) -> Tensor:
        """What copies of a component share, (*B, [c,] *E): their mean, or the first copy where anchored."""
        if not self.several and self.tie.anchored:
            return theta.select(self._copy_dim, 0)
        means = self._sum_per_component(theta, "labels") / self.per_level("component_sizes")
        if not self.tie.anchored:
            return means
        first = theta.index_select(self._copy_dim, self.layout.index("first_copies", theta.device))
        return torch.where(self.per_level("anchored_mask") > 0, first, means)

    def coefficients(self, theta: Tensor, location: Tensor) -> Tensor:
        """U^T (theta - location), whitened over the event by event_scale_tril; (*B, r, *E)."""
        deviation = theta - self.spread(location, "labels")
        if self.args.event_scale_tril is not None:
            sigma = self.beside_copies(self.args.sigma)
            unit = torch.where(sigma > 0, deviation / sigma, 0.0)[..., None]
            deviation = (
                sigma * torch.linalg.solve_triangular(self.tril_beside_copies(), unit, upper=False)[..., 0]
            )
        return self._on_copies(self.tie.analyze, deviation)

    def split(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """A level and coefficients z with combine(level, z) = theta; z = 0 where sigma = 0."""
        level = self.location(theta)
        scale = self.coefficient_scale()
        return level, torch.where(scale > 0, self.coefficients(theta, level) / scale, 0.0)

    def noise_of(self, theta: Tensor, level: Tensor) -> dict[str, Tensor]:
        """The standard normal sites, by the end of their names, that give these copies and this level."""
        z = self.coefficients(theta, level) / self.coefficient_scale()
        if not self.level_may_be_fixed:
            return {"_z": z}
        return {"_z": z, "_level_z": (level - self.base_loc) / self.level_scale()}

    def variance(self) -> Tensor:
        """Prior variance of every copy, broadcastable to (*B, K, *E)."""
        variance = self.args.sigma.new_zeros(())
        if self.tie.rank:
            variance = self._on_copies(self.tie.diagonal, self.coefficient_variance())
        if self.level_distribution is None:
            return variance
        return variance + self.spread(self.level_distribution.variance, "labels")

    # -- densities -------------------------------------------------------------------------------------------

    def log_volume(self, *, hubs_integrated: bool = False) -> Tensor:
        """log |d theta / d (location, coefficients)|, per event element, broadcastable to (*B, *E).

        1/2 sum of log K_c over components whose location is a mean (around a hub only where the hub is
        integrated out, which also takes one coefficient away), and log T_ii per coefficient.
        """
        parts = self.tie.components
        means = [part.num_copies for part in parts if not part.anchored and (hubs_integrated or not part.hub)]
        volume = self.args.sigma.new_full((), 0.5 * sum(map(math.log, means)))
        if self.args.event_scale_tril is None:
            return volume
        num = self.tie.rank - hubs_integrated * sum(part.hub for part in parts)
        return volume + num * self.args.event_scale_tril.diagonal(dim1=-2, dim2=-1).log()

    def deviation_log_prob(self, z: Tensor) -> Tensor:
        """log density on theta space of the deviations given sigma and the level, (*B,).

        Per event element -q / (2 sigma^2) - r log sigma + 1/2 log |L|_+ - (r / 2) log 2 pi - 1/2 sum_c log
        K_c in the form `level`; an element whose sigma is 0 has no deviation and counts 0. Added to the
        level's log density it is log p(theta), or log p(theta, level) around hubs.
        """
        scale = self.coefficient_scale()
        safe = torch.where(scale > 0, scale, 1.0)
        terms = -0.5 * z.square() - safe.log() - 0.5 * math.log(2 * math.pi)
        per_element = terms.sum(self._copy_dim) - self.log_volume()
        return sum_right(torch.where(self.args.sigma > 0, per_element, 0.0), self.args.event_dim)

    def energy(self, z: Tensor) -> Tensor:
        """q = sum_e w_e |Delta_e|^2 per event element, (*B, *E), from z: sigma^2 |z|^2 in the form `level`.

        With event_scale_tril, of the deviations whitened over the event.
        """
        if self.form == "level":
            return self.args.sigma.square() * z.square().sum(self._copy_dim)
        return (self.constant("eigenvalues") * (self.coefficient_scale() * z).square()).sum(self._copy_dim)


def sum_right(values: Tensor, num_dims: int) -> Tensor:
    """Sum over the last dims."""
    return values.sum(tuple(range(-num_dims, 0))) if num_dims else values


def _ratio(sigma: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """min(sigma, s), min / max, whether sigma > s, and s."""
    sigma, scale = torch.broadcast_tensors(sigma, scale)
    soft = sigma > scale
    # where, not minimum: the gradient at sigma = s must be that of one side, not half of each.
    low, high = torch.where(soft, scale, sigma), torch.where(soft, sigma, scale)
    return low, low / high, soft, scale
