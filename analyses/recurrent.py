"""Recurrence: one matrix at every step, whose largest singular value decides if gradients explode or vanish.

Run: python -m analyses.recurrent [--seed 0] [--smoke] [--out out/recurrent.html]
"""

from collections.abc import Sequence
from math import log

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import bayestie as bt
from analyses._claim_pages import conclude
from analyses._claims import Claim, Curve, Finding, Plot
from analyses._command import read_options
from models.recurrent import data, recurrent, rotation


def growth_rate(weights: Tensor) -> Tensor:
    """log of the norm of d state_T / d state_0 = W_T ... W_1, per step; weights (..., T, d, d)."""
    product = torch.eye(weights.shape[-1], dtype=weights.dtype)
    scale = torch.zeros(weights.shape[:-3], dtype=weights.dtype)
    for t in range(weights.shape[-3]):
        product = weights[..., t, :, :] @ product
        # Renormalised at every step, or a long product would leave the floating-point range.
        norm = torch.linalg.matrix_norm(product, 2)
        product, scale = product / norm[..., None, None], scale + norm.log()
    return scale / weights.shape[-3]


def unrolled_gap(seed: int) -> float:
    """Largest difference between PyTorch's RNN and cells tied over time at sigma = 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rnn, cell = nn.RNN(3, 4).double(), nn.RNNCell(3, 4).double()
        inputs = torch.randn(20, 3, dtype=torch.float64)
        copies = bt.nn.tied_modules(
            "cell", cell, bt.Tie.chain(20), 0.0, dist.Normal(torch.zeros(()).double(), 0.5)
        )
    rnn.load_state_dict({f"{name}_l0": x[0].detach() for name, x in copies.parameters.items()})
    start = torch.zeros(4, dtype=torch.float64)
    gap = torch.stack(copies.scan(inputs, start)) - rnn(inputs, start[None])[0]
    return float(gap.detach().abs().max())


def main(argv: Sequence[str] | None = None) -> Claim:
    """Growth rates of products of matrices, and their posterior for nets seen step by step."""
    options = read_options(__doc__, "recurrent.html", argv)
    generator = torch.Generator().manual_seed(options.seed)
    findings = [
        Finding("cells tied over time at sigma = 0 less PyTorch's RNN", 0.0, unrolled_gap(options.seed))
    ]
    square = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    for name, w in (("symmetric", square + square.T), ("rotation", rotation(1.0))):
        largest = float(torch.linalg.matrix_norm(w, 2))
        for s in (0.5 / largest, 2.0 / largest):
            # sigma_max of s W is 0.5, then 2.
            rate = growth_rate((s * w).expand(60, *w.shape))
            findings.append(
                Finding(
                    f"{name} W, s sigma_max = {s * largest:g}: growth rate of (sW)^T per step",
                    log(s * largest),
                    float(rate),
                )
            )
    # The gradient itself, by autograd through the unrolled net.
    w, steps = 0.9 * rotation(1.0), 25
    layer = nn.Linear(2, 2, bias=False).double()

    def unrolled(x: Tensor) -> Tensor:
        for _ in range(steps):
            x = bt.nn.bind(layer, {"weight": w})(x)
        return x

    jacobian = torch.autograd.functional.jacobian(unrolled, torch.ones(2, dtype=torch.float64))
    findings.append(
        Finding(
            "autograd through 25 steps, s sigma_max = 0.9: growth rate of the gradient",
            log(0.9),
            float(torch.linalg.matrix_norm(torch.as_tensor(jacobian), 2).log() / steps),
        )
    )
    # Without normality sigma_max only bounds the rate; the spectral radius, here 0.5, decides.
    skew = torch.tensor([[0.5, 4.0], [0.0, 0.5]], dtype=torch.float64)
    findings += [
        Finding(
            "W not normal: log sigma_max", 0.0, float(torch.linalg.matrix_norm(skew, 2).log()), kind="above"
        ),
        Finding(
            "W not normal: growth rate over 2000 steps",
            log(0.5),
            float(growth_rate(skew.expand(2000, 2, 2))),
            rounding=0.01,
        ),
    ]
    over = {"sigma": bt.strengths(0.01, 0.5, 4 if options.smoke else 10, hard=True)}
    curves, paths = [], []
    for scale in (0.8, 1.25):
        path = bt.sweep(recurrent, **data(options.seed, scale), over=over, seed=options.seed)
        weights = torch.as_tensor(path["posterior"].to_dataset()["step.weight"].values)
        rates = growth_rate(weights).flatten(1).numpy()
        findings.append(
            # The error is the posterior's own sd: the data are one simulation.
            Finding(
                f"posterior at sigma = 0, true sigma_max {scale:g}: growth rate",
                log(scale),
                float(rates[0].mean()),
                float(rates[0].std()),
            )
        )
        findings.append(
            Finding(
                f"posterior at sigma = 0, true sigma_max {scale:g}: its sign",
                0.0,
                float(rates[0].mean()),
                float(rates[0].std()),
                kind="above" if scale > 1 else "below",
            )
        )
        curves.append(Curve(f"sigma_max {scale:g}", np.asarray(over["sigma"]), rates.mean(1), rates.std(1)))
        paths.append(path)
    plot = Plot("sigma", "growth rate per step, posterior mean and sd", curves, x_scale="symlog")
    statement = (
        "One matrix W at every step makes gradients products (sW)^T: for normal W they grow by log(s "
        "sigma_max) per step, so its sign decides between exploding and vanishing; without normality "
        "sigma_max is a bound."
    )
    return conclude(Claim("C3", statement, findings, plot, paths), options)


if __name__ == "__main__":
    main()
