"""A 3 x 3 filter over images, simulated: one kernel for all places, or one for each?"""

import pyro
import pyro.distributions as dist
import torch

import bayestie as bt

# The architecture; its own weights are never used.
FILTER = torch.nn.Conv2d(1, 1, 3, bias=False)


def soft_filter(images, response, *, sigma, noise_sd=0.5, base_sd=1.0, seen=None):
    """response_nrc ~ N(kernel_rc . patch_nrc, noise_sd^2), kernels of neighbouring places tied.

    Args:
        images: shape (n, height, width).
        response: shape (n, height - 2, width - 2).
        sigma: prior sd scale of a difference of neighbouring kernels, >= 0 or inf; form `matched`.
        noise_sd: sd of a response.
        base_sd: prior sd of a weight, the same at every strength.
        seen: places whose responses count, bool, shape (height - 2, width - 2); all where left out.
    """
    size = images.shape[-2:]
    base = dist.Normal(0.0, base_sd)
    layer = bt.nn.soft_conv2d("kernel", FILTER, tuple(size), sigma, base, form="matched")
    mean = layer(images[:, None])[:, 0]
    num, rows, columns = mean.shape
    seen = torch.ones(rows, columns, dtype=torch.bool) if seen is None else seen
    with pyro.plate("image", num, dim=-3), pyro.plate("row", rows, dim=-2), pyro.plate("column", columns):
        pyro.sample("response", dist.Normal(mean, noise_sd).mask(seen), obs=response)


def kernel():
    """The kernel that made the data, (3, 3): an edge detector with a bright centre."""
    rows = [[0.5, 0.0, -0.5], [0.5, 1.0, -0.5], [0.5, 0.0, -0.5]]
    return torch.tensor(rows, dtype=torch.float64)


def data(seed=0, size=5, num_images=20, noise_sd=0.5):
    """The model's arguments with their labels: white images, one true kernel, noise of sd `noise_sd`."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_images, size, size, generator=generator, dtype=torch.float64)
    clean = torch.nn.functional.conv2d(images[:, None], kernel()[None, None])[:, 0]
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    lengths = {"place": clean[0].numel(), "out": 1, "in": 1, "kernel_row": 3, "kernel_column": 3}
    return {
        "images": images,
        "response": clean + noise_sd * noise,
        "noise_sd": noise_sd,
        "coords": {name: list(range(length)) for name, length in lengths.items()},
        "dims": {"kernel.weight": list(lengths)},
    }
