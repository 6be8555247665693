"""A linear autoencoder, simulated: does the decoder undo the encoder by its transpose?"""

import pyro
import pyro.distributions as dist
import torch

import bayestie as bt


def tied_autoencoder(x, net, *, sigma, noise_sd=0.5):
    """x ~ N(W_dec W_enc x, noise_sd^2), W_dec a copy of W_enc's transpose.

    Args:
        x: inputs, shape (n, d).
        net: encoder and decoder, as `network` makes them; their own weights are not used.
        sigma: prior sd of an entry of W_enc - W_dec^T, >= 0.
        noise_sd: sd of a reconstruction.
    """
    num, size = x.shape[-2:]
    names = {"0.weight": None, "1.weight": torch.t}
    weights = bt.nn.tied_parameters("W", net, names, bt.Tie.complete(2), sigma, dist.Normal(0.0, 1.0))
    with pyro.plate("row", num, dim=-2), pyro.plate("side", size, dim=-1):
        pyro.sample("x", dist.Normal(bt.nn.bind(net, weights)(x), noise_sd), obs=x)


def network(size, width):
    """A linear encoder and decoder, d -> k -> d."""
    layers = torch.nn.Linear(size, width, bias=False), torch.nn.Linear(width, size, bias=False)
    return torch.nn.Sequential(*layers).requires_grad_(False)


def data(seed=0, num=30, size=3, width=1):
    """The model's arguments with their labels: variances 4, 3, ... in `width` directions, 0.2 elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    variance = torch.full((size,), 0.2, dtype=torch.float64)
    variance[:width] = 4.0 - torch.arange(width, dtype=torch.float64)
    x = variance.sqrt() * torch.randn(num, size, generator=generator, dtype=torch.float64)
    labels = {"matrix": ["encoder", "decoder"], "unit": list(range(width)), "input": list(range(size))}
    return {"x": x, "net": network(size, width), "coords": labels, "dims": {"W": list(labels)}}
