"""Handwritten digits in pairs: are two images the same digit, and do both branches see with the same eyes?

Images of 0 and 1 from scikit-learn's digits (Alpaydin and Kaynak 1998, optical recognition of handwritten
digits), reduced to the means of their eight columns, in units of their standard deviation.
"""

from typing import Any

import pyro
import pyro.distributions as dist
import torch

import bayestie as bt

# The architecture of a branch; its own weights are never used.
BRANCH = torch.nn.Sequential(torch.nn.Linear(8, 1), torch.nn.Tanh())


def siamese(left, right, same, *, sigma):
    """P(same) = logistic(offset - 4 (branch_1(left) - branch_2(right))^2), the two branches tied.

    Args:
        left: first image of each pair, shape (n, 8).
        right: second image, shape (n, 8).
        same: 1 where both show the same digit, shape (n,).
        sigma: prior sd of a difference between the branches' weights, >= 0.
    """
    branches = bt.nn.tied_modules("branch", BRANCH, bt.Tie.complete(2), sigma, bt.nn.fan_in())
    offset = pyro.sample("offset", dist.Normal(0.0, 2.0))
    distance = (branches[0](left) - branches[1](right))[..., 0].square()
    with pyro.plate("pair", len(same)):
        pyro.sample("same", dist.Bernoulli(logits=offset - 4 * distance), obs=same)


def data(seed=0, num_pairs=120):
    """The model's arguments with their labels: random pairs of the digits 0 and 1."""
    from sklearn.datasets import load_digits  # an extra: only the data needs it

    digits: Any = load_digits()
    labels = torch.as_tensor(digits.target)
    images = torch.as_tensor(digits.images, dtype=torch.float64)[labels < 2].mean(1)
    labels = labels[labels < 2]
    images = (images - images.mean(0)) / images.std(0).clamp(min=1.0)
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randint(len(labels), (2, num_pairs), generator=generator)
    return {
        "left": images[left],
        "right": images[right],
        "same": (labels[left] == labels[right]).double(),
        "coords": {"side": ["left", "right"], "out": [0]},
        "dims": {"branch.0.bias": ["side", "out"]},
    }
