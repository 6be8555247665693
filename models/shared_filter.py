"""One linear filter seen at T places, simulated: what does sharing it over the places buy?"""

import pyro
import pyro.distributions as dist
import torch

import bayestie as bt


def shared_filter(patches, response, *, sigma, noise_sd=1.0, base_sd=100.0):
    """response_tn ~ N(patches_tn . filter_t, noise_sd^2), exchangeable places in the form `matched`.

    Args:
        patches: inputs, shape (T, n, d).
        response: shape (T, n).
        sigma: sd of a place's filter around the shared one, >= 0 or inf.
        noise_sd: sd of a response.
        base_sd: prior sd of a weight.
    """
    num_places, num_each, num_weights = patches.shape[-3:]
    places = bt.Tie.exchangeable(num_places)
    base = dist.Normal(0.0, base_sd)
    weights = bt.tied("filter", places, sigma, base, form="matched", event_shape=(num_weights,))
    mean = (patches * weights[..., None, :]).sum(-1)
    with pyro.plate("place", num_places, dim=-2), pyro.plate("replicate", num_each, dim=-1):
        pyro.sample("response", dist.Normal(mean, noise_sd), obs=response)


FILTER = (1.0, -0.5)


def data(seed=0, num_places=6, num_each=20, balanced=True):
    """The model's arguments with their labels: the same filter at every place, noise of sd 1.

    Args:
        seed: of the simulation.
        num_places: T.
        num_each: observations per place.
        balanced: every place sees the same inputs; otherwise later places see weaker ones.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (num_each, len(FILTER))
    if balanced:
        patches = torch.randn(shape, generator=generator, dtype=torch.float64).expand(num_places, *shape)
    else:
        contrast = torch.linspace(1.0, 0.2, num_places, dtype=torch.float64)
        patches = torch.randn(num_places, *shape, generator=generator, dtype=torch.float64)
        patches = patches * contrast[:, None, None]
    noise = torch.randn(num_places, num_each, generator=generator, dtype=torch.float64)
    return {
        "patches": patches.clone(),
        "response": patches @ torch.tensor(FILTER, dtype=torch.float64) + noise,
        "coords": {"weight": list(range(len(FILTER)))},
        "dims": {"filter": ["place", "weight"]},
    }
