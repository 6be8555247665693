"""Handwritten digits through a soft convolution: one kernel for all places, or one for each?

Images of scikit-learn's digits, 8 x 8 pixels (Alpaydin and Kaynak 1998, optical recognition of handwritten
digits).
"""

from typing import Any

import pyro
import pyro.distributions as dist
import torch

import bayestie as bt

# The architecture; its own weights are never used.
CONV = torch.nn.Conv2d(1, 4, 3, stride=2)
HEAD = torch.nn.Linear(4 * 9, 10)


def soft_convolution(images, digit, *, sigma):
    """P(digit) = softmax(head(tanh(convolution(image)))), kernels of neighbouring places tied.

    Args:
        images: shape (n, 8, 8), pixels from 0 to 1.
        digit: 0 to 9, shape (n,).
        sigma: prior sd scale of a difference of neighbouring kernels, >= 0 or inf; form `matched`.
    """
    base = dist.Normal(0.0, 1.5)
    layer = bt.nn.soft_conv2d("conv", CONV, (8, 8), sigma, base, form="matched")
    head = bt.nn.bind(HEAD, bt.nn.free_parameters("head", HEAD, bt.nn.fan_in(4.0)))
    logits = head(torch.tanh(layer(images[:, None])).flatten(1))
    pyro.deterministic("probability", logits.softmax(-1))  # weights may be permuted, this is identified
    with pyro.plate("image", len(images)):
        pyro.sample("digit", dist.Categorical(logits=logits), obs=digit)


def data(seed=0, num=200, test=False):
    """The model's arguments with their labels: `num` random images, or all the others."""
    from sklearn.datasets import load_digits  # an extra: only the data needs it

    digits: Any = load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(digits.target), generator=generator)
    chosen = order[num:] if test else order[:num]
    return {
        "images": torch.as_tensor(digits.images, dtype=torch.float64)[chosen] / 16.0,
        "digit": torch.as_tensor(digits.target)[chosen],
        "coords": {},
        "dims": {},
    }
