"""Two copies of one mean, simulated: a squared penalty on their difference is a Gaussian prior."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch

import bayestie as bt


def penalty(y, *, sigma, form: Any = "copies", base_sd=1.0, noise_sd=1.0):
    """y_kn ~ N(theta_k, noise_sd^2), theta_1 and theta_2 joined by one edge.

    Args:
        y: observations, shape (2, n).
        sigma: prior sd of theta_1 - theta_2 beside the base, >= 0.
        form: of the prior: `copies` is the penalty of classical training with its weight decay.
        base_sd: prior sd of the base.
        noise_sd: sd of an observation.
    """
    theta = bt.tied("theta", bt.Tie.complete(2), sigma, dist.Normal(0.0, base_sd), form=form)
    with pyro.plate("copy", 2, dim=-2), pyro.plate("replicate", y.shape[-1], dim=-1):
        pyro.sample("y", dist.Normal(theta[..., None], noise_sd), obs=y)


def data(seed=0, num_each=6):
    """The model's arguments with their labels: true means 0.5 and -0.3, noise of sd 1."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, num_each, generator=generator, dtype=torch.float64)
    means = torch.tensor([[0.5], [-0.3]], dtype=torch.float64)
    return {"y": means + noise, "coords": {}, "dims": {"theta": ["copy"]}}
