"""What every analysis does alike: read the options, sweep, print the answer, write the report."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xarray as xr

import bayestie as bt


@dataclass(frozen=True)
class Options:
    """Options of an analysis; `smoke` is a short run that exercises every line."""

    seed: int
    smoke: bool
    out: Path


def read_options(description: str | None, out: str, argv: Sequence[str] | None) -> Options:
    """Parse --seed, --smoke and --out; `out` is where the report goes unless told otherwise."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="same seed, same numbers (default: 0)")
    parser.add_argument("--smoke", action="store_true", help="a short run with few strengths")
    parser.add_argument(
        "--out", type=Path, default=Path("out") / out, help="the report, or its folder (default: %(default)s)"
    )
    chosen = parser.parse_args(argv)
    target = chosen.out if chosen.out.suffix == ".html" else chosen.out / out
    return Options(chosen.seed, chosen.smoke, target)


def sweep_and_report(
    model: Callable[..., None],
    data: Mapping[str, Any],
    *,
    low: float,
    high: float,
    options: Options,
    free: bool = False,
    **settings: Any,
) -> xr.DataTree:
    """Sweep sigma over 0, `low` to `high` (and infinity if `free`), print the answer, write the report."""
    # Fewer strengths, not fewer draws: few draws certify no importance weights, and NUTS takes longer.
    num = 3 if options.smoke else 16
    short = {"target_ess": 100} if options.smoke else {}
    over = {"sigma": bt.strengths(low, high, num, hard=True, free=free)}
    path = bt.sweep(model, **data, over=over, seed=options.seed, **short, **settings)
    print(bt.verdict(path))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    bt.report(path, options.out)
    print(f"Report: {options.out}")
    return path
