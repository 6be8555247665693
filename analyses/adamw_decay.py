"""Weight decay: inside Adam it weakens the more often a parameter is used; in AdamW it does not.

Run: python -m analyses.adamw_decay [--seed 0] [--smoke] [--out out/adamw_decay.html]
"""

import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor

import bayestie as bt
from analyses._claim_pages import conclude
from analyses._claims import Claim, Curve, Finding, Plot, slope
from analyses._command import read_options
from models.adamw_decay import adamw_decay, data

LR, DECAY = 1e-3, 0.1
USES = np.array([1, 4, 16, 64])
Optimizer = Callable[..., torch.optim.Optimizer]


def effective(optimizer: Optimizer, num_uses: int, mean: float, sizes: tuple[int, int, int], seed: int):
    """Effective step lr / sqrt(v-hat) and decay per step, each with its standard error.

    Many parameters with their own noise take the same steps with and without decay: the difference of
    the two runs is what the decay did, and the noise, which both share, drops out. The decay starts only once
    the second moments have settled; in the first steps they are the gradients themselves.

    Args:
        optimizer: torch.optim.Adam or AdamW.
        num_uses: S; a gradient is the sum of S, each N(mean, 1).
        mean: mean gradient of a use.
        sizes: number of parameters, steps to settle, and steps with decay.
        seed: of the noise.
    """
    num, settle, last = sizes
    generator = torch.Generator().manual_seed(seed)

    def gradient() -> Tensor:
        noise = torch.randn(num, generator=generator, dtype=torch.float64)
        return num_uses * mean + num_uses**0.5 * noise

    theta = torch.ones(num, dtype=torch.float64, requires_grad=True)
    plain = optimizer([theta], lr=LR, weight_decay=0.0)
    for _ in range(settle):
        theta.grad = gradient()
        plain.step()
    twin = theta.detach().clone().requires_grad_()
    decayed = optimizer([twin], lr=LR, weight_decay=DECAY)
    decayed.load_state_dict(deepcopy(plain.state_dict()))
    decayed.param_groups[0]["weight_decay"] = DECAY
    level = 0.0
    for _ in range(last):
        level += float(twin.detach().mean()) / last
        theta.grad = gradient()
        twin.grad = theta.grad.clone()
        plain.step()
        decayed.step()
    state = plain.state[theta]
    second = state["exp_avg_sq"] / (1 - plain.param_groups[0]["betas"][1] ** float(state["step"]))
    step = LR / second.sqrt()
    lost = (theta - twin).detach() / (last * level)
    root = num**0.5
    return float(step.mean()), float(step.std() / root), float(lost.mean()), float(lost.std() / root)


def optimum(optimizer: Optimizer, y: Tensor, decay: float) -> float:
    """Where the optimiser ends on the full data: one parameter, its decay in the optimiser."""
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    run = optimizer([theta], lr=0.02, weight_decay=decay)
    for _ in range(3000):
        run.zero_grad()
        (0.5 * (y - theta).square().sum()).backward()
        run.step()
        run.param_groups[0]["lr"] *= 0.998
    return float(theta.detach())


def main(argv: Sequence[str] | None = None) -> Claim:
    """Measure steps and decay of both optimisers against the number of uses."""
    options = read_options(__doc__, "adamw_decay.html", argv)
    sizes = (500, 300, 200) if options.smoke else (4000, 1000, 500)
    findings, curves = [], []
    optimizers: dict[str, Optimizer] = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}
    for name, optimizer in optimizers.items():
        runs = [effective(optimizer, int(s), 0.0, sizes, options.seed + int(s)) for s in USES]
        step, step_error, lost, lost_error = np.array(runs).T
        if name == "Adam":
            power, error = slope(np.log(USES), np.log(step), step_error / step)
            findings.append(Finding("zero-mean gradients: power of S in lr / sqrt(v)", -0.5, power, error))
        power, error = slope(np.log(USES), np.log(lost), lost_error / lost)
        # theta itself is read before the step: lr decay / 2 of the rate.
        findings.append(
            Finding(
                f"zero-mean gradients: power of S in the decay of {name}",
                -0.5 if name == "Adam" else 0.0,
                power,
                error,
                rounding=1e-3,
            )
        )
        curves.append(
            Curve(f"{name}, zero-mean gradients", USES, lost / (LR * DECAY), lost_error / (LR * DECAY))
        )
    # A mean of 10 beside noise of sd 1: v is the square of the sum, S^2 times that of one use.
    runs = [effective(torch.optim.Adam, int(s), 10.0, sizes, options.seed + int(s)) for s in USES]
    step, step_error, *_ = np.array(runs).T
    power, error = slope(np.log(USES), np.log(step), step_error / step)
    findings.append(
        # Noise adds 1 / S to the square of 10: half a per cent at S = 1.
        Finding("mean gradient dominates: power of S in lr / sqrt(v)", -1.0, power, error, rounding=3e-3)
    )
    curves.append(Curve("lr / sqrt(v) of Adam, mean gradient dominates", USES, step / step[0]))
    labelled = data(options.seed)
    y, decay = labelled["y"], 4.0
    posterior_mean = float(y.sum()) / (y.numel() + decay)
    path = bt.sweep(
        adamw_decay,
        **labelled,
        decay=decay,
        over={"sigma": bt.strengths(0.1, 3.0, 3, hard=True)},
        seed=options.seed,
    )
    draws = path["posterior"].to_dataset()["theta"].sel(sigma=0.0).values[..., 0].ravel()
    findings += [
        Finding(
            "full data, sigma = 0: posterior mean",
            posterior_mean,
            float(draws.mean()),
            float(draws.std(ddof=1) / np.sqrt(len(draws))),
        ),
        Finding(
            "full data: Adam with L2 ends at the MAP",
            posterior_mean,
            optimum(torch.optim.Adam, y, decay),
            rounding=1e-3,
        ),
        Finding(
            "full data: AdamW does not: its distance to the MAP",
            0.02,
            abs(optimum(torch.optim.AdamW, y, decay) - posterior_mean),
            kind="above",
        ),
    ]
    layer = torch.nn.Conv2d(1, 1, 3)
    for name, optimizer in optimizers.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            bt.nn.audit_optimizer(
                optimizer(layer.parameters(), weight_decay=DECAY), layer, uses={"weight": 36, "bias": 36}
            )
        findings.append(
            Finding(
                f"audit of {name} with decay on a kernel of 36 places: warnings",
                2 * (name == "Adam"),
                len(caught),
            )
        )
    plot = Plot("S, uses of the parameter", "decay per step / (lr decay)", curves, "log", "log")
    statement = (
        "A parameter used S times has gradients of S times the variance, so Adam's step and the L2 decay "
        "inside it shrink like 1 / sqrt(S); AdamW's decay does not."
    )
    return conclude(Claim("C13", statement, findings, plot, [path]), options)


if __name__ == "__main__":
    main()
