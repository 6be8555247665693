"""Means of T time steps, simulated: when is one shared mean better than T of them?"""

import pyro
import pyro.distributions as dist
import torch

import bayestie as bt


def bias_variance(y, *, sigma, noise_sd=1.0, base_sd=30.0):
    """y_tn ~ N(mean_t, noise_sd^2), all pairs of steps tied in the form `matched`.

    Args:
        y: observations, shape (T, n).
        sigma: strength on the complete graph, >= 0 or inf: steps spread by sigma / sqrt(T).
        noise_sd: sd of an observation.
        base_sd: prior sd of each mean; wide, so that nothing but the tie shrinks.
    """
    num_steps, num_each = y.shape[-2:]
    tie = bt.Tie.complete(num_steps)
    mean = bt.tied("mean", tie, sigma, dist.Normal(0.0, base_sd), form="matched")
    with pyro.plate("step", num_steps, dim=-2), pyro.plate("replicate", num_each, dim=-1):
        pyro.sample("y", dist.Normal(mean[..., None], noise_sd), obs=y)


def truth(spread, num_steps=8):
    """Means around 0 with sum of squares (T - 1) spread^2, shape (T,)."""
    steps = torch.linspace(-1.0, 1.0, num_steps, dtype=torch.float64)
    return spread * steps / steps.std()


def data(seed=0, spread=0.5, num_steps=8, num_each=5):
    """The model's arguments with their labels, simulated at `truth(spread)` with noise of sd 1."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_steps, num_each, generator=generator, dtype=torch.float64)
    return {
        "y": truth(spread, num_steps)[:, None] + noise,
        "coords": {},
        "dims": {"mean": ["step"]},
    }
