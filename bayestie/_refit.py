"""Exact leave-one-out by refits, all of them lanes: whole copies, and observations PSIS cannot judge."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from bayestie._errors import DataError, NameLookupError
from bayestie._leave_out import LeftOut, Scores, leave_out, observation_shapes
from bayestie._owners import Groups, found_owners, given_owners
from bayestie._points import Grid, Work, labelled, one_tie, read_over, refuse_options, site_dims
from bayestie._predict import pointwise, summarise
from bayestie._program import LaneProgram
from bayestie._results import swept_names
from bayestie._run_context import resolve_device


def leave_copy_out(
    model: Callable[..., Any],
    *args: Any,
    over: Mapping[str, Sequence[float]],
    site: str | None = None,
    groups: Groups | None = None,
    engine: str = "auto",
    seed: int = 0,
    num_chains: int = 4,
    num_draws: int = 250,
    target_ess: float = 400,
    device: str | torch.device | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
    **kwargs: Any,
) -> xr.Dataset:
    r"""Predict each copy's observations from those of the other copies, at every strength, by exact refits.

    .. math:: \mathrm{elpd} = \sum_k \log p(y_k \mid y_{-k}, \sigma)

    with y_k all observations of copy k. This is what sharing is for: a new school, a new district. All
    refits, strengths times copies, are points of one batch; the observations left out have weight 0.

    Args:
        model: the Pyro model.
        *args: its positional arguments.
        over: values of swept keywords, as in `sweep`.
        site: the tied site whose copies are left out; not needed where there is one.
        groups: the copy (0-based) that each observation belongs to, -1 for none, of the shape of the
            observed site; by site where there are several. Found from the model where left out: an
            observation belongs to the copy that its distribution moves with.
        engine: as in `sweep`, and so are the options that follow.
        seed: of all random numbers.
        num_chains: chains per refit.
        num_draws: draws per chain.
        target_ess: effective sample size wanted of every refit.
        device: ``"cpu"`` or ``"cuda"``.
        dims: names of a variable's axes.
        coords: labels of a dimension.
        progress: called with a dict of events.
        **kwargs: the model's other keyword arguments.

    Returns:
        Dataset over the swept dims, in nats: ``elpd`` with ``elpd_se`` (spread over copies) and
        ``elpd_mcse`` (Monte Carlo error), ``elpd_difference`` to the best strength with the paired
        ``elpd_difference_se`` and ``elpd_difference_mcse``. Per copy: ``elpd_copy`` with ``mcse_copy``, the
        joint score of its observations given all others; ``source``, how it was had: ``evidence`` (a
        difference of two certified log evidences) or ``draws`` (a mean over the refit's draws);
        ``certified`` of the refit; ``num_observations``. A copy without observations scores 0. Read
        differences as `compare`'s: below 4, or within two of their errors, they decide nothing.

    Raises:
        ModelError: an observation depends on several copies and groups is not given, or none does.
        ShapeError: groups do not fit the observations.
        BayestieError: one of its named kinds.

    Reference: Vehtari, Gelman, Gabry (2017), section 3.5, and Merkle, Furr, Rabe-Hesketh (2019),
        Psychometrika 84, on leaving out clusters.
    """
    refuse_options(model, args, ("site", "groups"))
    grid = read_over(over, kwargs)
    work = Work(engine, seed, num_chains, num_draws, target_ess, resolve_device(device), progress)
    base = LaneProgram(model, args, kwargs, grid.at(torch.arange(grid.size)), device=work.device, seed=seed)
    use = one_tie(base, site)
    owners = given_owners(base, use, groups) if groups is not None else found_owners(base, use)
    num_copies = use.tie.num_copies
    joined = np.concatenate([o.reshape(-1) for o in owners.values()])
    count = np.bincount(joined[joined >= 0], minlength=num_copies)
    copies = np.flatnonzero(count)
    left = LeftOut(
        torch.arange(grid.size).repeat_interleave(len(copies)),
        {
            name: (torch.as_tensor(o) == torch.as_tensor(copies).reshape(-1, *[1] * o.ndim)).repeat(
                grid.size, *[1] * o.ndim
            )
            for name, o in owners.items()
        },
    )
    scores = leave_out(base, grid, left, work, model, args, kwargs)
    labels = labelled(base, grid, dims, coords)
    return _copies_dataset(grid, scores, copies, count, site_dims(labels, use)[0], labels.coords)


def _copies_dataset(
    grid: Grid, scores: Scores, copies: np.ndarray, count: np.ndarray, dim: str, labels: Mapping[str, Any]
) -> xr.Dataset:
    lead, used = grid.shape, len(copies)
    names = grid.names

    def wide(values: np.ndarray, empty: Any) -> np.ndarray:
        out = np.full((*lead, len(count)), empty, dtype=values.dtype)
        out[..., copies] = values.reshape((*lead, used))
        return out

    elpd, error, shared = (x.reshape((*lead, used)) for x in (scores.elpd, scores.error, scores.shared))
    total = elpd.sum(-1)
    # The full data's evidence stands once in every difference, so its error adds up before it is squared.
    mcse = np.sqrt((error**2).sum(-1) + shared.sum(-1) ** 2)
    best = np.unravel_index(np.argmax(total), lead) if lead else ()
    gap = elpd - elpd[best]
    gap_mcse = np.hypot(mcse, mcse[best])
    if lead:
        gap_mcse[best] = 0.0
    num = max(used, 2)

    def spread(x: np.ndarray) -> np.ndarray:
        return np.sqrt(num * x.var(-1, ddof=1)) if used > 1 else np.zeros(lead)

    data = {
        "elpd": (names, total),
        "elpd_se": (names, spread(elpd)),
        "elpd_mcse": (names, mcse),
        "elpd_difference": (names, gap.sum(-1)),
        "elpd_difference_se": (names, spread(gap)),
        "elpd_difference_mcse": (names, gap_mcse),
        "elpd_copy": ((*names, dim), wide(scores.elpd, 0.0)),
        "mcse_copy": ((*names, dim), wide(np.hypot(scores.error, scores.shared), 0.0)),
        "source": ((*names, dim), wide(scores.source.astype("U8"), "none")),
        "certified": ((*names, dim), wide(scores.certified, True)),
        "num_observations": ((dim,), count),
    }
    coords = grid.coords() | {dim: labels.get(dim, np.arange(len(count)))}
    return xr.Dataset(data, coords=coords)


def loo_refits(
    path: xr.DataTree,
    model: Callable[..., Any],
    *args: Any,
    engine: str = "auto",
    seed: int = 0,
    num_chains: int = 4,
    num_draws: int = 250,
    target_ess: float = 400,
    device: str | torch.device | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
    **kwargs: Any,
) -> xr.Dataset:
    r"""`compare`, with observations whose Pareto k is bad left out by an exact refit instead.

    .. math:: \log p(y_i \mid y_{-i}, \sigma) \quad \text{by a fit with weight 0 on } y_i

    All refits, over strengths and observations, are points of one batch.

    Args:
        path: what `sweep` or `fit` returned, with its log_likelihood.
        model: the model of that call.
        *args: its positional arguments.
        engine: as in `sweep`, and so are the options that follow.
        seed: of all random numbers.
        num_chains: chains per refit.
        num_draws: draws per chain.
        target_ess: effective sample size wanted of every refit.
        device: ``"cpu"`` or ``"cuda"``.
        progress: called with a dict of events.
        **kwargs: the model's keyword arguments, without the swept ones.

    Returns:
        What `compare` returns, ``elpd_i`` and its error replaced at the observations refitted, which
        ``refitted`` marks; ``pareto_k`` stays that of PSIS, and ``num_bad_k`` counts what is left.

    Raises:
        NameLookupError: the path has no log_likelihood.
        DataError: the model observes other data than the path.
    """
    if "log_likelihood" not in path.children or not path["log_likelihood"].data_vars:
        raise NameLookupError(
            "log_likelihood",
            found="a tree without pointwise log likelihoods",
            expected="the group log_likelihood",
            fix="Fit or sweep again with keep= that names log_likelihood.",
        )
    point = pointwise(path)
    names = swept_names(path)
    grid = Grid({name: np.asarray(path["sweep"].coords[name].values, dtype=float) for name in names})
    bad = (point["pareto_k"] > point.attrs["good_k"]).values.reshape(grid.size, -1)
    strengths, observations = np.nonzero(bad)
    point["refitted"] = (point["pareto_k"].dims, bad.reshape(point["pareto_k"].shape))
    if not len(strengths):
        return _with_refits(point)
    work = Work(engine, seed, num_chains, num_draws, target_ess, resolve_device(device), progress)
    kwargs = {**json.loads(path.attrs.get("selected", "{}")), **kwargs}
    base = LaneProgram(model, args, kwargs, grid.at(torch.arange(grid.size)), device=work.device, seed=seed)
    shapes = observation_shapes(base)
    _check_same_data(path, base)
    masks, start = {}, 0
    for name in path["log_likelihood"].data_vars:
        shape = shapes[str(name)]
        mask = torch.zeros(len(strengths), shape.numel(), dtype=torch.bool)
        inside = (observations >= start) & (observations < start + shape.numel())
        mask[np.flatnonzero(inside), observations[inside] - start] = True
        masks[str(name)] = mask.reshape(len(strengths), *shape)
        start += shape.numel()
    scores = leave_out(base, grid, LeftOut(torch.as_tensor(strengths), masks), work, model, args, kwargs)
    # p_loo_i + elpd_i is the log pointwise predictive density, which refits do not change.
    density = point["p_loo_i"] + point["elpd_i"]
    for field, values in (("elpd_i", scores.elpd), ("mcse_i", np.hypot(scores.error, scores.shared))):
        array = point[field].values.reshape(bad.shape).copy()
        array[bad] = values
        point[field] = (point[field].dims, array.reshape(point[field].shape))
    point["p_loo_i"] = density - point["elpd_i"]
    return _with_refits(point)


def _with_refits(point: xr.Dataset) -> xr.Dataset:
    return summarise(point).assign(refitted=point["refitted"])


def _check_same_data(path: xr.DataTree, program: LaneProgram) -> None:
    for name, value in program.observed_values.items():
        kept = "observed_data" in path.children and name in path["observed_data"].data_vars
        stored = path["observed_data"].data_vars[name].values if kept else None
        if stored is None or not np.array_equal(stored, value.cpu().numpy(), equal_nan=True):
            raise DataError(
                f"observed site '{name}'",
                found="values that are not those of the path",
                expected="the model and the arguments of the sweep",
                fix="Pass the same arguments as to the sweep.",
            )
