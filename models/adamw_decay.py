"""One parameter used S times, simulated: weight decay is the prior of a shared parameter."""

import pyro
import pyro.distributions as dist
import torch

import bayestie as bt


def adamw_decay(y, *, sigma, decay=4.0):
    """y_sn ~ N(theta_s, 1), theta_1 ... theta_S tied to a level with prior N(0, 1 / decay).

    Args:
        y: observations, shape (S, n).
        sigma: sd of a use's parameter around the shared one, >= 0.
        decay: L2 penalty decay / 2 theta^2 on the shared parameter.
    """
    tie = bt.Tie.exchangeable(y.shape[-2])
    theta = bt.tied("theta", tie, sigma, dist.Normal(0.0, decay**-0.5))
    with pyro.plate("use", y.shape[-2], dim=-2), pyro.plate("replicate", y.shape[-1], dim=-1):
        pyro.sample("y", dist.Normal(theta[..., None], 1.0), obs=y)


def data(seed=0, num_uses=6, num_each=4):
    """The model's arguments with their labels: true parameter 1, noise of sd 1."""
    generator = torch.Generator().manual_seed(seed)
    y = 1.0 + torch.randn(num_uses, num_each, generator=generator, dtype=torch.float64)
    return {"y": y, "coords": {}, "dims": {"theta": ["use"]}}
