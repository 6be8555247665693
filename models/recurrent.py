"""A linear recurrent net seen step by step, simulated: is it one matrix that acts at every step?"""

import pyro
import pyro.distributions as dist
import torch

import bayestie as bt

# The architecture of a step; its own weights are never used.
STEP = torch.nn.Linear(2, 2, bias=False)


def recurrent(states, *, sigma, noise_sd=0.1):
    """state_t ~ N(W_t state_t-1, noise_sd^2), steps tied in a chain.

    Args:
        states: trajectories of a state in the plane, shape (T + 1, n, 2).
        sigma: sd of a weight's change from one step to the next, >= 0.
        noise_sd: sd of a state around what the step before makes of it.
    """
    num_steps, num = len(states) - 1, states.shape[-2]
    steps = bt.nn.tied_modules("step", STEP, bt.Tie.chain(num_steps), sigma, dist.Normal(0.0, 1.0))
    mean = steps.map(states[:-1])
    with (
        pyro.plate("time", num_steps, dim=-3),
        pyro.plate("path", num, dim=-2),
        pyro.plate("side", 2, dim=-1),
    ):
        pyro.sample("state", dist.Normal(mean, noise_sd), obs=states[1:])


def rotation(scale, angle=0.4):
    """A normal matrix: a turn by `angle`, both singular values `scale`."""
    turn = torch.tensor(angle, dtype=torch.float64)
    c, s = turn.cos(), turn.sin()
    return scale * torch.stack([torch.stack([c, -s]), torch.stack([s, c])])


def data(seed=0, scale=0.9, num_steps=8, num_paths=6, noise_sd=0.1):
    """The model's arguments with their labels: a rotation that shrinks or grows by `scale` per step."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(num_paths, 2, generator=generator, dtype=torch.float64)
    states = [state]
    for _ in range(num_steps):
        noise = torch.randn(num_paths, 2, generator=generator, dtype=torch.float64)
        states.append(states[-1] @ rotation(scale).T + noise_sd * noise)
    return {
        "states": torch.stack(states),
        "coords": {"to": ["x", "y"], "from": ["x", "y"]},
        "dims": {"step.weight": ["time", "to", "from"]},
    }
