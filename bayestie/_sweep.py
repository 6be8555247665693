"""fit, sweep, strengths: a model at one strength, or at every strength of a grid as one batch."""

import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from bayestie._affine import build_density
from bayestie._assemble import Assembly
from bayestie._collect import quantities
from bayestie._density import ProgramDensity
from bayestie._engines import (
    Draws,
    Interrupted,
    LaplaceProposal,
    Task,
    run_laplace,
    run_nuts,
    run_pyro_nuts,
    run_pyro_svi,
    run_sparse,
    run_svi,
)
from bayestie._errors import (
    InferenceError,
    KeywordError,
    NameLookupError,
    OptionError,
    OutputError,
    StrengthError,
)
from bayestie._program import LaneProgram, resolve_device
from bayestie._results import save
from bayestie._shards import run_in_shards
from bayestie._sparse_density import SparseDensity, build_sparse_density

ENGINES = ("auto", "laplace", "nuts", "svi", "pyro_nuts", "pyro_svi")
GUIDES = ("mean_field", "low_rank", "full_rank")
Progress = Callable[[dict[str, Any]], None]


def strengths(low: float, high: float, num: int, *, hard: bool = False, free: bool = False) -> list[float]:
    """A grid of prior strengths: ``num`` log-spaced points, and the two ends on request.

    Args:
        low: smallest positive strength, in the units of the parameter's differences.
        high: largest finite strength, same units.
        num: number of log-spaced points from low to high, both included.
        hard: put sigma = 0 (one shared parameter) in front.
        free: put sigma = inf (no sharing) behind; the forms `copies` and `matched` allow it.

    Returns:
        The strengths in increasing order.

    Raises:
        OptionError: low, high or num out of range.

    Example:
        >>> strengths(0.1, 10.0, 3, hard=True)
        [0.0, 0.1, 1.0, 10.0]
    """
    if not (0.0 < low <= high < math.inf):
        raise OptionError(
            "strengths(low, high)",
            found=f"low={low}, high={high}",
            expected="0 < low <= high < inf",
            fix="Ask for the ends 0 and inf with hard=True and free=True.",
        )
    if int(num) != num or num < 1 or (num == 1 and low != high):
        raise OptionError(
            "strengths(num)",
            found=f"num={num} points from {low} to {high}",
            expected="a whole number, at least 2 (or 1 where low equals high)",
            fix="Give the number of log-spaced points.",
        )
    # Rounded to 12 digits: 1.0, not 0.9999999999999998, where the grid passes through it.
    grid = [float(f"{x:.12g}") for x in np.geomspace(low, high, int(num))]
    grid[0], grid[-1] = float(low), float(high)
    return [0.0] * hard + grid + [math.inf] * free


