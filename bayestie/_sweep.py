"""fit, sweep, strengths: a model at one strength, or at every strength of a grid as one batch."""

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import xarray as xr

from bayestie._assemble import Assembly
from bayestie._build_density import build_density
from bayestie._collect import quantities
from bayestie._density import ProgramDensity
from bayestie._engines import (
    Draws,
    Interrupted,
    LaplaceFit,
    LaplaceProposal,
    Task,
    has_no_use_for_a_mode,
    run_laplace,
    run_nuts,
    run_pyro_nuts,
    run_pyro_svi,
    run_sparse,
    run_svi,
)
from bayestie._errors import InferenceError, OptionError, first_line
from bayestie._program import LaneProgram
from bayestie._remembered import density_of, program_of
from bayestie._results import save
from bayestie._run_context import resolve_device
from bayestie._schedule import checked_schedule, follow
from bayestie._shards import run_in_shards
from bayestie._sparse_density import SparseDensity, build_sparse_density
from bayestie._sweep_options import (
    Options,
    Progress,
    check_clash,
    check_executor,
    check_monitor,
    check_start,
    checked_over,
)


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
    schedule: Mapping[str, Sequence[float]] | None = None,
    monitor: Sequence[str] | None = None,
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
            ``"svi"``, or Pyro's own ``"pyro_nuts"`` and ``"pyro_svi"`` as references. Plates with
            ``subsample_size`` give the two svi minibatches to step on, with all rows to judge the guide by;
            the other engines see all rows throughout.
        seed: of all random numbers; the caller's random state is left as it was.
        num_chains: chains stored, at least 2 for R-hat to mean anything.
        num_draws: draws stored per chain. An engine that needs more to reach ``target_ess`` draws more
            and stores this many, thinned.
        target_ess: bulk and tail effective sample size wanted for every quantity.
        device: ``"cpu"`` (default), ``"cuda"``.
        guide: of the engines svi and pyro_svi: ``"mean_field"``, ``"low_rank"`` or ``"full_rank"``.
        schedule: strengths to pass through on the way to the one asked for,
            ``{"sigma": strengths(0.1, 30, 12)[::-1]}``: the search for the mode, or the guide of engine svi,
            begins at the first of them, where it may be easy, and carries the copies along. What is
            sampled in the end is the same; of several modes another may be found.
        monitor: names of the latent and deterministic sites whose R-hat and effective sample size decide how
            long nuts draws and whether its chains are certified (and those of pyro_nuts); all by default.
            Weights of a net are known only up to the order and the signs of its units, and their chains
            need never meet: name a ``pyro.deterministic`` of what data do identify, such as its predictions.
            Of a model with more than 200 latents and no linear predictors, ``auto`` and ``nuts`` then look
            for no mode, and give no evidence of their own.
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
    options = Options(
        engine=engine, seed=seed, num_chains=num_chains, num_draws=num_draws, target_ess=target_ess,
        device=device, guide=guide, schedule=schedule, monitor=monitor, keep=keep, dims=dims, coords=coords,
        progress=progress, out=out,
    )  # fmt: skip
    return _run("fit", model, args, kwargs, {}, options)


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
    schedule: Mapping[str, Sequence[float]] | None = None,
    monitor: Sequence[str] | None = None,
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
        schedule: strengths every fit passes through first, as in `fit`; a strength leaves a falling schedule
            where that would go below it.
        monitor: names of the sites that must mix, as in `fit`.
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
    options = Options(
        engine=engine, seed=seed, num_chains=num_chains, num_draws=num_draws, target_ess=target_ess,
        device=device, guide=guide, schedule=schedule, monitor=monitor, keep=keep, dims=dims, coords=coords,
        progress=progress, out=out,
    )  # fmt: skip
    if executor is None:
        return _run("sweep", model, args, kwargs, values, options)
    return _sweep_in_shards(executor, model, args, kwargs, values, options)


def _sweep_in_shards(
    executor: Executor,
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    swept: dict[str, np.ndarray],
    options: Options,
) -> xr.DataTree:
    # Bad input is met here, before anything is sent out.
    check_executor(executor)
    check_clash(kwargs, swept)
    if options.schedule is not None:
        checked_schedule(options.schedule, swept, kwargs)
    device, seed = resolve_device(options.device), options.seed
    first = {name: torch.tensor(values[:1], dtype=torch.float64) for name, values in swept.items()}
    program = LaneProgram(model, args, kwargs, first, device=device, seed=seed)
    run = partial(sweep, model, *args, **options.of_shards(), **kwargs)
    tree, whole = run_in_shards(executor, run, swept, seed, options.reporter())
    tree.attrs["call"] = _call_text("sweep", model, program, swept, options)
    if options.out is not None:
        save(tree, options.out)
    if not whole:
        raise KeyboardInterrupt
    return tree


