"""A residual net whose blocks are copies over depth, simulated: is it one map, iterated?"""

import pyro
import pyro.distributions as dist
import torch

import bayestie as bt


class Residual(torch.nn.Module):
    """h(x) = x + f(x), f(x) = tanh(A x + b)."""

    def __init__(self, width):
        super().__init__()
        self.linear = torch.nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


# The architecture of a block; its own weights are never used.
BLOCK = Residual(2)


def residual_depth(x, y, *, sigma, depth, noise_sd=0.05):
    """y ~ N(h_depth(... h_1(x)), noise_sd^2), blocks tied in a chain over depth.

    Args:
        x: inputs, shape (n, 2).
        y: outputs, shape (n, 2).
        sigma: sd of a parameter's change from one block to the next, >= 0.
        depth: number of blocks.
        noise_sd: sd of an output.
    """
    blocks = bt.nn.tied_modules("block", BLOCK, bt.Tie.chain(depth), sigma, dist.Normal(0.0, 1.0))
    with pyro.plate("input", len(x), dim=-2), pyro.plate("side", 2, dim=-1):
        pyro.sample("y", dist.Normal(blocks.iterate(x), noise_sd), obs=y)


# A with eigenvalues -0.4 and -0.8, and a fixed point at (0.5, -0.3).
A = ((-0.6, 0.2), (0.2, -0.6))
FIXED_POINT = (0.5, -0.3)


def block():
    """The true block."""
    made = Residual(2).double()
    weight = torch.tensor(A, dtype=torch.float64)
    made.linear.weight.data = weight
    made.linear.bias.data = -weight @ torch.tensor(FIXED_POINT, dtype=torch.float64)
    return made.requires_grad_(False)


def data(seed=0, num=200, depth=3, noise_sd=0.05):
    """The model's arguments with their labels: the true block, iterated `depth` times."""
    generator = torch.Generator().manual_seed(seed)
    x = 1.5 * torch.randn(num, 2, generator=generator, dtype=torch.float64)
    y, true = x, block()
    for _ in range(depth):
        y = true(y)
    y = y + noise_sd * torch.randn(num, 2, generator=generator, dtype=torch.float64)
    return {
        "x": x,
        "y": y,
        "depth": depth,
        "coords": {"block": list(range(depth)), "to": ["x", "y"], "from": ["x", "y"]},
        "dims": {"block.linear.weight": ["block", "to", "from"], "block.linear.bias": ["block", "to"]},
    }
