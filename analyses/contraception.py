"""Contraception in Bangladesh: how much should the districts share?

Run: python -m analyses.contraception [--seed 0] [--smoke] [--out out/contraception.html]
"""

from collections.abc import Sequence

import xarray as xr

from analyses._command import read_options, sweep_and_report
from models.contraception import contraception, data


def main(argv: Sequence[str] | None = None) -> xr.DataTree:
    """Sweep the sd between districts, on the log odds scale, from one intercept to 60 far apart."""
    options = read_options(__doc__, "contraception.html", argv)
    return sweep_and_report(contraception, data(), low=0.03, high=3.0, options=options)


if __name__ == "__main__":
    main()
