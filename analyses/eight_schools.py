"""Eight schools: how much should the effects of coaching be shared?

Run: python -m analyses.eight_schools [--seed 0] [--smoke] [--out out/eight_schools.html]
"""

from collections.abc import Sequence

import xarray as xr

from analyses._command import read_options, sweep_and_report
from models.eight_schools import data, eight_schools


def main(argv: Sequence[str] | None = None) -> xr.DataTree:
    """Sweep the sd between schools from one shared effect to 30 points, and report."""
    options = read_options(__doc__, "eight_schools.html", argv)
    return sweep_and_report(eight_schools, data(), low=0.1, high=30.0, options=options)


if __name__ == "__main__":
    main()
