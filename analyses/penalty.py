"""Penalties are priors: lambda (theta_1 - theta_2)^2 is N(0, sigma^2) with lambda = 1 / (2 sigma^2).

Run: python -m analyses.penalty [--seed 0] [--smoke] [--out out/penalty.html]
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

import bayestie as bt
from analyses._claim_pages import conclude
from analyses._claims import Claim, Curve, Finding, Plot, slope
from analyses._command import read_options
from models.penalty import data, penalty

BASE_SD = 1.0
Form = Literal["level", "copies", "matched"]


def log_joint(theta: Tensor, y: Tensor, sigma: float, form: Form) -> Tensor:
    """log p(y, theta | sigma) of the model, in theta itself."""
    base = dist.Normal(torch.zeros_like(theta[0]), BASE_SD)
    prior = bt.TiedNormal(bt.Tie.complete(2), sigma, base, form=form)
    return prior.log_prob(theta) + dist.Normal(theta[:, None], torch.ones_like(y)).log_prob(y).sum()


def classical_loss(theta: Tensor, y: Tensor, sigma: float) -> Tensor:
    """Half the squared error, weight decay, and the penalty lambda times the squared difference."""
    decay = 0.5 * theta.square().sum() / BASE_SD**2
    return 0.5 * (y - theta[:, None]).square().sum() + decay + (theta[0] - theta[1]).square() / (2 * sigma**2)


def posterior(y: Tensor, sigma: float, form: Form) -> tuple[Tensor, Tensor]:
    """Mean (2,) and covariance (2, 2): exact, as the log joint is quadratic."""
    start = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    value = log_joint(start, y, sigma, form)
    (gradient,) = torch.autograd.grad(value, start, create_graph=True)
    rows = [torch.autograd.grad(g, start, retain_graph=True)[0] for g in gradient]
    covariance = torch.linalg.inv(-torch.stack(rows))
    return covariance @ gradient.detach(), covariance


def main(argv: Sequence[str] | None = None) -> Claim:
    """Compare loss and posterior at random parameters, and follow the posterior as sigma shrinks."""
    options = read_options(__doc__, "penalty.html", argv)
    arguments = data(options.seed)
    y = arguments["y"]
    generator = torch.Generator().manual_seed(options.seed)
    findings, curves = [], []
    for sigma in (0.1, 1.0, 5.0):
        points = torch.randn(20, 2, generator=generator, dtype=torch.float64)
        gaps = torch.stack([log_joint(p, y, sigma, "copies") + classical_loss(p, y, sigma) for p in points])
        findings.append(
            Finding(
                f"sigma = {sigma:g}: spread of log joint plus loss over 20 random parameters",
                0.0,
                float(gaps.max() - gaps.min()),
            )
        )
    # One parameter with the same base sees all the data.
    variance = 1 / (y.numel() + 1 / BASE_SD**2)
    mean = float(y.sum()) * variance
    small = np.array([1e-3, 2e-3, 4e-3, 8e-3])
    forms: tuple[Form, ...] = ("level", "matched")
    for form in forms:
        means, variances = zip(*(posterior(y, float(s), form) for s in small), strict=True)
        off = {
            "mean": np.array([float(m[0]) - mean for m in means]),
            "variance": np.array([float(v[0, 0]) - variance for v in variances]),
        }
        for name, values in off.items():
            power, _ = slope(np.log(small), np.log(np.abs(values)))
            what = f"form {form}: {name} of theta_1 less that of one parameter, power of sigma"
            # The next term of the expansion is sigma^4: 6e-5 of the first at these strengths.
            findings.append(Finding(what, 2.0, power, rounding=1e-3))
            curves.append(Curve(f"{name}, {form}", small, np.abs(values)))
    path = bt.sweep(
        penalty,
        **arguments,
        over={"sigma": bt.strengths(0.1, 10.0, 3, hard=True)},
        form="level",
        seed=options.seed,
    )
    draws = path["posterior"].to_dataset()["theta"].sel(sigma=0.0).values.reshape(-1, 2)
    findings += [
        Finding("sigma = 0: largest difference of the two copies", 0.0, float(np.ptp(draws, axis=1).max())),
        Finding(
            "sigma = 0: posterior mean",
            mean,
            float(draws[:, 0].mean()),
            float(draws[:, 0].std(ddof=1) / np.sqrt(len(draws))),
        ),
        Finding(
            "sigma = 0: posterior variance",
            variance,
            float(draws[:, 0].var(ddof=1)),
            float(((draws[:, 0] - draws[:, 0].mean()) ** 2).std(ddof=1) / np.sqrt(len(draws))),
        ),
    ]
    plot = Plot("sigma", "distance to one shared parameter", curves, "log", "log")
    statement = (
        "The penalty lambda (theta_1 - theta_2)^2 with weight decay is form `copies` at lambda = "
        "1 / (2 sigma^2); in forms `level` and `matched` the posterior at sigma = 0 is that of one "
        "parameter, approached like sigma^2."
    )
    return conclude(Claim("C7", statement, findings, plot, [path]), options)


if __name__ == "__main__":
    main()