def _run(
    call: str,
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    swept: dict[str, np.ndarray],
    options: Options,
) -> xr.DataTree:
    begin = time.perf_counter()
    check_clash(kwargs, swept)
    engine, out = options.engine, options.out
    schedule = None if options.schedule is None else checked_schedule(options.schedule, swept, kwargs)
    grid = list(itertools.product(*swept.values()))
    points = {name: torch.tensor([p[i] for p in grid], dtype=torch.float64) for i, name in enumerate(swept)}
    device = resolve_device(options.device)
    program, known = program_of(model, args, kwargs, points, device=device, seed=options.seed)
    monitor = tuple(options.monitor or ())
    check_monitor(monitor, program)
    sparse, refusal = _sparse_route(program, engine, schedule is not None)
    task = Task(
        program=program,
        density=density_of(program, known) if sparse is None else ProgramDensity(program),
        num_points=len(grid),
        num_chains=options.num_chains,
        num_draws=options.num_draws,
        target_ess=options.target_ess,
        seed=options.seed,
        progress=options.reporter(),
        options={} if options.guide is None else {"guide": options.guide},
        quantities=lambda at, position: quantities(program, at, position, monitor),
        monitor=monitor,
        sparse=sparse,
        refusal=refusal,
    )
    attrs = {
        **_versions(),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": options.seed,
        "device": str(program.device),
        "engine": engine,
        "model": getattr(model, "__name__", type(model).__name__),
        "call": _call_text(call, model, program, swept, options),
        "swept": json.dumps(list(swept)),
        "density_route": task.density.route if sparse is None else sparse.route,
        "num_latent": program.num_latent,
    }
    if monitor:
        attrs["monitor"] = json.dumps(monitor)
    if schedule is not None:
        attrs["schedule"] = json.dumps({name: values.tolist() for name, values in schedule.items()})
    assembly = Assembly(
        task, swept, attrs, options.keep, dict(options.dims or {}), dict(options.coords or {})
    )
    if sparse is None:
        check_start(task)
    try:
        fit = None if schedule is None else _follow(schedule, engine, task)
        try:
            draws, gaussian = run_engine(engine, task, fit)
        except InferenceError as error:
            if sparse is None or program.num_latent > MAX_DENSE:
                raise
            # The sparse factor was a choice for speed at this size: dense curvature serves what it does not.
            task = replace(task, sparse=None, density=density_of(program, known), refusal=first_line(error))
            assembly.task, attrs["density_route"] = task, task.density.route
            check_start(task)
            draws, gaussian = run_engine(engine, task, fit)
    except Interrupted as interruption:
        if out is not None and (finished := assembly.partial(interruption.draws, begin)) is not None:
            save(finished, out)
        raise
    attrs |= _tier(program)
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


@cache
def _versions() -> dict[str, str]:
    return {f"{name}_version": version(package) for name, package in PACKAGES.items()}


def _tier(program: LaneProgram) -> dict[str, str]:
    """How lanes of the program ran in the end, and why not faster."""
    tiers, loop = program.tiers, program.loop_reason
    reason = loop or tiers.trace_failure or tiers.compile_failure
    found = {"lane_tier": "loop" if loop else tiers.highest}
    return found | ({"lane_tier_reason": reason} if reason else {})


def _follow(schedule: dict[str, np.ndarray], engine: str, task: Task) -> LaplaceFit:
    if task.program.num_latent > MAX_DENSE:
        raise InferenceError(
            "schedule",
            found=f"{task.program.num_latent} latent dimensions",
            expected=f"at most {MAX_DENSE} (modes are looked for with dense curvature)",
            fix="Leave it out.",
        )

    def make_task(program: LaneProgram) -> Task:
        return replace(task, program=program, density=build_density(program))

    return follow(task, schedule, make_task, variational=engine == "svi")


def run_engine(
    engine: str, task: Task, fit: LaplaceFit | None = None
) -> tuple[Draws, LaplaceProposal | None]:
    """Draws at every point by the named engine, with the Laplace fit that gives their evidence.

    ``fit`` is that fit where it is known already.
    """
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
        return run_svi(task, fit), None
    if engine in ("auto", "nuts") and fit is None and has_no_use_for_a_mode(task):
        return run_nuts(task), None
    max_pool = {"laplace": 16, "auto": 4}.get(engine, 1)
    draws, gaussian = run_laplace(task, fit, max_pool=max_pool, evidence_only=engine == "nuts")
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
MIN_SPARSE = 500  # latents: where a sparse factor and blocks begin to be the faster


def _sparse_route(program: LaneProgram, engine: str, scheduled: bool) -> tuple[SparseDensity | None, str]:
    """The density in the coordinates of the copies where it is the faster, or why it does not serve."""
    dense = program.num_latent < MIN_SPARSE or (scheduled and program.num_latent <= MAX_DENSE)
    if dense or engine not in ("auto", "laplace"):
        return None, ""
    return build_sparse_density(program)


def _call_text(
    call: str, model: Any, program: LaneProgram, swept: dict[str, np.ndarray], options: Options
) -> str:
    parts = [getattr(model, "__name__", type(model).__name__), *program.argument_names]
    parts += [f"{name}={_short(value)}" for name, value in program.kwargs.items()]
    if swept:
        over = ", ".join(f"'{n}': [{', '.join(f'{x:.4g}' for x in v)}]" for n, v in swept.items())
        parts.append(f"over={{{over}}}")
    return f"{call}({', '.join([*parts, f'engine={options.engine!r}', f'seed={options.seed}'])})"


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"tensor{tuple(value.shape)}" if value.numel() > 1 else f"{float(value):.6g}"
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
