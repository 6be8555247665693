"""Bias and variance: when does one shared mean beat a mean per time step, and what beats both?

Run: python -m analyses.bias_variance [--seed 0] [--smoke] [--out out/bias_variance.html]
"""

from collections.abc import Sequence

import numpy as np
import xarray as xr

import bayestie as bt
from analyses._claim_pages import conclude
from analyses._claims import Claim, Curve, Finding, Plot
from analyses._command import read_options
from models.bias_variance import bias_variance, data, truth

NUM_STEPS, NUM_EACH = 8, 5
NOISE = 1.0 / NUM_EACH  # variance of a step's average: the threshold of the claim
BASE_SD = 30.0


def closed_form(sigma: np.ndarray, spread2: float) -> np.ndarray:
    """Risk of the posterior mean: eigenvector by eigenvector, shrunk by h = v / (v + noise)."""
    with np.errstate(divide="ignore"):
        deviation = 1 / (NUM_STEPS / sigma**2 + 1 / BASE_SD**2)
    level = NUM_STEPS * BASE_SD**2 - (NUM_STEPS - 1) * deviation
    h, h0 = deviation / (deviation + NOISE), level / (level + NOISE)
    contrasts = (1 - h) ** 2 * spread2 + h**2 * NOISE
    return (h0**2 * NOISE + (NUM_STEPS - 1) * contrasts) / NUM_STEPS


def simulate(spread2: float, num: int, num_data: int, seed: int) -> xr.Dataset:
    """Risk along the path at a true spread; the strength that is best there is among the strengths."""
    best = float(np.sqrt(spread2 * NUM_STEPS))
    grid = sorted({*bt.strengths(0.1, 10.0, num, hard=True, free=True), best})
    arguments = {k: v for k, v in data().items() if k not in ("coords", "dims")}
    return bt.risk(
        bias_variance,
        truth(spread2**0.5),
        **arguments,
        over={"sigma": grid},
        num_data=num_data,
        seed=seed,
        base_sd=BASE_SD,
    )


def main(argv: Sequence[str] | None = None) -> Claim:
    """Simulate the risk on both sides of the threshold, and compare it with its closed form."""
    options = read_options(__doc__, "bias_variance.html", argv)
    num, num_data = (5, 200) if options.smoke else (16, 2000)
    spreads = {"below": NOISE / 2, "above": NOISE * 2}
    runs = {
        side: simulate(spread2, num, num_data, options.seed + 1000 * number)
        for number, (side, spread2) in enumerate(spreads.items())
    }
    findings, gaps, errors, curves = [], [], [], []
    for side, run in runs.items():
        sigma, risk, error = run["sigma"].values, run["risk"].values, run["risk_error"].values
        expected = closed_form(sigma, spreads[side])
        gap, gap_error = float(risk[0] - risk[-1]), float(np.hypot(error[0], error[-1]))
        at = int(np.flatnonzero(np.isclose(sigma, np.sqrt(spreads[side] * NUM_STEPS)))[0])
        name = f"s^2 {side} e^2/n"
        findings += [
            Finding(
                f"{name}: largest error of the simulated risk, in its standard errors",
                4.0,
                float(np.abs((risk - expected) / error).max()),
                kind="below",
            ),
            Finding(
                f"{name}: risk of hard sharing less that of none",
                (spreads[side] - NOISE) * (NUM_STEPS - 1) / NUM_STEPS,
                gap,
                gap_error,
                # none is a base of sd 30, not a flat one
                rounding=1e-3,
            ),
            Finding(
                f"{name}: and its sign", 0.0, gap, gap_error, kind="below" if side == "below" else "above"
            ),
        ]
        # Paired by data set, which the errors of the two risks are not.
        paired, paired_error = run["risk_difference"].values, run["risk_difference_error"].values
        findings += [
            Finding(
                f"{name}: {end} less the best soft strength",
                0.0,
                float(paired[k] - paired[at]),
                float(np.hypot(paired_error[k], paired_error[at])),
                kind="above",
            )
            for end, k in (("hard", 0), ("none", -1))
        ]
        gaps.append(gap)
        errors.append(gap_error)
        axis = np.where(np.isinf(sigma), 30.0, sigma)
        curves += [
            Curve(f"simulated, {name}", axis, risk, error, "o"),
            Curve("closed form", axis, expected, style="-"),
        ]
    (low, high), (s_low, s_high) = gaps, spreads.values()
    # The difference is linear in s^2: where does the line through both runs cross 0?
    crossing = s_low - low * (s_high - s_low) / (high - low)
    lever = np.array([high, -low]) * (s_high - s_low) / (high - low) ** 2
    findings.append(
        Finding(
            "threshold of s^2",
            NOISE,
            float(crossing),
            float(np.hypot(*(lever * errors))),
        )
    )
    plot = Plot("sigma (30: none)", "risk", curves, x_scale="symlog")
    statement = (
        "Hard sharing beats none exactly where the true spread s^2 is below e^2/n; the best soft strength "
        "beats both."
    )
    return conclude(Claim("C2", statement, findings, plot), options)


if __name__ == "__main__":
    main()
