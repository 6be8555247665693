"""Counts along a chain: how fast does the rate of a Poisson process drift?

Simulated: the log rate is a stationary autoregression, so that a chain of any length has counts of the same
size. It forgets within about a thousand steps; from one step to the next it is a random walk.
"""

import pyro
import pyro.distributions as dist
import torch

import bayestie as bt

MEAN_LOG_RATE = 2.0
STEP_SD = 0.05
MEMORY = 0.999


def poisson_chain(count, *, sigma):
    """Poisson counts whose log rates are tied in a chain: count_t ~ Poisson(exp(log_rate[t])).

    Args:
        count: counts, shape (K,), consecutive steps.
        sigma: sd of the change of the log rate from one step to the next, >= 0.
    """
    num_steps = count.shape[-1]
    log_rate = bt.tied("log_rate", bt.Tie.chain(num_steps), sigma, dist.Normal(0.0, 2.0))
    with pyro.plate("step", num_steps):
        pyro.sample("y", dist.Poisson(log_rate.exp()), obs=count)


def data(num_steps=1000, seed=0):
    """The model's arguments with their labels: pass as `bt.sweep(poisson_chain, **data(), over=...)`."""
    generator = torch.Generator().manual_seed(seed)
    noise = STEP_SD * torch.randn(num_steps, generator=generator, dtype=torch.float64)
    noise[0] /= (1 - MEMORY**2) ** 0.5  # starts in its stationary distribution
    drift = noise.tolist()
    for step in range(1, num_steps):
        drift[step] += MEMORY * drift[step - 1]
    rate = (MEAN_LOG_RATE + torch.tensor(drift, dtype=torch.float64)).exp()
    return {
        "count": torch.poisson(rate, generator=generator),
        "coords": {"step": list(range(num_steps))},
        "dims": {"log_rate": ["step"], "count": ["step"]},
    }
