"""Capacity: how many parameters does a filter over images amount to, and how does that grow with the image?

Run: python -m analyses.capacity [--seed 0] [--smoke] [--out out/capacity.html]
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
import xarray as xr
from pyro import poutine
from torch import Tensor, nn

import bayestie as bt
from analyses._claim_pages import conclude
from analyses._claims import Claim, Curve, Finding, Plot, slope
from analyses._command import read_options
from models.soft_filter import data, kernel, soft_filter


def count(layer: nn.Conv2d, size: tuple[int, int]) -> tuple[int, int]:
    """Parameters of a convolution, and of the locally connected layer of its shape."""
    shared = sum(p.numel() for p in layer.parameters())
    trace = poutine.trace(lambda: bt.nn.soft_conv2d("layer", layer, size, 1.0, dist.Normal(0.0, 1.0)))
    nodes: Any = trace.get_trace().nodes
    return shared, sum(nodes[f"layer.{name}"]["value"].numel() for name, _ in layer.named_parameters())


def exact(images: Tensor, noise_sd: float, sigma: float, places: tuple[int, int]) -> float:
    """tr((I + C A)^-1 C A), C the prior covariance of all weights and A the information of the data."""
    num = places[0] * places[1]
    tie = bt.Tie.grid(*places)
    variance = 1 / (tie.eigenvalues / sigma**2 + 1) if sigma else torch.zeros(num - 1, dtype=torch.float64)
    basis = tie.synthesize(torch.eye(num - 1, dtype=torch.float64)).T
    level = (num - variance.sum()) / num  # its variance: that of a copy is 1 at every strength
    prior = basis @ torch.diag(variance) @ basis.T + level
    rows = nn.functional.unfold(images[:, None], 3)  # image, weight, place
    information = torch.einsum("nap,nbp->pab", rows, rows) / noise_sd**2
    whole = torch.block_diag(*information)
    product = torch.kron(prior, torch.eye(9, dtype=torch.float64)) @ whole
    return float(torch.linalg.solve(torch.eye(num * 9, dtype=torch.float64) + product, product).trace())


def main(argv: Sequence[str] | None = None) -> Claim:
    """Count parameters, then sweep filters over images of several sizes."""
    options = read_options(__doc__, "capacity.html", argv)
    conv, local = count(nn.Conv2d(3, 8, 5), (32, 32))
    thin = nn.Conv2d(3, 16, 3, bias=False)
    findings = [
        Finding("32x32x3 to 28x28x8, 5x5: parameters of the convolution", 608, conv),
        Finding("32x32x3 to 28x28x8, 5x5: of the locally connected layer", 476_672, local),
        Finding("and their ratio, the number of places", 28 * 28, local / conv),
        Finding("256x256x3 to the same, dense: weights", 38_654_705_664, (256 * 256 * 3) ** 2),
        Finding("3x3x3x16 convolution without bias: weights", 432, sum(p.numel() for p in thin.parameters())),
    ]
    sizes = (4, 5) if options.smoke else (4, 5, 6)
    over = {"sigma": bt.strengths(0.03, 3.0, 3 if options.smoke else 9, hard=True, free=True)}
    curves, ends, paths = [], [], []
    for size in sizes:
        # Many images of little noise: every weight of every place is measured.
        arguments = data(options.seed, size, num_images=60, noise_sd=0.1)
        places = (size - 2, size - 2)
        path = bt.sweep(soft_filter, **arguments, over=over, seed=options.seed, engine="laplace")
        paths.append(path)
        table = bt.pooling(path)["kernel.weight"].to_dataset()
        found, error = table["p_eff"].values, table["p_eff_error"].values
        strengths = np.asarray(over["sigma"])
        expected = np.array([exact(arguments["images"], 0.1, float(s), places) for s in strengths])
        num = places[0] * places[1]
        scores = np.abs(found - expected) / error
        findings += [
            Finding(
                f"{num} places: largest error of p_eff against the exact trace, in Monte Carlo errors",
                4.0,
                float(scores.max()),
                kind="below",
            ),
            # A prior of sd 1 counts a little beside data of this size.
            Finding(f"{num} places: p_eff at sigma = 0", 9, float(found[0]), float(error[0]), rounding=0.01),
            Finding(
                f"{num} places: p_eff without sharing",
                9 * num,
                float(found[-1]),
                float(error[-1]),
                rounding=0.001 * 9 * num,
            ),
        ]
        axis = np.where(np.isinf(strengths), 10.0, strengths)
        curves.append(Curve(f"{num} places", axis, found, error))
        ends.append((num, found[0], error[0], found[-1], error[-1]))
    num, hard, hard_error, free, free_error = np.array(ends).T
    for name, values, errors, expected in (("hard", hard, hard_error, 0.0), ("none", free, free_error, 9.0)):
        growth, growth_error = slope(num, values, errors)
        findings.append(
            Finding(f"p_eff per place, sharing {name}", expected, growth, growth_error, rounding=0.01)
        )
    # Few data, weakly measured: the count is an upper bound that p_eff does not reach.
    few = data(options.seed, 4, num_images=5)
    weak = bt.sweep(soft_filter, **few, over={"sigma": [0.0, np.inf]}, seed=options.seed, engine="laplace")
    table = bt.pooling(weak)["kernel.weight"].to_dataset()
    findings.append(
        Finding(
            "5 images of noise 0.5, 4 places: p_eff without sharing stays below the count",
            36,
            float(table["p_eff"][-1]),
            float(table["p_eff_error"][-1]),
            kind="below",
        )
    )
    findings += larger_canvas(options.seed, paths[0], sizes[0]) + unseen_places(options.seed)
    plot = Plot("sigma (10: none)", "effective number of parameters", curves, "symlog", "log")
    statement = (
        "A convolution has the parameters of one kernel, however large the image; without sharing their "
        "number grows with the number of places. What one kernel learnt at one size holds at a larger one."
    )
    return conclude(Claim("C1, C10", statement, findings, plot, paths[:1]), options)


def larger_canvas(seed: int, path: xr.DataTree, size: int) -> list[Finding]:
    """Squared error on a canvas of 20 x 20, over the variance of the signal there."""
    weight = path["posterior"].to_dataset()["kernel.weight"]
    generator = torch.Generator().manual_seed(seed + 1)
    canvas = torch.randn(50, 1, 20, 20, generator=generator, dtype=torch.float64)
    small = torch.randn(50, 1, size, size, generator=generator, dtype=torch.float64)
    mean = torch.as_tensor(weight.sel(sigma=0.0).mean(("chain", "draw")).values)[0]
    truth = kernel()[None, None]
    errors = []
    for images in (small, canvas):
        signal = nn.functional.conv2d(images, truth)
        errors.append((nn.functional.conv2d(images, mean) - signal).square().flatten(1).mean(1))
    at_small, at_large = (e.mean() for e in errors)
    spread = torch.stack([e.std() / len(e) ** 0.5 / e.mean() for e in errors]).norm()
    signal = nn.functional.conv2d(canvas, truth)
    return [
        Finding(
            "one kernel: error on a 20 x 20 canvas over that at the size it was learnt at",
            1.0,
            float(at_large / at_small),
            float(spread * at_large / at_small),
        ),
        Finding(
            "one kernel: share of the signal missed on the larger canvas",
            0.01,
            float(at_large / signal.square().mean()),
            kind="below",
        ),
    ]


def unseen_places(seed: int) -> list[Finding]:
    """Share of the signal missed where no response was seen: |w - E w|^2 / |w|^2, as images are white."""
    seen = torch.zeros(3, 3, dtype=torch.bool)
    seen[:2, :2] = True
    arguments = data(seed, 5, num_images=60, noise_sd=0.1)
    path = bt.sweep(
        soft_filter, **arguments, seen=seen, over={"sigma": [0.0, np.inf]}, seed=seed, engine="laplace"
    )
    weight = path["posterior"].to_dataset()["kernel.weight"].mean(("chain", "draw")).values
    rest = ~seen.flatten().numpy()
    missed = ((weight[:, rest, 0, 0] - kernel().numpy()) ** 2).sum((2, 3)).mean(1) / float(
        kernel().square().sum()
    )
    return [
        Finding("places without data, one kernel: share missed", 0.01, float(missed[0]), kind="below"),
        # The posterior there is the prior, known from 1000 draws: 9 / 1000 of noise, over |w|^2 = 2.5.
        Finding("places without data, no sharing: share missed", 1.0, float(missed[1]), rounding=0.1),
    ]


if __name__ == "__main__":
    main()
