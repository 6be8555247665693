"""Curriculum: can a penalty that grows during training find an optimum that a constant one misses?

Run: python -m analyses.curriculum [--seed 0] [--smoke] [--out out/curriculum.html]
"""

from collections.abc import Callable, Sequence
from math import pi
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

import bayestie as bt
from analyses._claim_pages import conclude
from analyses._claims import Claim, Curve, Finding, Plot
from analyses._command import read_options
from models.curriculum import FAR, TRUTH, curriculum, data, held_back, held_back_data

NOISE_SD, OUTLIERS, BASE_SD = 0.2, 0.05, 5.0
FIRM, LOOSE = 0.05, 20.0  # ends of the schedule, as sigma


def loss(theta: Tensor, y: Tensor, sigma: float) -> Tensor:
    """Robust loss, weight decay, and lambda times the squared differences; theta (..., K), y (..., K, n)."""
    squares = theta.square().sum(-1)
    pairs = y.shape[-2] * squares - theta.sum(-1).square()  # sum over pairs of squared differences
    good = (-0.5 * ((y - theta[..., None]) / NOISE_SD).square()).exp() / (NOISE_SD * (2 * pi) ** 0.5)
    return squares / (2 * BASE_SD**2) + pairs / (2 * sigma**2) - (good + OUTLIERS).log().sum((-1, -2))


def prior_gap(y: Tensor, seed: int) -> float:
    """Spread of loss plus log joint of the model over random parameters: 0 if one is the other.

    The model's coordinates are the level and z, a linear map of theta: their densities differ by a constant.
    """
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            gaps = []
            for _ in range(20):
                trace = poutine.trace(curriculum).get_trace(y, sigma=0.3)
                nodes: Any = trace.nodes
                gaps.append(trace.log_prob_sum() + loss(nodes["theta"]["value"], y, 0.3))
    finally:
        torch.set_default_dtype(torch.float32)
    return float(torch.stack(gaps).max() - torch.stack(gaps).min())


def train(y: Tensor, start: Tensor, schedule: np.ndarray) -> Tensor:
    """MAP by Adam from every start, sigma as the schedule says; the copies' means at the end."""
    theta = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.05)
    for sigma in schedule:
        optimizer.zero_grad()
        loss(theta, y, float(sigma)).sum().backward()
        optimizer.step()
    return theta.detach().mean(-1)


def rate(success: Tensor) -> tuple[float, float]:
    """Share of successes, and its standard error by Agresti and Coull's adjusted count."""
    count, total = float(success.sum()), len(success)
    adjusted = (count + 2) / (total + 4)
    return count / total, float(np.sqrt(adjusted * (1 - adjusted) / (total + 4)))


def through_the_library(seed: int, num_sets: int = 32) -> list[Finding]:
    """The same by `bt.fit` with and without ``schedule=``, modes and guides, where one copy misleads."""
    falling = {"sigma": bt.strengths(FIRM, LOOSE, 8)[::-1]}
    findings = []
    for engine, words in (("laplace", "modes"), ("svi", "guides of svi")):
        rates = []
        for schedule in (falling, None):
            found = [
                bt.fit(
                    held_back,
                    **held_back_data(seed + number),
                    sigma=FIRM,
                    engine=engine,
                    schedule=schedule,
                    seed=seed + number,
                    num_draws=50,
                    keep=("posterior",),
                )
                for number in range(num_sets)
            ]
            means = torch.tensor([float(path.posterior["theta"].mean()) for path in found])
            rates.append(rate((means - FAR).abs() < 1.0))
        (annealed, error), (constant, constant_error) = rates
        print(f"{words}: success rate {annealed:.3f} with a schedule, {constant:.3f} without")
        gain, gain_error = annealed - constant, float(np.hypot(error, constant_error))
        findings.append(
            Finding(
                f"{words}, schedule=: success rate less that without", 0.0, gain, gain_error, kind="above"
            )
        )
    return findings


def main(argv: Sequence[str] | None = None) -> Claim:
    """Success over random starts: a firm tie from the beginning, a tie that firms, and none."""
    options = read_options(__doc__, "curriculum.html", argv)
    num_starts, num_sets, num_steps = (100, 3, 300) if options.smoke else (400, 10, 1000)
    ramp = np.geomspace(LOOSE, FIRM, num_steps)
    schedules: dict[str, np.ndarray] = {
        "constant": np.full(num_steps, FIRM),
        "annealed": ramp,
        "none": np.full(num_steps, LOOSE),
    }
    generator = torch.Generator().manual_seed(options.seed)

    def success(schedule: np.ndarray, change: Callable[[Tensor], Tensor] = lambda y: y) -> Tensor:
        y = torch.stack([change(data(options.seed + number)["y"]) for number in range(num_sets)])[:, None]
        shape = num_sets, num_starts, y.shape[-2]
        start = 4.0 * (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1)
        # Within three standard errors of what all good values together tell.
        near = 3 * NOISE_SD / (4 * y.shape[-2]) ** 0.5
        return ((train(y, start, schedule) - TRUTH).abs() < near).flatten()

    rates = {name: rate(success(schedule)) for name, schedule in schedules.items()}
    (annealed, annealed_error), (constant, constant_error) = rates["annealed"], rates["constant"]
    gain, gain_error = annealed - constant, float(np.hypot(annealed_error, constant_error))
    # One copy is tied to nothing: the schedule cannot matter.
    alone = [rate(success(schedules[name], lambda y: y[:1])) for name in ("annealed", "constant")]
    findings = [
        Finding(
            "loss plus log joint of the model: spread over random parameters",
            0.0,
            prior_gap(data(options.seed)["y"], options.seed),
        ),
        Finding("success rate annealed less that of a firm tie", 0.0, gain, gain_error, kind="above"),
        Finding("success rate annealed less that without a tie", 0.0, annealed - rates["none"][0],
                float(np.hypot(annealed_error, rates["none"][1])), kind="above"),
        Finding("one copy, nothing to tie: annealed less constant", 0.0, alone[0][0] - alone[1][0],
                float(np.hypot(alone[0][1], alone[1][1]))),
    ]  # fmt: skip
    if not options.smoke:
        findings += through_the_library(options.seed)
    lengths = [num_steps // 30, num_steps // 10, num_steps // 3, num_steps]
    slow = []
    for length in lengths:
        schedule = np.concatenate([np.geomspace(LOOSE, FIRM, length), np.full(num_steps - length, FIRM)])
        slow.append(rate(success(schedule)))
    plot = Plot(
        "steps over which the tie firms",
        "success rate",
        [
            Curve("annealed", np.array(lengths), [r for r, _ in slow], [e for _, e in slow]),
            *(
                Curve(name, np.array(lengths), np.full(len(lengths), rates[name][0]), style="--")
                for name in ("constant", "none")
            ),
        ],
    )
    for name, (value, error) in rates.items():
        print(f"{name}: success rate {value:.3f} ± {error:.3f}")
    statement = (
        "Raising lambda during training can escape poor optima: copies first settle by their own data, and "
        "those that found the truth then pull the others over their barriers."
    )
    return conclude(Claim("C8", statement, findings, plot), options)


if __name__ == "__main__":
    main()
