"""bayestie beside its peers on the workloads, each contender in a fresh process.

A result counts when bulk and tail ESS >= 400 and R-hat < 1.01 for every quantity at every strength. Every
contender gets the fewest draws that reach this, and the peers the better of centred and non-centred at each
strength, both found before the clock runs. Times go from the call to the draws, imports excluded: cold in a
fresh process with empty compile caches, warm the second call; the whole process stands beside them.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import _tables
from benchmarks._runs import Options, run_workload
from benchmarks._worker import CONTENDERS
from benchmarks._workloads import WORKLOADS

PACKAGES = ("bayestie", "torch", "pyro-ppl", "numpyro", "jax", "pymc", "nutpie", "numpy")


def machine() -> dict[str, Any]:
    """What the numbers hold for."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    threads = os.environ.get("OMP_NUM_THREADS")
    cores = len(os.sched_getaffinity(0))
    return {"python": platform.python_version(), "cores": cores, "omp_num_threads": threads, **found}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen workloads and contenders, print the tables, write results.json and results.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--workload", nargs="+", choices=list(WORKLOADS), help="default: all; with --smoke W1"
    )
    parser.add_argument("--contender", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--limit", type=float, default=600.0, help="seconds per timed run (default: 600)")
    parser.add_argument("--search-factor", type=float, default=3.0, help="limits that a search may take")
    parser.add_argument("--plans", type=Path, help="results.json of an earlier run: its settings, no search")
    parser.add_argument("--smoke", action="store_true", help="two strengths, few draws: does it run?")
    parser.add_argument("--strengths", type=int, help="how many, instead of the workload's own number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out") / "benchmarks")
    given = parser.parse_args(argv)

    console = Console(width=None if sys.stdout.isatty() else 200)
    plans = json.loads(given.plans.read_text())["plans"] if given.plans else {}
    options = Options(given.limit, given.search_factor, given.smoke, given.strengths, plans, given.seed)
    given.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": machine(), "limit": given.limit, "plans": dict(plans), "results": []}
    text = [
        "# Benchmarks\n",
        "x: the fastest peer's time over this contender's. |z|: largest difference of posterior means from "
        "the first contender's, in units of both Monte Carlo errors.\n",
        " ".join(f"{name} {value}" for name, value in found["machine"].items()) + "\n",
    ]
    for name in given.workload or (["W1"] if given.smoke else list(WORKLOADS)):
        results = run_workload(name, given.contender, options, console.print)
        title = f"{name}: {WORKLOADS[name].title}"
        rows = _tables.rows(results, given.limit)
        console.print(_tables.screen(title, rows))
        text.append(_tables.markdown(title, rows))
        found["results"] += [result.as_dict() for result in results]
        if not given.smoke:
            found["plans"].setdefault(name, {}).update(
                {r.contender: r.settings for r in results if r.settings}
            )
        # After every workload: a run of hours that is cut short keeps what it has.
        (given.out / "results.json").write_text(json.dumps(found, indent=1))
        (given.out / "results.md").write_text("\n".join(text))
    console.print(f"Results: {given.out / 'results.json'}, {given.out / 'results.md'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
