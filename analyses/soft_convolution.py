"""Digits: test accuracy and log score of a soft convolution, from one kernel for all places to one for each.

Run: python -m analyses.soft_convolution [--seed 0] [--smoke] [--out out/soft_convolution.html]
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import ClippedAdam
from torch import Tensor, nn

import bayestie as bt
from analyses._claim_pages import conclude
from analyses._claims import Claim, Curve, Finding, Plot
from analyses._command import read_options
from models.soft_convolution import CONV, HEAD, data, soft_convolution


def scores(probabilities: Tensor, digit: Tensor) -> tuple[Tensor, Tensor]:
    """Right or wrong, and log probability of the truth, per image; probabilities (images, 10)."""
    right = (probabilities.argmax(-1) == digit).double()
    return right, probabilities.gather(1, digit[:, None])[:, 0].clamp(min=1e-12).log()


def bayesian(sigma: float, train: dict[str, Any], test: dict[str, Any], num_steps: int, seed: int):
    """Scores of the average over draws of a mean-field guide, fitted by Pyro's SVI."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = AutoNormal(soft_convolution, init_scale=0.02)
    # At a constant rate the guide of many kernels is lost in its own noise.
    rate = {"lr": 0.03, "lrd": 0.03 ** (1 / num_steps)}
    svi = SVI(soft_convolution, guide, ClippedAdam(rate), Trace_ELBO())
    for _ in range(num_steps):
        svi.step(**train, sigma=sigma)
    run: Any = Predictive(guide, num_samples=30)
    draws = run(**train, sigma=sigma)
    probabilities = torch.zeros(len(test["digit"]), 10)
    for i in range(30):
        one = {name: x[i] for name, x in draws.items()}
        trace: Any = pyro.poutine.trace(pyro.poutine.condition(soft_convolution, data=one))
        law: Any = trace.get_trace(**test, sigma=sigma).nodes["digit"]["fn"]
        probabilities += law.probs.detach() / 30
    pyro.clear_param_store()
    return scores(probabilities, test["digit"])


class LocallyConnected(nn.Module):
    """A kernel per place, each started as PyTorch starts a convolution."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(1, 4, 3) for _ in range(9)]
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))
        self.bias = nn.Parameter(
            torch.stack([layer.bias.detach() for layer in layers if layer.bias is not None])
        )

    def forward(self, x: Tensor) -> Tensor:
        return bt.nn.locally_connected2d(x, self.weight, self.bias, stride=(2, 2))


def classical(
    first: Callable[[], nn.Module], train: dict[str, Any], test: dict[str, Any], num_steps: int, seed: int
):
    """Scores of a net trained the usual way, with as many steps of the same optimiser."""
    torch.manual_seed(seed)
    net = nn.Sequential(first(), nn.Tanh(), nn.Flatten(), nn.Linear(36, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(num_steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(train["images"][:, None]), train["digit"]).backward()
        optimizer.step()
    with torch.no_grad():
        return scores(net(test["images"][:, None]).softmax(-1), test["digit"])


def main(argv: Sequence[str] | None = None) -> Claim:
    """Fit 200 digits at several strengths, and score the others."""
    options = read_options(__doc__, "soft_convolution.html", argv)
    num_steps = 120 if options.smoke else 1500
    strengths = [0.0, float("inf")] if options.smoke else bt.strengths(0.03, 3.0, 7, hard=True, free=True)
    names = ("images", "digit")
    train, test = data(options.seed), data(options.seed, test=True)
    train, test = {n: train[n] for n in names}, {n: test[n] for n in names}
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng(devices=[]), pyro.validation_enabled(False):
            found = [bayesian(s, train, test, num_steps, options.seed) for s in strengths]
            hard = classical(lambda: nn.Conv2d(1, 4, 3, stride=2), train, test, num_steps, options.seed)
            free = classical(LocallyConnected, train, test, num_steps, options.seed)
    finally:
        torch.set_default_dtype(torch.float32)
    root = len(test["digit"]) ** 0.5
    nets = {
        "one kernel": found[0],
        "a kernel per place": found[-1],
        "PyTorch's Conv2d": hard,
        "PyTorch's locally connected layer": free,
    }
    findings = [
        Finding(f"{name}: test accuracy", 0.8, float(right.mean()), float(right.std() / root), kind="above")
        for name, (right, _) in nets.items()
    ]
    if not options.smoke:  # a guide that has not settled says nothing of the strength
        gain = found[0][1] - found[-1][1]
        what = "log score per test image, one kernel less a kernel per place"
        findings.append(Finding(what, 0.0, float(gain.mean()), float(gain.std() / root), kind="above"))
    axis = np.where(np.isinf(strengths), 10.0, strengths)
    log_scores = np.array([float(s[1].mean()) for s in found])
    errors = np.array([float(s[1].std()) / root for s in found])
    flat = np.ones(len(axis))
    curves = [
        Curve("soft convolution", axis, log_scores, errors),
        Curve("PyTorch's Conv2d", axis, float(hard[1].mean()) * flat, style="--"),
        Curve("PyTorch's locally connected", axis, float(free[1].mean()) * flat, style=":"),
    ]
    for s, (right, score) in zip(strengths, found, strict=True):
        print(f"sigma = {s:g}: accuracy {right.mean():.4f}, log score {score.mean():.4f}")
    for name, (right, score) in (("Conv2d", hard), ("locally connected", free)):
        print(f"PyTorch's {name}: accuracy {right.mean():.4f}, log score {score.mean():.4f}")
    counts = CONV.weight.numel() + 4, sum(p.numel() for p in HEAD.parameters())
    print(f"{counts[0]} weights per kernel, {counts[1]} in the head")
    plot = Plot("sigma (10: none)", "test log score per image", curves, x_scale="symlog")
    statement = (
        "With 200 digits to learn from, sharing one kernel over all places scores better than a kernel per "
        "place, where both have the same mean-field guide and it has settled. PyTorch's own layers, trained "
        "as long and not averaged, score better than either, and the locally connected one better than the "
        "convolution: digits stand in the middle of their image, where places are not alike, and what a "
        "mean-field guide loses it loses with every weight."
    )
    return conclude(Claim("digits", statement, findings, plot), options)


if __name__ == "__main__":
    main()
