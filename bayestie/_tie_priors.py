"""The Gaussian prior of a tie: a strength as a filter on its spectrum. No Pyro statement is made here."""

import math
from collections.abc import Sequence
from typing import Literal

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from bayestie._errors import BaseError, FormError, ShapeError, StrengthError
from bayestie._ties import Tie

Form = Literal["level", "copies", "matched"]
Strength = float | Tensor
Base = float | Tensor | TorchDistributionMixin

_FORMS = ("level", "copies", "matched")


class TiePrior:
    """theta = level + U diag(sqrt v(sigma)) z, with everything aligned, checked and in one dtype.

    Shapes: K copies, r coefficients, c components, event shape E, any batch dims B to the left.
    level (*B, *E), or (*B, c, *E) for several components; z (*B, r, *E); theta (*B, K, *E).

    Args:
        site: name used in errors.
        batch_shape: batch dims that plates give, where known; a strength of just that shape is then one per batch.
    """

    def __init__(
        self,
        tie: Tie,
        sigma: Strength,
        base: Base,
        form: Form = "level",
        event_shape: Sequence[int] = (),
        event_scale_tril: Tensor | None = None,
        *,
        site: str,
        batch_shape: torch.Size | None = None,
    ):
        self.tie, self.form, self.site = tie, form, site
        self.event_shape = torch.Size(event_shape)
        self.level_shape = level_shape(tie, self.event_shape)
        self.base = base
        _check_form(self, event_scale_tril)
        self.dtype, self.device = common_dtype(sigma, base, event_scale_tril)
        self.sigma = self._align("sigma", self._tensor(sigma), self.event_shape, batch_shape)
        _check_sigma(self, sigma)
        self.event_scale_tril = (
            None if event_scale_tril is None else self._align_tril(event_scale_tril, batch_shape)
        )
        self.known_level: Tensor | None = None
        if not isinstance(base, TorchDistributionMixin):
            self.known_level = self._align("base", self._tensor(base), self.level_shape, batch_shape)
        self.level_distribution = (
            None if self.known_level is not None else self._level_distribution(base, batch_shape)
        )

    # -- alignment ------------------------------------------------------------------------------------------------

    @property
    def event_dim(self) -> int:
        return len(self.event_shape)

    @property
    def batch_shape(self) -> torch.Size:
        """Batch dims of the parameters themselves."""
        shapes = [self.sigma.shape[: max(self.sigma.dim() - self.event_dim, 0)]]
        if self.event_scale_tril is not None:
            shapes.append(
                self.event_scale_tril.shape[: max(self.event_scale_tril.dim() - 1 - self.event_dim, 0)]
            )
        if self.known_level is not None:
            shapes.append(self.known_level.shape[: max(self.known_level.dim() - len(self.level_shape), 0)])
        if self.level_distribution is not None:
            shapes.append(self.level_distribution.batch_shape)
        return torch.broadcast_shapes(*shapes)

    def _tensor(self, value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(dtype=self.dtype, device=self.device)
        return torch.full((), value, dtype=self.dtype, device=self.device)

    def _align(self, what: str, value: Tensor, target: torch.Size, batch_shape: torch.Size | None) -> Tensor:
        """Dims right of the batch line up with `target`; a value of just the plates' shape is one per batch."""
        lead, tail = _split(value.shape, len(target))
        fits_right = _fits(tail, target) and (batch_shape is None or _fits(lead, batch_shape))
        fits_batch = (
            bool(batch_shape) and len(target) > 0 and value.numel() > 1 and _fits(value.shape, batch_shape)
        )
        if fits_right and not fits_batch:
            return value
        if fits_batch and not fits_right:
            return value.reshape(*value.shape, *(1,) * len(target))
        batch = "any batch" if batch_shape is None else f"batch {tuple(batch_shape)}"
        fix = (
            "Both fit. Add trailing dims of size 1 for one value per batch, leading ones for one value per event element."
            if fits_right
            else "Batch dims (plates, particles) stand left of the event dims."
        )
        raise ShapeError(
            f"{what} of tied site '{self.site}'",
            found=f"shape {tuple(value.shape)}",
            expected=f"a shape that broadcasts to {batch} + {tuple(target)}",
            fix=fix,
        )

    def _align_tril(self, value: Tensor, batch_shape: torch.Size | None) -> Tensor:
        num = self.event_shape[-1] if self.event_shape else 0
        if not self.event_shape or value.dim() < 2 or value.shape[-2:] != (num, num):
            raise ShapeError(
                f"event_scale_tril of tied site '{self.site}'",
                found=f"shape {tuple(value.shape)} for event shape {tuple(self.event_shape)}",
                expected="shape (..., n, n), n the last event dim",
                fix="Pass event_shape=(..., n).",
            )
        value = self._tensor(value)
        self._align("event_scale_tril", value[..., 0], self.event_shape, batch_shape)
        if validating() and not bool(
            (value.tril() == value).all() & (value.diagonal(dim1=-2, dim2=-1) > 0).all()
        ):
            raise ShapeError(
                f"event_scale_tril of tied site '{self.site}'",
                found="an entry above the diagonal, or a diagonal that is not positive",
                expected="a lower-triangular matrix with a positive diagonal",
                fix="Take torch.linalg.cholesky of the covariance.",
            )
        return value

    def _beside_copies(self, value: Tensor, event_dim: int | None = None) -> Tensor:
        """(*B, *E) -> (*B, 1, *E), ready to broadcast against copies or coefficients."""
        event_dim = self.event_dim if event_dim is None else event_dim
        return value.unsqueeze(-1 - event_dim) if value.dim() > event_dim else value

    def _spread(self, value: Tensor, over: Literal["labels", "coefficient_labels"]) -> Tensor:
        """Something per level, (*B, [c,] *E), to every copy or coefficient of its component."""
        if self.tie.num_components == 1:
            return self._beside_copies(value)
        dim = -1 - self.event_dim
        if value.dim() <= self.event_dim or value.shape[dim] == 1:
            return value
        return value.index_select(dim, self._index(over))

    def _constant(self, name: str) -> Tensor:
        """An attribute of the tie, (n,) -> (n, 1, ..., 1), in the prior's dtype."""
        cast = self.tie.cast(name, lambda: getattr(self.tie, name), dtype=self.dtype, device=self.device)
        return cast.reshape(-1, *(1,) * self.event_dim)

    @property
    def eigenvalues(self) -> Tensor:
        return self._constant("eigenvalues")

    # -- the filter -----------------------------------------------------------------------------------------------

    @property
    def _strength(self) -> Tensor:
        return self._beside_copies(self.sigma)

    @property
    def _base_scale(self) -> Tensor:
        return self._gaussian[1]

    def coefficient_scale(self) -> Tensor:
        """sqrt v_j, broadcastable to (*B, r, *E).

        `level`: sigma / sqrt l_j; otherwise 1 / sqrt(l_j / sigma^2 + 1 / s^2), written so that sigma = 0 and
        sigma = inf give the limit, with finite gradients.
        """
        if self.form == "level":
            return self._strength / self.eigenvalues.sqrt()
        low, ratio, soft, scale = self._ratio()
        return torch.where(
            soft,
            scale / (1 + self.eigenvalues * ratio.square()).sqrt(),
            low / (self.eigenvalues + ratio.square()).sqrt(),
        )

    def _ratio(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """min(sigma, s), min / max, whether sigma > s, and s: all per coefficient."""
        return _ratio(self._strength, self._spread(self._base_scale, "coefficient_labels"))

    def level_scale(self) -> Tensor:
        """Standard deviation of the level in the forms `copies` and `matched`, broadcastable to (*B, [c,] *E).

        `copies`: s / sqrt K. `matched`: the square root of s^2 - sum_j v_j / K
        = s^2 (1 + sum_j l_j / (l_j + sigma^2 / s^2)) / K, a sum of positive terms;
        of s^2 - v = s^2 / (1 + sigma^2 / s^2) for exchangeable copies.
        """
        scale = self._base_scale
        several = self.tie.num_components > 1
        sizes = self._constant("component_sizes")
        if not several:
            sizes = sizes[0]
        if self.form == "copies":
            return scale / sizes.sqrt()
        spectral = None
        if not self.tie._hubs_only:
            _, ratio, soft, _ = self._ratio()
            inverse = self.eigenvalues * ratio.square()
            kept = torch.where(
                soft, inverse / (1 + inverse), self.eigenvalues / (self.eigenvalues + ratio.square())
            )
            spectral = scale * ((1 + self._sum_per_component(kept)) / sizes).sqrt()
            if not self.tie.has_hub:
                return spectral
        _, ratio, soft, scale = _ratio(self._beside_copies(self.sigma) if several else self.sigma, scale)
        hub = scale * torch.where(soft, ratio, torch.ones_like(ratio)) / (1 + ratio.square()).sqrt()
        return hub if spectral is None else torch.where(self._hub_mask(), hub, spectral)

    def _hub_mask(self) -> Tensor:
        mask = self._constant("hub_mask")
        return (mask if self.tie.num_components > 1 else mask[0]) > 0

    def _sum_per_component(self, values: Tensor) -> Tensor:
        """(*B, r, *E) -> (*B, [c,] *E)."""
        dim = -1 - self.event_dim
        if self.tie.num_components == 1:
            return values.sum(dim)
        return _index_sum(values, self._index("coefficient_labels"), self.tie.num_components, dim)

    def _index(self, name: Literal["labels", "coefficient_labels", "first_copies"]) -> Tensor:
        return self.tie.cast(name, lambda: getattr(self.tie, name), dtype=torch.int64, device=self.device)

    # -- the level ------------------------------------------------------------------------------------------------

    @property
    def level_may_be_fixed(self) -> bool:
        """Whether the level's variance vanishes at some strength (sigma = inf, matched, exchangeable)."""
        return self.form == "matched" and self.tie.has_hub

    def level_loc(self) -> Tensor:
        """Mean of a Normal base, aligned with the level."""
        return self._gaussian[0]

    @property
    def _gaussian(self) -> tuple[Tensor, Tensor]:
        """loc and scale of a Normal base."""
        base = self.base
        while isinstance(base, torch.distributions.Independent):
            base = base.base_dist
        assert isinstance(base, torch.distributions.Normal)
        return self._tensor(base.loc), self._tensor(base.scale)

    def _level_distribution(self, base: TorchDistributionMixin, batch_shape: torch.Size | None):
        found = base.batch_shape + base.event_shape
        lead, tail = _split(found, len(self.level_shape))
        event_dim = base.event_dim
        outside = batch_shape is not None and not _fits(lead, batch_shape)
        if not _fits(tail, self.level_shape) or outside or event_dim > len(self.level_shape):
            raise BaseError(
                f"base of tied site '{self.site}'",
                found=f"batch shape {tuple(base.batch_shape)}, event shape {tuple(base.event_shape)}",
                expected=f"shapes that broadcast to the level's, {tuple(self.level_shape)}",
                fix="Batch dims (plates, particles) stand left of the level's dims: index with [..., None] where needed.",
            )
        if event_dim and base.event_shape != self.level_shape[len(self.level_shape) - event_dim :]:
            raise BaseError(
                f"base of tied site '{self.site}'",
                found=f"event shape {tuple(base.event_shape)}",
                expected=f"the last dims of {tuple(self.level_shape)}",
                fix="Pass event_shape= to tied, or change the base's event.",
            )
        if self.form != "level":
            loc, scale = self._gaussian[0], self.level_scale()
            shape = torch.broadcast_shapes(loc.shape, scale.shape, self.level_shape)
            return dist.Normal(loc, scale, validate_args=False).expand(shape).to_event(len(self.level_shape))
        kept = self.level_shape[: len(self.level_shape) - event_dim]
        return base.expand(lead + kept).to_event(len(kept))

    # -- maps -----------------------------------------------------------------------------------------------------

    def combine(self, level: Tensor, z: Tensor | None) -> Tensor:
        """theta from the level and standard normal coefficients; z is None where the tie has no edge."""
        theta = self._spread(level, "labels")
        if z is not None:
            return theta + self._deviations(z)
        batch = theta.shape[: max(theta.dim() - 1 - self.event_dim, 0)]
        return theta.expand(*batch, self.tie.num_copies, *self.event_shape)

    def _deviations(self, z: Tensor) -> Tensor:
        if self.event_scale_tril is None:
            return self._on_copies(self.tie.synthesize, self.coefficient_scale() * z)
        whole = self._on_copies(self.tie.synthesize, z / self.eigenvalues.sqrt())
        mixed = (self._tril_beside_copies() @ whole[..., None])[..., 0]
        return self._strength * mixed

    def _tril_beside_copies(self) -> Tensor:
        assert self.event_scale_tril is not None
        return self._beside_copies(self.event_scale_tril, self.event_dim + 1)

    def _on_copies(self, apply, x: Tensor) -> Tensor:
        if self.event_dim == 0:
            return apply(x)
        dim = -1 - self.event_dim
        return apply(x.movedim(dim, -1)).movedim(-1, dim)

    def location(self, theta: Tensor) -> Tensor:
        """What the copies of each component share: their mean, or the first copy where anchored; (*B, [c,] *E)."""
        dim = -1 - self.event_dim
        if self.tie.num_components == 1:
            return theta.select(dim, 0) if self.tie.anchored else theta.mean(dim)
        sizes = self._constant("component_sizes")
        means = _index_sum(theta, self._index("labels"), self.tie.num_components, dim) / sizes
        if not self.tie.anchored:
            return means
        first = theta.index_select(dim, self._index("first_copies"))
        return torch.where(self._anchored_mask(), first, means)

    def _anchored_mask(self) -> Tensor:
        return self._constant("anchored_mask") > 0

    def coefficients(self, theta: Tensor, level: Tensor) -> Tensor:
        """U^T (theta - level), whitened over the event where it is correlated by event_scale_tril; (*B, r, *E)."""
        deviation = theta - self._spread(level, "labels")
        if self.event_scale_tril is not None:
            unit = (deviation / self._strength)[..., None]
            solved = torch.linalg.solve_triangular(self._tril_beside_copies(), unit, upper=False)[..., 0]
            deviation = self._strength * solved
        return self._on_copies(self.tie.analyze, deviation)

    def split(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """A level and coefficients z with combine(level, z) = theta; z = 0 where sigma = 0."""
        level = self.location(theta)
        scale = self.coefficient_scale()
        positive = scale > 0
        z = self.coefficients(theta, level) / torch.where(positive, scale, torch.ones_like(scale))
        return level, torch.where(positive, z, torch.zeros_like(z))

    # -- densities ------------------------------------------------------------------------------------------------

    def log_volume(self, *, hubs_integrated: bool = False) -> Tensor:
        """log |d theta / d (location, coefficients)|, per event element, broadcastable to (*B, *E).

        1/2 sum of log K_c over components whose location is a mean (of exchangeable ones only where the hub is
        integrated out, which also takes one coefficient away), and log T_ii per coefficient.
        """
        parts = self.tie.components
        means = [part.num_copies for part in parts if not part.anchored and (hubs_integrated or not part.hub)]
        volume = self._tensor(0.5 * sum(map(math.log, means)))
        if self.event_scale_tril is None:
            return volume
        num = self.tie.rank - hubs_integrated * sum(part.hub for part in parts)
        return volume + num * self.event_scale_tril.diagonal(dim1=-2, dim2=-1).log()

    def deviation_log_prob(self, z: Tensor) -> Tensor:
        """log density on theta space of the deviations given sigma and the level, (*B,).

        Per event element -q / (2 sigma^2) - r log sigma + 1/2 log |L|_+ - (r / 2) log 2 pi - 1/2 sum_c log K_c in the
        form `level`; an element whose sigma is 0 has no deviation and counts 0. Added to the level's log density it is
        log p(theta), or log p(theta, level) for exchangeable copies.
        """
        scale = self.coefficient_scale()
        safe = torch.where(scale > 0, scale, torch.ones_like(scale))
        terms = -0.5 * z.square() - safe.log() - 0.5 * math.log(2 * math.pi)
        per_element = terms.sum(-1 - self.event_dim) - self.log_volume()
        return _sum_right(
            torch.where(self.sigma > 0, per_element, torch.zeros_like(per_element)), self.event_dim
        )

    def log_prob(self, theta: Tensor) -> Tensor:
        """log p(theta), (*B,), hubs integrated out."""
        location = self.location(theta)
        scale = self.coefficient_scale()
        x = self.coefficients(theta, location)
        terms = -0.5 * (x / scale).square() - self._contrasts() * (scale.log() + 0.5 * math.log(2 * math.pi))
        per_element = terms.sum(-1 - self.event_dim) - self.log_volume(hubs_integrated=True)
        return _sum_right(per_element, self.event_dim) + self._location_distribution().log_prob(location)

    def _contrasts(self) -> Tensor:
        """Share of each coefficient in the log determinant: K_c copies around an integrated hub have K_c - 1 contrasts."""
        return self._constant("contrast_shares")

    def _location_distribution(self):
        """Law of `location`: the level, plus the mean of the deviations around a hub."""
        if not self.tie.has_hub:
            if self.level_distribution is None:
                raise self._degenerate()
            if not _is_real(self.level_distribution.support):
                raise self._no_density("a base on part of the real line")
            return self.level_distribution
        several = self.tie.num_components > 1
        sizes = self._constant("component_sizes")
        shares = torch.where(self._hub_mask(), 1 / (sizes if several else sizes[0]), 0.0)
        sigma = self._beside_copies(self.sigma) if several else self.sigma
        if self.known_level is not None and not self.tie._hubs_only:
            raise self._degenerate()
        base = self.level_distribution
        inner = base
        while isinstance(inner, torch.distributions.Independent):
            inner = inner.base_dist
        dims = len(self.level_shape)
        if not (
            inner is None
            or isinstance(inner, (torch.distributions.Normal, torch.distributions.MultivariateNormal))
        ):
            raise self._no_density(f"a {type(inner).__name__} base with exchangeable copies")
        if self.event_scale_tril is None and not isinstance(inner, torch.distributions.MultivariateNormal):
            loc, variance = (self.known_level, 0.0) if inner is None else (inner.loc, inner.variance)
            spread = sigma.square() if self.form == "level" else self._hub_variance(sigma)
            scale = (variance + shares * spread).sqrt()
            shape = torch.broadcast_shapes(loc.shape, scale.shape, self.level_shape)
            return dist.Normal(loc, scale, validate_args=False).expand(shape).to_event(dims)
        num = self.event_shape[-1]
        tril = torch.eye(num, dtype=self.dtype, device=self.device)
        if self.event_scale_tril is not None:
            tril = self._tril_beside_copies() if several else self.event_scale_tril
        scaled = sigma.expand(torch.broadcast_shapes(sigma.shape, (num,)))[..., None] * tril
        covariance = shares[..., None] * (scaled @ scaled.mT) if self.event_dim else scaled
        if inner is None:
            loc = self.known_level
        elif isinstance(inner, torch.distributions.Normal):
            loc, covariance = inner.loc, covariance + torch.diag_embed(inner.variance)
        else:
            loc, covariance = inner.loc, covariance + inner.covariance_matrix
        shape = torch.broadcast_shapes(loc.shape, covariance.shape[:-1], self.level_shape)
        return (
            dist.MultivariateNormal(loc.expand(shape), covariance, validate_args=False)
            .expand(shape[:-1])
            .to_event(dims - 1)
        )

    def _hub_variance(self, sigma: Tensor) -> Tensor:
        low, ratio, _, _ = _ratio(sigma, self._base_scale)
        return low.square() / (1 + ratio.square())

    def _degenerate(self) -> BaseError:
        return self._no_density(
            "a known level, which leaves the copies of a component fewer dims than copies"
        )

    def _no_density(self, found: str) -> BaseError:
        return BaseError(
            f"log_prob of tied site '{self.site}'",
            found=found,
            expected="a density on all of R^K in closed form",
            fix="State the site with tied, or reparametrise it with TieReparam.",
        )

    def coefficient_variance(self) -> Tensor:
        """Marginal variance of each coefficient of the deviations, (*B, r, *E)."""
        if self.event_scale_tril is None:
            return self.coefficient_scale().square()
        rows = self._beside_copies(self.event_scale_tril.square().sum(-1))
        return self.coefficient_scale().square() * rows

    def energy(self, z: Tensor) -> Tensor:
        """q = sum_e w_e |Delta_e|^2 per event element, (*B, *E), from z: sigma^2 |z|^2 in the form `level`.

        With event_scale_tril, of the deviations whitened over the event.
        """
        if self.form == "level":
            return self.sigma.square() * z.square().sum(-1 - self.event_dim)
        return (self.eigenvalues * (self.coefficient_scale() * z).square()).sum(-1 - self.event_dim)


def level_shape(tie: Tie, event_shape: Sequence[int]) -> torch.Size:
    """E for one component, (c, *E) for several."""
    return torch.Size(event_shape if tie.num_components == 1 else (tie.num_components, *event_shape))


def validating() -> bool:
    """Whether values are checked: torch's and Pyro's own switch."""
    return bool(torch.distributions.Distribution._validate_args)


def common_dtype(*values) -> tuple[torch.dtype, torch.device]:
    """dtype and device of the floating tensors among numbers, tensors and distributions; torch's defaults without one."""
    found = []
    for value in values:
        if isinstance(value, TorchDistributionMixin):
            while isinstance(value, torch.distributions.Independent):
                value = value.base_dist
            names = getattr(value, "arg_constraints", None)
            value = [getattr(value, n, None) for n in names] if isinstance(names, dict) else []
        for tensor in value if isinstance(value, list) else [value]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                found.append(tensor)
    if not found:
        default = torch.empty(0)
        return default.dtype, default.device
    dtype = found[0].dtype
    for tensor in found:
        dtype = torch.promote_types(dtype, tensor.dtype)
    placed = [tensor.device for tensor in found if tensor.device.type != "cpu"]
    return dtype, placed[0] if placed else found[0].device


def _check_form(prior: TiePrior, event_scale_tril: Tensor | None) -> None:
    tie, form, base = prior.tie, prior.form, prior.base
    what = f"form of tied site '{prior.site}'"
    if form not in _FORMS:
        raise FormError(
            what, found=repr(form), expected=" or ".join(map(repr, _FORMS)), fix="Choose one of them."
        )
    if not isinstance(base, TorchDistributionMixin) and not isinstance(base, (int, float, Tensor)):
        raise BaseError(
            f"base of tied site '{prior.site}'",
            found=f"a {type(base).__name__}",
            expected="a distribution of pyro.distributions, or a number or tensor for a known level",
            fix="Write for example pyro.distributions.Normal(0., 1.).",
        )
    if isinstance(base, TorchDistributionMixin) and getattr(base.support, "is_discrete", False):
        raise BaseError(
            f"base of tied site '{prior.site}'",
            found=f"the discrete {type(base).__name__}",
            expected="a continuous distribution",
            fix="Tie the parameters of the discrete variable instead.",
        )
    if form == "level":
        return
    if event_scale_tril is not None:
        raise FormError(
            f"event_scale_tril of tied site '{prior.site}'",
            found=f"form '{form}'",
            expected="form 'level'",
            fix="Leave event_scale_tril out, or use form='level'.",
        )
    inner = base
    while isinstance(inner, torch.distributions.Independent):
        inner = inner.base_dist
    if not isinstance(inner, torch.distributions.Normal) or not isinstance(base, TorchDistributionMixin):
        found = f"a {type(inner).__name__}" if isinstance(base, TorchDistributionMixin) else "a known level"
        raise BaseError(
            f"base of tied site '{prior.site}'",
            found=found,
            expected=f"a Normal, which form '{form}' needs for its closed form",
            fix="Use form='level', which takes any base.",
        )
    if tie.anchored:
        raise FormError(
            what,
            found=f"'{form}' with an anchored chain",
            expected="'level'",
            fix="Use Tie.chain without anchored.",
        )
    if form == "copies" and tie.has_hub:
        raise FormError(
            what,
            found="'copies' with exchangeable copies, whose hub is no copy",
            expected="'level' or 'matched'",
            fix="Use Tie.complete, which ties the copies to one another.",
        )


def _check_sigma(prior: TiePrior, given: Strength) -> None:
    """Plain numbers always; tensors while validation is on (under vmap it is off)."""
    if isinstance(given, Tensor) and not validating():
        return
    what = f"sigma of tied site '{prior.site}'"
    sigma = prior.sigma.detach()
    if not bool((sigma >= 0).all()):
        bad = sigma[~(sigma >= 0)].flatten()[0].item()
        raise StrengthError(
            what, found=f"{bad}", expected="0 or more", fix="sigma is a scale: 0 is hard sharing."
        )
    if prior.form == "level" and bool(sigma.isinf().any()):
        raise StrengthError(
            what,
            found="inf with form 'level'",
            expected="a finite number",
            fix="Independent copies need form='matched' or form='copies'.",
        )


def _ratio(sigma: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sigma, scale = torch.broadcast_tensors(sigma, scale)
    soft = sigma > scale
    # where, not minimum: the gradient at sigma = s must be that of one side, not half of each.
    low, high = torch.where(soft, scale, sigma), torch.where(soft, sigma, scale)
    return low, low / high, soft, scale


def _index_sum(values: Tensor, index: Tensor, num: int, dim: int) -> Tensor:
    shape = list(values.shape)
    shape[dim] = num
    return values.new_zeros(shape).index_add(dim, index, values)


def _sum_right(values: Tensor, num_dims: int) -> Tensor:
    return values.sum(tuple(range(-num_dims, 0))) if num_dims else values


def _split(shape: torch.Size, num_right: int) -> tuple[torch.Size, torch.Size]:
    cut = max(len(shape) - num_right, 0)
    return shape[:cut], shape[cut:]


def _is_real(support) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real or support is constraints.real_vector


def _fits(shape: Sequence[int], target: Sequence[int] | None) -> bool:
    """Whether `shape` broadcasts to `target` without enlarging it."""
    if target is None or len(shape) > len(target):
        return False
    return all(n in (1, m) for n, m in zip(reversed(shape), reversed(target), strict=False))