def fit(
    model: Callable[..., Any],
    /,
    *args: Any,
    engine: str = "auto",
    seed: int = 0,
    num_chains: int = 4,
    num_draws: int = 250,
    target_ess: float = 400,
    device: str | torch.device | None = None,
    guide: str | None = None,
    keep: Sequence[str] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    progress: Progress | None = None,
    out: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> xr.DataTree:
    """Fit a Pyro model at one strength.

    Args:
        model: the Pyro model, a callable.
        *args: its positional arguments; arrays become tensors, floats are cast to float64.
        engine: ``"auto"`` (Laplace where it certifies itself, NUTS elsewhere), ``"laplace"``, ``"nuts"``,
            ``"svi"``, or Pyro's own ``"pyro_nuts"`` and ``"pyro_svi"`` as references.
        seed: of all random numbers; the caller's random state is left as it was.
        num_chains: chains stored, at least 2 for R-hat to mean anything.
        num_draws: draws stored per chain. An engine that needs more to reach ``target_ess`` draws more
            and stores this many, thinned.
        target_ess: bulk and tail effective sample size wanted for every quantity.
        device: ``"cpu"`` (default), ``"cuda"``.
        guide: of the engines svi and pyro_svi: ``"mean_field"``, ``"low_rank"`` or ``"full_rank"``.
        keep: groups to store, of ``posterior``, ``log_likelihood``, ``log_prior``,
            ``posterior_predictive``, ``overlap``; by default all that fit in memory comfortably.
        dims: names of a variable's axes, as in ArviZ: ``{"theta": ["school"]}``. Axes of plates carry
            the plates' names already.
        coords: labels of a dimension, as in ArviZ: ``{"school": ["A", "B"]}``.
        progress: called with a dict of events (stage, strengths_done, strengths_total, draws_done,
            min_ess, certified).
        out: path (``.nc`` or ``.zarr``) to save the result to.
        **kwargs: the model's keyword arguments.

    Returns:
        An xarray DataTree in ArviZ's schema with groups posterior, sample_stats, log_likelihood,
        log_prior, tie_energy, posterior_predictive, observed_data, constant_data, laplace_draws, overlap
        (every strength's log density at a few draws of each, for `evidence`), loo (the predictive score of
        every observation, for `compare`) and sweep. Read
        ``sweep.certified`` and ``sweep.reason`` first: they say whether to trust the draws. Beyond 2,000
        latents the copies themselves are sampled: a tied statement's ``_z`` is not stored, and draws that
        would not fit in memory are thinned, with moments of all of them in a group ``summary``.

    Raises:
        BayestieError: one of its named kinds, for anything wrong with the model, the data or an option.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def coin(heads):
        ...     p = pyro.sample("p", dist.Beta(1.0, 1.0))
        ...     with pyro.plate("toss", len(heads)):
        ...         pyro.sample("y", dist.Bernoulli(p), obs=heads)
        >>> bool(fit(coin, torch.tensor([1.0, 0.0, 1.0])).sweep.certified)
        True
    """
    return _run(
        "fit", model, args, kwargs, {}, engine, seed, num_chains, num_draws, target_ess, device, guide,
        keep, dims, coords, progress, out,
    )  # fmt: skip


def sweep(
    model: Callable[..., Any],
    /,
    *args: Any,
    over: Mapping[str, Sequence[float]],
    engine: str = "auto",
    seed: int = 0,
    num_chains: int = 4,
    num_draws: int = 250,
    target_ess: float = 400,
    device: str | torch.device | None = None,
    guide: str | None = None,
    keep: Sequence[str] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    progress: Progress | None = None,
    out: str | os.PathLike[str] | None = None,
    executor: Executor | None = None,
    **kwargs: Any,
) -> xr.DataTree:
    """Fit a Pyro model at every strength of a grid, all strengths and chains as one batch.

    Args:
        model: the Pyro model, a callable.
        *args: its positional arguments.
        over: values of one or several of the model's keywords, ``{"sigma": strengths(0.1, 30, 16)}``;
            several names make a grid, each a dimension of the result.
        engine: as in `fit`; ``"auto"`` decides for each strength and says what it did.
        seed: as in `fit`; and so are the options that follow.
        num_chains: chains stored per strength.
        num_draws: draws stored per chain, the same at every strength.
        target_ess: bulk and tail effective sample size wanted for every quantity at every strength.
        device: ``"cpu"`` or ``"cuda"``.
        guide: of the variational engines.
        keep: groups to store.
        dims: names of a variable's axes.
        coords: labels of a dimension.
        progress: called with a dict of events.
        out: path to save the result to. If the sweep is interrupted (Ctrl-C), the strengths that are
            finished are saved there before KeyboardInterrupt goes on.
        executor: runs shards of neighbouring strengths on other processes or machines: a
            ``concurrent.futures`` executor (of processes that spawn), Dask's ``client.get_executor()``. A
            sweep is cut in the same shards whatever the workers, so the draws are the same; the model and
            its data must pickle.
            Shards know nothing of one another: evidence by MBAR is left out.
        **kwargs: the model's other keyword arguments.

    Returns:
        A DataTree as `fit` returns, every array led by the swept dimensions. Use `select` to pick one
        strength before calling ArviZ, which would pool them.

    Raises:
        BayestieError: one of its named kinds.
    """
    values = checked_over(over)
    if executor is not None:
        return _sweep_in_shards(
            executor, model, args, kwargs, values, engine, seed, num_chains, num_draws, target_ess, device,
            guide, keep, dims, coords, progress, out,
        )  # fmt: skip
    return _run(
        "sweep", model, args, kwargs, values, engine, seed, num_chains, num_draws, target_ess, device, guide,
        keep, dims, coords, progress, out,
    )  # fmt: skip


def _sweep_in_shards(
    executor: Executor,
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    swept: dict[str, np.ndarray],
    engine: str,
    seed: int,
    num_chains: int,
    num_draws: int,
    target_ess: float,
    device: str | torch.device | None,
    guide: str | None,
    keep: Sequence[str] | None,
    dims: Mapping[str, Sequence[str]] | None,
    coords: Mapping[str, Sequence[Any]] | None,
    progress: Progress | None,
    out: str | os.PathLike[str] | None,
) -> xr.DataTree:
    # Bad input is met here, before anything is sent out.
    _check_executor(executor)
    check_options(engine, num_chains, num_draws, target_ess, guide)
    _check_seed(seed)
    if out is not None:
        _check_place(out)
    _check_clash(kwargs, swept)
    first = {name: torch.tensor(values[:1], dtype=torch.float64) for name, values in swept.items()}
    program = LaneProgram(model, args, kwargs, first, device=resolve_device(device), seed=seed)
    run = partial(
        sweep, model, *args, engine=engine, num_chains=num_chains, num_draws=num_draws, target_ess=target_ess,
        device=device, guide=guide, keep=keep, dims=dims, coords=coords, **kwargs,
    )  # fmt: skip
    tree, whole = run_in_shards(executor, run, swept, seed, _guarded(progress))
    tree.attrs["call"] = _call_text("sweep", model, program, swept, engine, seed)
    if out is not None:
        save(tree, out)
    if not whole:
        raise KeyboardInterrupt
    return tree


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


def _run(
    call: str,
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    swept: dict[str, np.ndarray],
    engine: str,
    seed: int,
    num_chains: int,
    num_draws: int,
    target_ess: float,
    device: str | torch.device | None,
    guide: str | None,
    keep: Sequence[str] | None,
    dims: Mapping[str, Sequence[str]] | None,
    coords: Mapping[str, Sequence[Any]] | None,
    progress: Progress | None,
    out: str | os.PathLike[str] | None,
) -> xr.DataTree:
    begin = time.perf_counter()
    check_options(engine, num_chains, num_draws, target_ess, guide)
    _check_seed(seed)
    if out is not None:
        _check_place(out)
    _check_clash(kwargs, swept)
    grid = list(itertools.product(*swept.values()))
    points = {name: torch.tensor([p[i] for p in grid], dtype=torch.float64) for i, name in enumerate(swept)}
    program = LaneProgram(model, args, kwargs, points, device=resolve_device(device), seed=seed)
    sparse, refusal = _sparse_route(program, engine)
    task = Task(
        program=program,
        density=build_density(program) if sparse is None else ProgramDensity(program),
        num_points=len(grid),
        num_chains=num_chains,
        num_draws=num_draws,
        target_ess=target_ess,
        seed=seed,
        progress=_guarded(progress),
        options={} if guide is None else {"guide": guide},
        quantities=lambda at, position: quantities(program, at, position),
        sparse=sparse,
        refusal=refusal,
    )
    attrs = {
        **{f"{name}_version": version(package) for name, package in PACKAGES.items()},
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "device": str(program.device),
        "engine": engine,
        "model": getattr(model, "__name__", type(model).__name__),
        "call": _call_text(call, model, program, swept, engine, seed),
        "swept": json.dumps(list(swept)),
        "density_route": task.density.route if sparse is None else sparse.route,
        "num_latent": program.num_latent,
    }
    assembly = Assembly(task, swept, attrs, keep, dict(dims or {}), dict(coords or {}))
    if sparse is None:
        _check_start(task)
    try:
        draws, gaussian = run_engine(engine, task)
    except Interrupted as interruption:
        if out is not None and (finished := assembly.partial(interruption.draws, begin)) is not None:
            save(finished, out)
        raise
    task.progress({"stage": "collecting", "strengths_total": len(grid), "certified": sum(draws.certified)})
    try:
        tree = assembly.tree(draws, gaussian, begin)
    except KeyboardInterrupt:
        if out is not None:  # the draws are there: labelling them alone takes a moment
            assembly.keep = ("posterior", "log_prior")
            save(assembly.tree(draws, gaussian, begin), out)
        raise
    if out is not None:
        save(tree, out)
    return tree


PACKAGES = {"bayestie": "bayestie", "torch": "torch", "pyro": "pyro-ppl", "arviz": "arviz"}


def run_engine(engine: str, task: Task) -> tuple[Draws, LaplaceProposal | None]:
    """Draws at every point by the named engine, with the Laplace fit that gives their evidence."""
    if engine == "pyro_nuts":
        return run_pyro_nuts(task), None
    if engine == "pyro_svi":
        return run_pyro_svi(task), None
    if task.sparse is not None:
        return run_sparse(task), None
    if task.program.num_latent > MAX_DENSE and engine != "svi":
        refusal = f"; copies as coordinates do not serve it: {task.refusal}" if task.refusal else ""
        raise InferenceError(
            f"engine '{engine}'",
            found=f"{task.program.num_latent} latent dimensions{refusal}",
            expected=f"at most {MAX_DENSE} (a dense curvature matrix per strength)",
            fix="Use engine='svi' with guide='mean_field' or 'low_rank'.",
        )
    if engine == "svi":
        return run_svi(task), None
    draws, gaussian = run_laplace(task, max_pool=16 if engine == "laplace" else 4 if engine == "auto" else 1)
    refused = [i for i, ok in enumerate(draws.certified) if engine == "nuts" or not ok]
    if engine == "laplace" or not refused:
        return draws, gaussian
    index = torch.tensor(refused, device=task.program.device)
    finished = [i for i in range(task.num_points) if i not in refused]
    try:
        draws.replace(run_nuts(task, index, gaussian.fit.take(index)))
    except KeyboardInterrupt as interruption:  # in the warmup no point is finished by nuts
        if isinstance(interruption, Interrupted):
            draws.replace(interruption.draws)
            finished += interruption.draws.points.tolist()
        raise Interrupted(draws.take(sorted(finished))) from interruption
    return draws, gaussian


MAX_DENSE = 2000


def _sparse_route(program: LaneProgram, engine: str) -> tuple[SparseDensity | None, str]:
    """The density in the coordinates of the copies where dense curvature is too large, or why not."""
    if engine not in ("auto", "laplace") or program.num_latent <= MAX_DENSE:
        return None, ""
    return build_sparse_density(program)


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


def _check_executor(executor: Executor) -> None:
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


def _check_clash(kwargs: Mapping[str, Any], swept: Mapping[str, Any]) -> None:
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
    if path.suffix.lower() not in RESULT_SUFFIXES:
        raise OutputError(
            str(path),
            found=f"the suffix {path.suffix!r}",
            expected=f"one of {', '.join(RESULT_SUFFIXES)}",
            fix="Name the file results.nc (one file) or results.zarr (a folder).",
        )
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(
            str(path),
            found=f"{type(error).__name__}: {error.strerror or error}",
            expected="a place that can be written",
            fix="Check that the folder exists, that you may write there and that the disk has room.",
        ) from error


RESULT_SUFFIXES = (".nc", ".nc4", ".netcdf", ".zarr")


def _guarded(progress: Progress | None) -> Progress:
    """The callback, its failures named as its own."""
    if progress is None:
        return lambda event: None
    if not callable(progress):
        raise OptionError(
            "progress",
            found=repr(progress)[:80],
            expected="a callable of one dict",
            fix="Leave it out, or pass a function.",
        )

    def report(event: dict[str, Any]) -> None:
        try:
            progress(event)
        except Exception as error:
            raise OptionError(
                "progress",
                found=f"a callback that raised {type(error).__name__}: {error}",
                expected="one that takes a dict and returns",
                fix="Mend it, or leave it out; Ctrl-C stops a sweep and keeps what is finished.",
            ) from error

    return report


def _check_start(task: Task) -> None:
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


def _call_text(
    call: str, model: Any, program: LaneProgram, swept: dict[str, np.ndarray], engine: str, seed: int
) -> str:
    parts = [getattr(model, "__name__", type(model).__name__), *program.argument_names]
    parts += [f"{name}={_short(value)}" for name, value in program.kwargs.items()]
    if swept:
        over = ", ".join(f"'{n}': [{', '.join(f'{x:.4g}' for x in v)}]" for n, v in swept.items())
        parts.append(f"over={{{over}}}")
    return f"{call}({', '.join([*parts, f'engine={engine!r}', f'seed={seed}'])})"


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"tensor{tuple(value.shape)}" if value.numel() > 1 else f"{float(value):.6g}"
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
