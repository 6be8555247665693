"""Starts contenders, each in a fresh process with empty compile caches, and stops them at their limit."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._judge import largest_z
from benchmarks._worker import CONTENDERS
from benchmarks._workloads import WORKLOADS

OURS = ("bayestie", "bayestie nuts")
# Whose settings a contender takes over: Pyro's NUTS is NumPyro's algorithm, at a thousandth of the speed a
# search would need; lanes of one program cannot each be tried alone.
TAKES_OVER = {"pyro": "numpyro", "numpyro vmap": "numpyro"}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """Options of a run.

    Attributes:
        limit: seconds of a contender's timed process; its search may take `search_factor` times that.
        smoke: two strengths, few draws, no search.
        num: strengths, where not the workload's own number.
        plans: settings found by an earlier search, by workload and contender.
        seed: of all contenders.
    """

    limit: float = 600.0
    search_factor: float = 3.0
    smoke: bool = False
    num: int | None = None
    plans: dict[str, dict[str, list[dict[str, int]]]] = field(default_factory=dict)
    seed: int = 0


@dataclass
class Result:
    """What a contender did on a workload; `record` as the worker left it."""

    workload: str
    contender: str
    settings: list[dict[str, int]]
    record: dict[str, Any]
    stopped: bool = False
    error: str = ""
    means: Any = None
    largest_z: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "means"}


def run_workload(name: str, contenders: Sequence[str], options: Options, say: Say) -> list[Result]:
    """All contenders on one workload, one after another."""
    wanted_num = options.num or (2 if options.smoke else None)
    workload = WORKLOADS[name].shortened(wanted_num, options.smoke)
    known = dict(options.plans.get(name, {}))
    results = []
    with tempfile.TemporaryDirectory() as place:
        arrays = Path(place) / "data.npz"
        workload.save_arrays(arrays)
        num = len(workload.strengths)
        # The owner of settings that others take over goes first.
        for contender in sorted(contenders, key=lambda c: (c in TAKES_OVER, c != "numpyro")):
            spec = {"workload": name, "contender": contender, "arrays": str(arrays), "smoke": options.smoke}
            spec |= {"seed": options.seed, "most": 8_000, "num": num}
            lent = known.get(TAKES_OVER.get(contender, ""))
            if options.smoke:
                # Few draws certify no importance weights, and bayestie would go on to NUTS.
                draws = 250 if contender in OURS else 20
                known.setdefault(contender, [{"centred": 0, "draws": draws, "warmup": 20}] * num)
            elif contender == "pyro":
                known.setdefault(contender, lent or [{"centred": 0, "draws": 1000, "warmup": 300}] * num)
            if contender not in known:
                say(f"{name} {contender}: looking for the fewest draws")
                wanted = {**spec, "mode": "search", "settings": lent}
                record, _, error, _ = _start(wanted, options.limit * options.search_factor, Path(place))
                found = record.get("settings") or lent or [{"centred": 0, "draws": 1000, "warmup": 300}]
                # A search cut short: the last setting serves the strengths that it did not reach.
                known[contender] = (found + found[-1:] * num)[:num]
                if record.get("missing") or error:
                    results.append(Result(name, contender, [], record, error=error or record["missing"]))
                    continue
            say(f"{name} {contender}: timed run")
            settings = known[contender]
            record, stopped, error, means = _start(
                {**spec, "mode": "timed", "settings": settings}, options.limit, Path(place)
            )
            error = error or record.get("missing", "")
            results.append(Result(name, contender, settings, record, stopped, error, means))
    results.sort(key=lambda r: list(CONTENDERS).index(r.contender))
    finished = [r for r in results if r.means is not None]
    for result in finished[1:]:
        result.largest_z = largest_z(result.means, finished[0].means)
    return results


def _start(spec: dict[str, Any], limit: float, place: Path) -> tuple[dict[str, Any], bool, str, Any]:
    """A worker's record, whether it was stopped, its error, the means of its draws."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        record, file = Path(folder) / "record.json", Path(folder) / "spec.json"
        caches = {
            "JAX_COMPILATION_CACHE_DIR": f"{folder}/jax",
            "NUMBA_CACHE_DIR": f"{folder}/numba",
            "PYTENSOR_FLAGS": f"base_compiledir={folder}/pytensor",
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "TRITON_CACHE_DIR": f"{folder}/triton",
        }
        file.write_text(json.dumps({**spec, "record": str(record), "started": time.monotonic()}))
        stopped, error = run_limited("benchmarks._worker", str(file), limit, caches)
        means = record.with_suffix(".npy")
        return (
            json.loads(record.read_text()) if record.exists() else {},
            stopped,
            error,
            np.load(means) if means.exists() else None,
        )


def run_limited(module: str, argument: str, limit: float, environment: dict[str, str]) -> tuple[bool, str]:
    """`python -m module argument` in a process of its own: whether it was stopped at its limit, its error."""
    errors = ""
    with subprocess.Popen(
        [sys.executable, "-m", module, argument],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            _, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return True, ""
        finally:
            process.kill()
    if process.returncode == 0:
        return False, ""
    lines = [line for line in errors.strip().splitlines() if line.strip()]
    return False, lines[-1][:300] if lines else f"exit status {process.returncode}"
