"""log p(theta) of a tied site on all of R^K, the hubs of exchangeable copies integrated out."""

import math

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from bayestie._errors import BaseError
from bayestie._tie_priors import TiePrior, sum_right


def log_prob(prior: TiePrior, theta: Tensor) -> Tensor:
    """log p(theta), (*B, K, *E) -> (*B,); sigma > 0.

    log p(location) - 1/2 sum_j (x_j^2 / v_j + log(2 pi v_j)) - 1/2 sum_c log K_c, x = U^T theta. Around a
    hub the mean of K copies has variance v / K beside the hub's own, and K - 1 contrasts remain.
    """
    location = prior.location(theta)
    scale = prior.coefficient_scale()
    x = prior.coefficients(theta, location)
    log_scale = prior.constant("contrast_shares") * (scale.log() + 0.5 * math.log(2 * math.pi))
    terms = -0.5 * (x / scale).square() - log_scale
    per_element = terms.sum(-1 - prior.args.event_dim) - prior.log_volume(hubs_integrated=True)
    return sum_right(per_element, prior.args.event_dim) + _location_law(prior).log_prob(location)


def _location_law(prior: TiePrior):
    """Law of the location: the level, plus the mean of the deviations where it is around a hub."""
    law = prior.level_distribution
    if law is None and not prior.layout.hubs_only:
        raise _no_density(prior, "a known level, to which the mean of the copies is bound")
    if not prior.tie.has_hub:
        if law is None or not _is_real(law.support):
            raise _no_density(prior, "a base on part of the real line")
        return law
    inner = prior.args.base_kernel
    correlated = isinstance(inner, torch.distributions.MultivariateNormal)
    if not (inner is None or correlated or isinstance(inner, torch.distributions.Normal)):
        raise _no_density(prior, f"a {type(inner).__name__} base with exchangeable copies")
    if correlated or prior.args.event_scale_tril is not None:
        return _correlated_law(prior)
    loc = prior.known_level if law is None else law.mean
    assert loc is not None
    share = prior.per_level("hub_mask") / prior.per_level("component_sizes")
    variance = share * prior.hub_variance() + (0.0 if law is None else law.variance)
    shape = torch.broadcast_shapes(loc.shape, variance.shape, prior.args.level_shape)
    law = dist.Normal(loc.expand(shape), variance.sqrt().expand(shape), validate_args=False)
    return law.to_event(len(prior.args.level_shape))


def _correlated_law(prior: TiePrior):
    """The same with covariance over the last event dim, of the base, of the deviations or of both."""
    args, law = prior.args, prior.level_distribution
    sigma = prior.beside_levels(args.sigma)
    if args.event_scale_tril is None:
        root = torch.diag_embed(sigma.expand(torch.broadcast_shapes(sigma.shape, args.event_shape[-1:])))
    else:
        tril = prior.tril_beside_copies() if prior.several else args.event_scale_tril
        root = sigma[..., None] * tril if sigma.dim() else sigma * tril
    share = prior.per_level("hub_mask") / prior.per_level("component_sizes")
    covariance = share[..., None] * (root @ root.mT)
    if law is None:
        loc = prior.known_level
    elif isinstance(args.base_kernel, torch.distributions.MultivariateNormal):
        loc, covariance = args.base_kernel.loc, covariance + args.base_kernel.covariance_matrix
    else:
        loc, covariance = law.mean, covariance + torch.diag_embed(law.variance)
    assert loc is not None
    shape = torch.broadcast_shapes(loc.shape, covariance.shape[:-1], args.level_shape)
    law = dist.MultivariateNormal(
        loc.expand(shape), covariance.expand(*shape, shape[-1]), validate_args=False
    )
    return law.to_event(len(args.level_shape) - 1)


def _is_real(support) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real or support is constraints.real_vector


def _no_density(prior: TiePrior, found: str) -> BaseError:
    return BaseError(
        f"log_prob of tied site '{prior.args.site}'",
        found=found,
        expected="a density on all of R^K in closed form",
        fix="State the site with tied, or reparametrise it with TieReparam.",
    )
