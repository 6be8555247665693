"""Matrices: a convolution is doubly block Toeplitz; how far from one does a soft convolution stray?

Run: python -m analyses.toeplitz [--seed 0] [--smoke] [--out out/toeplitz.html]
"""

from collections.abc import Sequence

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

import bayestie as bt
from analyses._claim_pages import conclude
from analyses._claims import Claim, Curve, Finding, Plot, slope
from analyses._command import read_options
from models.soft_filter import data, soft_filter

SIZE, PLACES = (6, 6), (4, 4)


def distance(weight: Tensor) -> Tensor:
    """Frobenius distance of the layer's matrix to the convolutions; weight (..., places, 3, 3)."""
    matrix = bt.nn.convolution_matrix(weight, SIZE)
    return (matrix - bt.nn.nearest_toeplitz(matrix, PLACES, SIZE)).flatten(-2).norm(dim=-1)


def root_mean_square(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over the last axis, with its standard error by the delta method."""
    squares = values**2
    mean, error = squares.mean(-1), squares.std(-1, ddof=1) / np.sqrt(values.shape[-1])
    root = np.sqrt(mean)
    return root, np.divide(error, 2 * root, out=np.zeros_like(root), where=root > 0)


def main(argv: Sequence[str] | None = None) -> Claim:
    """Distances of draws from the prior and from the posterior, strength by strength."""
    options = read_options(__doc__, "toeplitz.html", argv)
    tie = bt.Tie.grid(*PLACES)
    # E d^2 = 9 sigma^2 tr L^+: nine weights, each with deviations of covariance sigma^2 L^+.
    unit = float((9 / tie.eigenvalues).sum().sqrt())
    strengths = np.array(bt.strengths(1e-3, 1.0, 4 if options.smoke else 10))
    torch.manual_seed(options.seed)
    base = dist.Normal(torch.zeros((), dtype=torch.float64), 1.0)

    def prior(sigma: float) -> np.ndarray:
        law = bt.TiedNormal(tie, sigma, base, event_shape=(3, 3))
        return distance(law.sample((2000,))).numpy()

    drawn = np.stack([prior(float(s)) for s in strengths])
    spread, error = root_mean_square(drawn)
    power, power_error = slope(np.log(strengths), np.log(spread), error / spread)
    findings = [
        Finding("prior: distance at sigma = 0", 0.0, float(prior(0.0).max())),
        Finding("prior: power of sigma", 1.0, power, power_error),
        Finding(
            "prior: rms distance over sigma, sqrt(9 tr L^+)",
            unit,
            float((spread / strengths).mean()),
            float(np.sqrt(((error / strengths) ** 2).sum()) / len(strengths)),
        ),
    ]
    path = bt.sweep(
        soft_filter,
        **data(options.seed, SIZE[0], num_images=10),
        over={"sigma": [0.0, *strengths]},
        seed=options.seed,
        engine="laplace",
    )
    weight = path["posterior"].to_dataset()["kernel.weight"].values[..., 0, 0, :, :]
    values = distance(torch.as_tensor(weight)).flatten(1).numpy()
    after, after_error = root_mean_square(values)
    small = slice(1, 3)
    log_s, log_d = np.log([0.0, *strengths][small]), np.log(after[small])
    power, power_error = slope(log_s, log_d, after_error[small] / after[small])
    findings += [
        Finding("posterior: distance at sigma = 0", 0.0, float(values[0].max())),
        # At sigma = 0.001 data of this size move a deviation by a few sigma^2: 1e-3 of it.
        Finding("posterior: power of sigma as sigma -> 0", 1.0, power, power_error, rounding=5e-3),
        Finding(
            "posterior: rms distance over sigma as sigma -> 0",
            unit,
            float(after[1] / strengths[0]),
            float(after_error[1] / strengths[0]),
            rounding=5e-3 * unit,
        ),
        Finding(
            "posterior over prior at the largest strength",
            1.0,
            float(after[-1] / spread[-1]),
            float(after_error[-1] / spread[-1]),
            kind="below",
        ),
    ]
    curves = [
        Curve("prior", strengths, spread, error),
        Curve("posterior", strengths, after[1:], after_error[1:]),
        Curve("sigma sqrt(9 tr L^+)", strengths, unit * strengths, style="--"),
    ]
    plot = Plot("sigma", "distance to the doubly block Toeplitz matrices", curves, "log", "log")
    statement = (
        "At sigma = 0 the matrix of the layer is doubly block Toeplitz exactly; its distance to such "
        "matrices grows like sigma, in the prior always and in the posterior as sigma -> 0."
    )
    return conclude(Claim("C5", statement, findings, plot, [path]), options)


if __name__ == "__main__":
    main()
