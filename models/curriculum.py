"""Robust means that should agree, simulated: each copy sees the truth among outliers of its own."""

import pyro
import pyro.distributions as dist
import torch

import bayestie as bt


def curriculum(y, *, sigma, base_sd=5.0, noise_sd=0.2, outliers=0.05):
    """y_kn ~ outliers-contaminated N(theta_k, noise_sd^2), all pairs of copies tied.

    Args:
        y: observations, shape (K, n).
        sigma: strength on the complete graph, >= 0; lambda = 1 / (2 sigma^2).
        base_sd: prior sd of a copy (form `copies`).
        noise_sd: sd of an observation that is no outlier.
        outliers: density of the outliers, which may lie anywhere.
    """
    num_copies, num_each = y.shape[-2:]
    tie = bt.Tie.complete(num_copies)
    theta = bt.tied("theta", tie, sigma, dist.Normal(0.0, base_sd), form="copies")
    good = dist.Normal(theta[..., None], noise_sd).log_prob(y)
    log_likelihood = torch.logaddexp(good, torch.full_like(good, outliers).log())
    with pyro.plate("copy", num_copies, dim=-2), pyro.plate("replicate", num_each, dim=-1):
        pyro.factor("y", log_likelihood)


def held_back(y, seen, *, sigma, base_sd=10.0, noise_scale=0.3):
    """y_kn ~ Cauchy(theta_k, noise_scale) where seen, all pairs of copies tied.

    Args:
        y: observations, shape (K, n).
        seen: which of them there are, boolean, shape (K, n).
        sigma: strength on the complete graph, >= 0.
        base_sd: prior sd of the level (form `level`).
        noise_scale: scale of an observation.
    """
    num_copies, num_each = y.shape[-2:]
    theta = bt.tied("theta", bt.Tie.complete(num_copies), sigma, dist.Normal(0.0, base_sd))
    copies, each = pyro.plate("copy", num_copies, dim=-2), pyro.plate("replicate", num_each, dim=-1)
    with copies, each, pyro.poutine.mask(mask=seen):
        pyro.sample("y", dist.Cauchy(theta[..., None], noise_scale), obs=y)


FAR = 6.0


def held_back_data(seed=0, noise_scale=0.3):
    """Five copies that see the truth, at 6, three times each, and one that sees 0 twelve times instead."""
    generator = torch.Generator().manual_seed(seed)
    y = noise_scale * torch.randn(6, 12, generator=generator, dtype=torch.float64)
    y[:5] += FAR
    seen = torch.ones(6, 12, dtype=torch.bool)
    seen[:5, 3:] = False
    return {"y": y, "seen": seen, "coords": {}, "dims": {"theta": ["copy"]}}


TRUTH = 1.0


def data(seed=0, num_copies=6, noise_sd=0.2):
    """The model's arguments with their labels: per copy four values around 1, and three outliers."""
    generator = torch.Generator().manual_seed(seed)
    good = TRUTH + noise_sd * torch.randn(num_copies, 4, generator=generator, dtype=torch.float64)
    bad = 8.0 * torch.rand(num_copies, 3, generator=generator, dtype=torch.float64) - 4.0
    return {"y": torch.cat([good, bad], 1), "coords": {}, "dims": {"theta": ["copy"]}}
