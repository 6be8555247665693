"""Lip cancer in Scotland: how much risk do neighbouring districts share?

Run: python -m analyses.lip_cancer [--seed 0] [--smoke] [--out out/lip_cancer.html]
"""

from collections.abc import Sequence

import xarray as xr

from analyses._command import read_options, sweep_and_report
from models.lip_cancer import data, lip_cancer


def main(argv: Sequence[str] | None = None) -> xr.DataTree:
    """Sweep the scale of differences between neighbours from one shared risk to 56 separate ones."""
    options = read_options(__doc__, "lip_cancer.html", argv)
    # Districts without a case make the loosest strengths hard: minutes of NUTS, which a smoke run leaves out.
    high, free = (1.0, False) if options.smoke else (10.0, True)
    return sweep_and_report(lip_cancer, data(), low=0.01, high=high, free=free, options=options)


if __name__ == "__main__":
    main()
