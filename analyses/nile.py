"""The Nile: how far does the mean flow move from one year to the next?

Run: python -m analyses.nile [--seed 0] [--smoke] [--out out/nile.html]
"""

from collections.abc import Sequence

import xarray as xr

from analyses._command import read_options, sweep_and_report
from models.nile import data, nile


def main(argv: Sequence[str] | None = None) -> xr.DataTree:
    """Sweep the yearly change of the mean flow from none to 300 (10^8 cubic metres), and report."""
    options = read_options(__doc__, "nile.html", argv)
    return sweep_and_report(nile, data(), low=1.0, high=300.0, options=options)


if __name__ == "__main__":
    main()
