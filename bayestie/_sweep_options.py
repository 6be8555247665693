"""The options of fit and sweep, and what is refused before anything is drawn."""

import difflib
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bayestie._engines import Task
from bayestie._errors import (
    InferenceError,
    KeywordError,
    NameLookupError,
    OptionError,
    StrengthError,
)
from bayestie._places import RESULT_SUFFIXES, check_place
from bayestie._program import LaneProgram

ENGINES = ("auto", "laplace", "nuts", "svi", "pyro_nuts", "pyro_svi")
GUIDES = ("mean_field", "low_rank", "full_rank")
Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a model is fitted and what is kept: what `fit` and `sweep` have in common, checked."""

    engine: str
    seed: int
    num_chains: int
    num_draws: int
    target_ess: float
    device: str | torch.device | None
    guide: str | None
    schedule: Mapping[str, Sequence[float]] | None
    monitor: Sequence[str] | None
    keep: Sequence[str] | None
    dims: Mapping[str, Sequence[str]] | None
    coords: Mapping[str, Sequence[Any]] | None
    progress: Progress | None
    out: str | os.PathLike[str] | None

    def __post_init__(self) -> None:
        check_options(self.engine, self.num_chains, self.num_draws, self.target_ess, self.guide)
        _check_seed(self.seed)
        if self.monitor is not None and not _are_names(self.monitor):
            raise OptionError(
                "monitor",
                found=repr(self.monitor)[:80],
                expected="a list of names of sites, at least one",
                fix='Write monitor=["probability"]; pyro.deterministic makes a site of a value.',
            )
        if self.schedule is not None and self.engine.startswith("pyro_"):
            raise OptionError(
                "schedule",
                found=f"engine '{self.engine}'",
                expected="one of auto, laplace, nuts, svi",
                fix="Leave one of them out: Pyro's engines run at one strength each.",
            )
        if self.out is not None:
            _check_place(self.out)

    def of_shards(self) -> dict[str, Any]:
        """The keywords of `sweep` that all shards have in common: each has a seed, none saves or reports."""
        own = ("seed", "progress", "out")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in own}

    def reporter(self) -> Progress:
        """The callback, one call at a time, its failures named as its own."""
        progress = self.progress
        if progress is None:
            return lambda event: None
        if not callable(progress):
            raise OptionError(
                "progress",
                found=repr(progress)[:80],
                expected="a callable of one dict",
                fix="Leave it out, or pass a function.",
            )

        taking_turns = threading.Lock()  # lanes run on several threads

        def report(event: dict[str, Any]) -> None:
            try:
                with taking_turns:
                    progress(event)
            except Exception as error:
                raise OptionError(
                    "progress",
                    found=f"a callback that raised {type(error).__name__}: {error}",
                    expected="one that takes a dict and returns",
                    fix="Mend it, or leave it out; Ctrl-C stops a sweep and keeps what is finished.",
                ) from error

        return report


def checked_over(over: Mapping[str, Sequence[float]]) -> dict[str, np.ndarray]:
    if not isinstance(over, Mapping) or not over:
        raise OptionError(
            "over",
            found=repr(over)[:80],
            expected="a dict from keywords of the model to the values to try",
            fix='Write over={"sigma": bayestie.strengths(0.1, 30, 16)}.',
        )
    values = {}
    for name, given in over.items():
        try:
            array = np.atleast_1d(np.asarray(given, dtype=float))
        except (TypeError, ValueError):
            array = np.empty((0, 0))
        if array.ndim != 1 or array.size == 0:
            raise OptionError(
                f"over['{name}']",
                found=repr(given)[:80],
                expected="a list of numbers, at least one",
                fix="Sweep a scalar keyword; scale a tensor by it inside the model.",
            )
        if np.isnan(array).any() or len(np.unique(array)) < array.size:
            raise StrengthError(
                f"over['{name}']",
                found="NaN" if np.isnan(array).any() else "a value twice",
                expected="distinct numbers",
                fix="Remove it from the list.",
            )
        values[name] = array
    return values


def check_options(engine: str, num_chains: int, num_draws: int, target_ess: float, guide: str | None) -> None:
    if engine not in ENGINES:
        raise NameLookupError(
            "engine",
            found=repr(engine),
            expected=f"one of {', '.join(ENGINES)}",
            fix="Leave it at 'auto' unless you want one engine for every strength.",
        )
    for name, value, least in (("num_chains", num_chains, 1), ("num_draws", num_draws, 4)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise OptionError(
                name, found=repr(value), expected=f"a whole number of at least {least}", fix="Raise it."
            )
    if not (isinstance(target_ess, int | float) and 0 < target_ess < math.inf):
        raise OptionError(
            "target_ess", found=repr(target_ess), expected="a positive number", fix="400 is usual."
        )
    if guide is not None and (
        engine not in ("svi", "pyro_svi") or (isinstance(guide, str) and guide not in GUIDES)
    ):
        raise OptionError(
            "guide",
            found=f"{guide!r} with engine '{engine}'",
            expected=f"one of {', '.join(GUIDES)}, with engine 'svi' or 'pyro_svi'",
            fix="Name the engine too: engine='svi'.",
        )


def _are_names(given: Any) -> bool:
    is_list = isinstance(given, Sequence) and not isinstance(given, str)
    return is_list and len(given) > 0 and all(isinstance(name, str) for name in given)


def check_monitor(monitor: Sequence[str], program: LaneProgram) -> None:
    """Refuse names of what is no posterior variable with numbers in it."""
    sites = {**program.latent, **program.deterministic}
    for name in monitor:
        if name not in sites:
            near = ", ".join(difflib.get_close_matches(name, sites, n=3))
            raise NameLookupError(
                f"monitor '{name}'",
                found="no such latent or deterministic site" + (f" (did you mean {near}?)" if near else ""),
                expected=f"one of {sorted(sites)}",
                fix=f'Correct the name, or state pyro.deterministic("{name}", ...) in the model.',
            )


def check_executor(executor: Executor) -> None:
    if isinstance(executor, ThreadPoolExecutor) and executor._max_workers > 1:
        raise OptionError(
            "executor",
            found=f"a ThreadPoolExecutor of {executor._max_workers} workers",
            expected="processes, or one thread: threads share Pyro's handlers",
            fix="Use a ProcessPoolExecutor that spawns, or Dask's client.get_executor().",
        )
    context = getattr(executor, "_mp_context", None)
    if context is not None and context.get_start_method() == "fork":
        raise OptionError(
            "executor",
            found="a process pool that forks",
            expected="one that spawns: torch's threads hang in a forked process",
            fix="ProcessPoolExecutor(mp_context=multiprocessing.get_context('spawn')), in a file whose main "
            "part stands under if __name__ == '__main__'.",
        )


def check_clash(kwargs: Mapping[str, Any], swept: Mapping[str, Any]) -> None:
    clash = [name for name in kwargs if name in swept]
    if clash:
        raise KeywordError(
            f"keyword '{clash[0]}'",
            found="a value for a keyword that is swept as well",
            expected="one or the other",
            fix="Drop it from the call, or from over=.",
        )


def _check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**63:
        raise OptionError(
            "seed",
            found=repr(seed),
            expected="a whole number from 0 to 2^63 - 1",
            fix="Any will do: the same seed gives the same draws.",
        )


def _check_place(out: str | os.PathLike[str]) -> None:
    """Refuse a place that cannot be written before anything is computed."""
    try:
        path = Path(out)
    except TypeError as error:
        raise OptionError(
            "out", found=repr(out)[:80], expected="a path", fix="Name a file, results.nc, or leave it out."
        ) from error
    check_place(path, RESULT_SUFFIXES)


def check_start(task: Task) -> None:
    """Refuse a model whose log joint is finite nowhere near the origin, and name the site."""
    program, points = task.program, task.points
    start = 1e-3 * task.normals((len(points), 1, program.num_latent), 104)
    dead = ~torch.isfinite(task.density.value(points, start)).squeeze(1)
    if not bool(dead.any()):
        return
    points = points[dead]
    start = 1.5 * task.normals((len(points), 64, program.num_latent), 105)
    dead = ~torch.isfinite(task.density.value(points, start)).any(1)
    if not bool(dead.any()):
        return
    point = int(points[dead][0])
    with torch.no_grad(), program.quiet():
        lane = program.run_lane(start[dead][0, 0], program.point(point))
    sums = {name: float(x.sum()) for name, x in lane.log_densities.items()}
    wrong = {name: x for name, x in sums.items() if not math.isfinite(x)} or {"the log joint": math.nan}
    name, value = next(iter(wrong.items()))
    at = ", ".join(f"{k}={float(v[point]):g}" for k, v in program.swept.items())
    raise InferenceError(
        f"site '{name}'" + (f" at {at}" if at else ""),
        found=f"log density {value:g} at every one of 64 starting positions",
        expected="a finite log density somewhere",
        fix="Check that the data can occur under the model, and the model's arithmetic (log of 0, 0 / 0).",
    )
