"""Variance: sharing a filter over T places divides its variance by T, and averages the local optima.

Run: python -m analyses.shared_filter [--seed 0] [--smoke] [--out out/shared_filter.html]
"""

from collections.abc import Sequence

import numpy as np
import torch

import bayestie as bt
from analyses._claim_pages import conclude
from analyses._claims import Claim, Curve, Finding, Plot
from analyses._command import read_options
from models.shared_filter import FILTER, data, shared_filter


def local_optima(patches: torch.Tensor, response: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least-squares filter of each place (T, d), and its information matrix (T, d, d)."""
    optima = torch.linalg.lstsq(patches, response[..., None]).solution[..., 0]
    return optima, patches.mT @ patches


def shared_optimum(patches: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
    """Least-squares filter of all places together, (d,)."""
    return torch.linalg.lstsq(patches.flatten(0, 1), response.flatten()[:, None]).solution[:, 0]


def main(argv: Sequence[str] | None = None) -> Claim:
    """Simulate the variance of the estimator along the path, for several T."""
    options = read_options(__doc__, "shared_filter.html", argv)
    num_data, places = (300, [4]) if options.smoke else (3000, [2, 4, 8, 16])
    over = {"sigma": bt.strengths(0.05, 2.0, 3 if options.smoke else 9, hard=True, free=True)}
    findings, curves = [], []
    for num_places in places:
        arguments = data(options.seed, num_places)
        arguments = {name: arguments[name] for name in ("patches", "response")}
        truth = torch.tensor(FILTER, dtype=torch.float64).expand(num_places, -1)
        run = bt.risk(shared_filter, truth, **arguments, over=over, num_data=num_data, seed=options.seed)
        variance, error = run["variance"].values, run["variance_error"].values
        ratio = variance[0] / variance[-1]
        relative = float(np.hypot(error[0] / variance[0], error[-1] / variance[-1]))
        findings.append(
            Finding(
                f"T = {num_places}: variance shared over variance local",
                1 / num_places,
                float(ratio),
                float(ratio * relative),
            )
        )
        axis = np.where(np.isinf(run["sigma"].values), 5.0, run["sigma"].values)
        curves.append(Curve(f"T = {num_places}", axis, variance / variance[-1], error / variance[-1]))
    for balanced in (True, False):
        both = data(options.seed, balanced=balanced)
        optima, information = local_optima(both["patches"], both["response"])
        shared = shared_optimum(both["patches"], both["response"])
        weighted = torch.linalg.solve(information.sum(0), (information @ optima[..., None]).sum(0))[:, 0]
        kind = "same inputs" if balanced else "unlike inputs"
        findings.append(
            Finding(
                f"{kind}: shared optimum less the average of local ones weighted by information",
                0.0,
                float((shared - weighted).abs().max()),
            )
        )
        plain = float((shared - optima.mean(0)).abs().max())
        findings.append(
            Finding(f"{kind}: shared optimum less their plain average", 0.0, plain)
            if balanced
            else Finding(f"{kind}: shared optimum less their plain average", 0.01, plain, kind="above")
        )
    # The posterior at sigma = 0 sits at that average.
    unlike = data(options.seed, balanced=False)
    path = bt.sweep(
        shared_filter, **unlike, over={"sigma": bt.strengths(0.05, 2.0, 3, hard=True)}, seed=options.seed
    )
    draws = path["posterior"].to_dataset()["filter"].sel(sigma=0.0).isel(place=0).values.reshape(-1, 2)
    expected = shared_optimum(unlike["patches"], unlike["response"]).numpy()
    scores = (draws.mean(0) - expected) / (draws.std(0, ddof=1) / np.sqrt(len(draws)))
    findings.append(
        Finding(
            "posterior mean at sigma = 0 less the shared optimum, in Monte Carlo errors",
            4.0,
            float(np.abs(scores).max()),
            kind="below",
        )
    )
    plot = Plot("sigma (5: none)", "variance over that without sharing", curves, x_scale="symlog")
    statement = (
        "Sharing over T places divides the estimator's variance by T; the shared filter is the average of "
        "the local optima, weighted by what each place knows (a plain average where all see the same inputs)."
    )
    return conclude(Claim("C11", statement, findings, plot, [path]), options)


if __name__ == "__main__":
    main()
