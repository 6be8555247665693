"""Draws of data: from the prior, and from the posterior for the same or for new arguments, along sigma."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
import xarray as xr

from bayestie._errors import NameLookupError, OptionError
from bayestie._lane import LaneInputs
from bayestie._model_arguments import argument_names, check_keywords
from bayestie._points import Grid, labelled, read_over
from bayestie._program import LaneProgram
from bayestie._results import build_tree, swept_names
from bayestie._run_context import resolve_device, to_tensors
from bayestie._simulate import Simulated, Simulator, refuse_factors


def prior_predictive(
    model: Callable[..., Any],
    *args: Any,
    over: Mapping[str, Sequence[float]] | None = None,
    num_draws: int = 500,
    seed: int = 0,
    device: str | torch.device | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    **kwargs: Any,
) -> xr.DataTree:
    r"""Draw latents from the prior, and data given them, at every strength.

    .. math:: \theta \sim p(\theta \mid \sigma), \qquad y \sim p(y \mid \theta, \sigma)

    Args:
        model: the Pyro model.
        *args: its positional arguments, the data included: they give the shapes, and the tree keeps
            them beside the draws.
        over: values of swept keywords, as in `sweep`; none for one strength.
        num_draws: draws at every strength.
        seed: of all random numbers; the caller's random state is left as it was.
        device: ``"cpu"`` or ``"cuda"``.
        dims: names of a variable's axes, as in `sweep`.
        coords: labels of a dimension.
        **kwargs: the model's other keyword arguments.

    Returns:
        A DataTree in ArviZ's schema with groups ``prior`` and ``prior_predictive``, dims (swept...,
        chain = 1, draw, ...), ``observed_data`` and ``constant_data``. Compare the spread of
        ``prior_predictive`` with the data at each strength: a strength whose prior data look like
        nothing you could have seen is not worth its place on the grid.

    Raises:
        ModelError: the model cannot be run forward (a factor, an improper prior).
        BayestieError: one of its named kinds, for anything else wrong with the model or an option.

    Reference: Gelman et al. (2020), Bayesian Workflow, section 2.4.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def coin(heads):
        ...     p = pyro.sample("p", dist.Beta(1.0, 1.0))
        ...     with pyro.plate("toss", len(heads)):
        ...         pyro.sample("y", dist.Bernoulli(p), obs=heads)
        >>> prior_predictive(coin, torch.ones(3), num_draws=10).prior_predictive["y"].shape
        (1, 10, 3)
    """
    num_draws = _checked_draws(num_draws)
    grid = read_over(over, kwargs)
    program = LaneProgram(
        model, args, kwargs, grid.at(torch.arange(grid.size)), device=resolve_device(device), seed=seed
    )
    refuse_factors(program)
    points = torch.arange(grid.size, device=program.device).repeat_interleave(num_draws)
    drawn = Simulator.of(program).run(program.point_inputs(points), len(points), seed)
    labels = labelled(program, grid, dims, coords)

    def shaped(kind: str) -> dict[str, np.ndarray]:
        found = drawn.of(kind)
        return {
            n: x.reshape((*grid.shape, 1, num_draws, *x.shape[1:])).cpu().numpy() for n, x in found.items()
        }

    groups = {
        "prior": {**shaped("latent"), **shaped("deterministic")},
        "prior_predictive": shaped("observed"),
        "observed_data": {n: v.cpu().numpy() for n, v in program.observed_values.items()},
        "constant_data": {n: v.cpu().numpy() for n, v in labels.arguments().items()},
    }
    return build_tree(
        swept=grid.coords(),
        groups={group: variables for group, variables in groups.items() if variables},
        event_dims={n: d for n, d in labels.dims.items() if any(n in g for g in groups.values())},
        coords=labels.coords,
        attrs={
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": seed,
            "model": getattr(model, "__name__", type(model).__name__),
            "call": "prior_predictive",
        },
    )


def posterior_predictive(
    path: xr.DataTree,
    model: Callable[..., Any],
    *args: Any,
    num_draws: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    **kwargs: Any,
) -> xr.DataTree:
    r"""Draw data from the posterior at every strength, for the arguments of the sweep or for new ones.

    .. math:: \theta \sim p(\theta \mid y, \sigma), \qquad y^* \sim p(y^* \mid \theta, x^*, \sigma)

    The latents take their stored values; everything else is run forward: observed sites, latents that
    the sweep did not have, deterministic sites.

    Args:
        path: what `sweep` or `fit` returned, with its posterior.
        model: the model of the sweep, or one that predicts from the same latents.
        *args: its positional arguments, new covariates for instance. The data may be anything of the
            right shape, or None where the model allows ``obs=None``.
        num_draws: posterior draws used of each chain, evenly spread; all where left out.
        seed: of all random numbers.
        device: ``"cpu"`` or ``"cuda"``.
        coords: labels of a dimension; those of the sweep hold where the length is the same.
        **kwargs: the model's keyword arguments, without the swept ones.

    Returns:
        A DataTree with group ``posterior_predictive``, dims (swept..., chain, draw, ...), the ``draw``
        coordinate being that of the posterior draw used, and ``constant_data``. Sites that the model
        draws without observing them, and deterministic ones, are in group ``predictions``.

    Raises:
        NameLookupError: a path without posterior, or a model that has none of its latents.
        ShapeError: stored values that do not fit the model with these arguments.
        ModelError: a model that cannot be run.
    """
    names = swept_names(path)
    stored = _stored(path, names)
    num_chains, length = next(iter(stored.values())).shape[len(names) : len(names) + 2]
    rows = _thinned(length, num_draws)
    grid = Grid({name: np.asarray(path["sweep"].coords[name].values, dtype=float) for name in names})
    kwargs = {**json.loads(path.attrs.get("selected", "{}")), **kwargs}
    check_keywords(model, args, kwargs, grid.values)
    where = resolve_device(device)
    tensors = to_tensors(tuple(args), torch.float64, where)
    simulator = Simulator(
        model,
        argument_names(model, tensors),
        tensors,
        to_tensors(dict(kwargs), torch.float64, where),
        device=where,
    )
    lead = grid.shape
    shape = (*lead, num_chains, len(rows))
    num = math.prod(shape)
    given = {
        name: torch.as_tensor(x[(slice(None),) * (len(lead) + 1) + (rows,)], device=where).flatten(
            0, len(lead) + 1
        )
        for name, x in stored.items()
    }
    strengths = torch.arange(grid.size, device=where).repeat_interleave(num_chains * len(rows))
    swept = grid.at(strengths)
    drawn = simulator.run(LaneInputs(swept=swept), num, seed, given=given)
    used = [name for name in drawn.values if name in given and drawn.kinds[name] == "latent"]
    if not used:
        raise NameLookupError(
            f"model '{getattr(model, '__name__', type(model).__name__)}'",
            found=f"sites {sorted(drawn.values)}, none of them a latent of the path",
            expected=f"some of {sorted(given)}",
            fix="Pass the model of the sweep, or one that keeps its site names.",
        )
    observed = {
        site for group in ("observed_data", "posterior_predictive") for site in path.children.get(group, {})
    }
    groups: dict[str, dict[str, np.ndarray]] = {"posterior_predictive": {}, "predictions": {}}
    for name, value in drawn.values.items():
        if name in used:
            continue
        data = drawn.kinds[name] == "observed" or name in observed
        array = value.reshape((*shape, *value.shape[1:])).cpu().numpy()
        groups["posterior_predictive" if data else "predictions"][name] = array
    constant = dict(zip(simulator.argument_names, simulator.args, strict=True)) | dict(simulator.kwargs)
    groups["constant_data"] = {
        name: x.cpu().numpy()
        for name, x in constant.items()
        if isinstance(x, torch.Tensor) and name not in drawn.values and bool(torch.isfinite(x).all())
    }
    event_dims = {
        name: _event_dims(path, name, drawn, len(shape)) for name in drawn.values if name not in used
    }
    draw = path["posterior"].coords["draw"].values[rows]
    return build_tree(
        swept=grid.coords(),
        groups={group: variables for group, variables in groups.items() if variables},
        event_dims=event_dims,
        coords=_labels(path, groups, event_dims) | dict(coords or {}),
        attrs={**{str(k): v for k, v in path.attrs.items()}, "call": "posterior_predictive", "seed": seed},
        group_coords={
            group: {"draw": draw} for group in ("posterior_predictive", "predictions") if groups[group]
        },
    )


def _stored(path: xr.DataTree, names: list[str]) -> dict[str, np.ndarray]:
    if "posterior" not in path.children or not path["posterior"].data_vars:
        raise NameLookupError(
            "posterior",
            found="a tree without posterior draws",
            expected="the group posterior",
            fix="Fit or sweep again without leaving it out by keep=.",
        )
    return {
        str(name): array.transpose(*names, "chain", "draw", ...).values
        for name, array in path["posterior"].data_vars.items()
    }


def _event_dims(path: xr.DataTree, name: str, drawn: Simulated, num_lead: int) -> Sequence[str | None]:
    """The names that the path gives the axes, where they are as long; else those of the plates."""
    shape = drawn.values[name].shape[1:]
    for group in ("posterior", "posterior_predictive"):
        known = path[group].data_vars if group in path.children else {}
        if name in known and known[name].shape[num_lead:] == shape:
            return [str(dim) for dim in known[name].dims[num_lead:]]
    return drawn.dims[name]


def _labels(
    path: xr.DataTree,
    groups: Mapping[str, Mapping[str, np.ndarray]],
    event_dims: Mapping[str, Sequence[str | None]],
) -> dict[str, np.ndarray]:
    """The path's labels of the dims that are as long here as there."""
    lengths = {
        dim: array.shape[len(array.shape) - len(event_dims[name]) + i]
        for variables in groups.values()
        for name, array in variables.items()
        for i, dim in enumerate(event_dims.get(name, ()))
        if dim is not None
    }
    found: dict[str, np.ndarray] = {}
    for node in path.children.values():
        for dim, length in lengths.items():
            if dim in node.coords and node.sizes.get(dim) == length:
                found.setdefault(dim, node.coords[dim].values)
    return found


def _checked_draws(num_draws: Any) -> int:
    if isinstance(num_draws, bool) or not isinstance(num_draws, int | np.integer) or num_draws < 1:
        raise OptionError(
            "num_draws", found=repr(num_draws), expected="a whole number of at least 1", fix="Raise it."
        )
    return int(num_draws)


def _thinned(length: int, wanted: int | None) -> np.ndarray:
    """Indices of ``wanted`` of ``length`` draws, evenly spread."""
    wanted = length if wanted is None else min(_checked_draws(wanted), length)
    return np.unique(np.linspace(0, length - 1, wanted).round().astype(int))
