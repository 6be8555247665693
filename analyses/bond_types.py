"""Molecules: force constants of bonds, tied within their type.

Run: python -m analyses.bond_types [--seed 0] [--smoke] [--out out/bond_types.html]
"""

from collections.abc import Sequence

import numpy as np

import bayestie as bt
from analyses._claim_pages import conclude
from analyses._claims import Claim, Curve, Finding, Plot
from analyses._command import read_options
from models.bond_types import CONSTANTS, bond_types, data


def main(argv: Sequence[str] | None = None) -> Claim:
    """Recover the constants, and compare types that are right, one type for all, and bonds that spread."""
    options = read_options(__doc__, "bond_types.html", argv)
    over = {"sigma": bt.strengths(0.03, 10.0, 5 if options.smoke else 16, hard=True)}
    labelled = data(options.seed)
    kinds = np.array(labelled["kinds"])
    path = bt.sweep(bond_types, **labelled, over=over, seed=options.seed)
    draws = path["posterior"].to_dataset()["constant"].values
    findings = []
    for kind, truth in CONSTANTS.items():
        one = draws[0][..., kinds == kind]
        findings.append(
            # The error is the posterior's own sd: the data are one simulation.
            Finding(
                f"{kind} bonds, sigma = 0: force constant", truth, float(one.mean()), float(one[..., 0].std())
            )
        )
    findings.append(
        Finding(
            "sigma = 0: largest difference within a type",
            0.0,
            max(float(np.ptp(draws[0][..., kinds == kind], axis=-1).max()) for kind in CONSTANTS),
        )
    )
    # A single bond's constant is measured by its own atoms alone, the type's by six times as many.
    single = draws[..., np.flatnonzero(kinds == "single")]
    sd = single.std((1, 2), ddof=1)
    ratio, relative = sd[0] / sd[-1], np.sqrt(1 / (2 * draws[0, ..., 0].size)) * np.sqrt(2)
    findings.append(
        Finding(
            "single bonds: sd shared over sd of each alone, averaged",
            1 / np.sqrt(6) + 0.1,
            float(ratio.mean()),
            float(ratio.mean() * relative),
            kind="below",
        )
    )
    evidence = path["sweep"].to_dataset()["log_evidence"]
    wrong = bt.fit(
        bond_types,
        **{**labelled, "kinds": ["any"] * len(kinds)},
        sigma=0.0,
        engine="laplace",
        seed=options.seed,
    )
    findings.append(
        Finding(
            "log evidence of the right types over one type for all, both at sigma = 0",
            5.0,
            float(evidence[0] - wrong["sweep"].to_dataset()["log_evidence"]),
            kind="above",
        )
    )
    # Where bonds of a type do differ, hard sharing loses: the condition of the claim.
    unlike = data(options.seed, spread=1.0)
    spread = bt.sweep(bond_types, **unlike, over=over, seed=options.seed)
    apart = spread["sweep"].to_dataset()["log_evidence"]
    best = float(apart.idxmax())
    findings += [
        Finding(
            "true sd of 1 within a type: log evidence of sigma = 0 less the best",
            -5.0,
            float(apart[0] - apart.max()),
            kind="below",
        ),
        Finding("true sd of 1 within a type: best strength, log10", 0.0, float(np.log10(best)), rounding=0.7),
    ]
    sigma = np.asarray(over["sigma"])
    curves = [
        Curve("bonds of a type alike", sigma, evidence.values - float(evidence.max())),
        Curve("bonds of a type differ (sd 1)", sigma, apart.values - float(apart.max())),
    ]
    plot = Plot("sigma", "log evidence less its maximum", curves, x_scale="symlog")
    statement = "Bonds of a type share one force constant: tied within types, the constants are recovered."
    return conclude(Claim("C16", statement, findings, plot, [path, spread]), options)


if __name__ == "__main__":
    main()
