"""Dyestuff: do batches differ? Two data sets of one layout, one where they do and one where they do not.

Run: python -m analyses.dyestuff [--seed 0] [--smoke] [--out out/dyestuff.html]
The report of the second set is written beside the first, with "2" at the end of its name.
"""

from collections.abc import Sequence
from dataclasses import replace

import xarray as xr

from analyses._command import read_options, sweep_and_report
from models.dyestuff import data, dyestuff


def main(argv: Sequence[str] | None = None) -> tuple[xr.DataTree, xr.DataTree]:
    """Sweep the sd between batches for both sets, and report each."""
    options = read_options(__doc__, "dyestuff.html", argv)
    print("Dyestuff")
    first = sweep_and_report(dyestuff, data(), low=3.0, high=300.0, options=options)
    print("\nDyestuff2")
    beside = options.out.with_stem(options.out.stem + "2")
    second = sweep_and_report(
        dyestuff, data("Dyestuff2"), low=0.1, high=30.0, options=replace(options, out=beside)
    )
    return first, second


if __name__ == "__main__":
    main()
