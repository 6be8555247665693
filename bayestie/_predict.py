"""Predictive comparison of the strengths by leave-one-out cross-validation."""

import math

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from scipy.optimize import minimize

from bayestie._draws import effective_size
from bayestie._errors import NameLookupError
from bayestie._path import SAMPLE, sweep_value
from bayestie._psis import good_k, psis
from bayestie._results import swept_names

# Observations smoothed at once, times draws: small enough for the cache.
_BUDGET = 200_000
# Columns of one posterior variable that stand for all in the relative effective sample size.
_COLUMNS = 100
_STACKING_STEPS = 500


def compare(path: xr.DataTree, *, reff: float | None = None) -> xr.Dataset:
    r"""PSIS-LOO of every strength, paired differences to the best, and stacking weights.

    .. math:: \mathrm{elpd} = \sum_i \log p(y_i \mid y_{-i}, \sigma), \qquad
              p(y_i \mid y_{-i}) \approx \sum_s w_{is}\, p(y_i \mid \theta_s)

    with Pareto-smoothed weights w proportional to 1 / p(y_i | theta_s). Each element of an observed
    site is left out in turn; several observed sites are taken together.

    Args:
        path: what ``sweep`` returned, or a fit.
        reff: relative efficiency of the draws for all strengths; estimated for each from the
            posterior draws, as ArviZ does, where left out.

    Returns:
        Dataset over the swept dims, in nats: ``elpd`` with ``elpd_se`` (spread over observations) and
        ``elpd_mcse`` (Monte Carlo error), ``p_loo``, ``max_pareto_k``, ``num_bad_k`` (observations with k
        above ``good_k``: there the value is not to be trusted, and `loo_refits` refits exactly),
        ``elpd_difference`` to the best strength (0 there, negative elsewhere) with the paired
        ``elpd_difference_se``, and ``weight``, the stacking weights, which sum to one. Differences below 4,
        or within two of their errors, decide nothing.
        Pointwise ``elpd_i`` and ``pareto_k`` have the dim ``observation``. Where log_likelihood was
        not kept, all comes from the group ``loo``, which the sweep computed while it ran, without
        ``elpd_mcse``; where that is missing too (too many observations to keep any), from the sums in
        ``sweep``: differences then have no error (NaN). Attribute ``source`` says which.

    Raises:
        NameLookupError: neither log_likelihood nor elpd was kept.

    Reference: Vehtari, Gelman, Gabry (2017), Statistics and Computing 27; Sivula, Magnusson,
        Matamoros, Vehtari (2025), Bayesian Analysis, for reading differences; Yao, Vehtari, Simpson,
        Gelman (2018), Bayesian Analysis 13, for stacking.
    """
    if "log_likelihood" not in path.children or not path["log_likelihood"].data_vars:
        return stored_comparison(path)
    return summarise(pointwise(path, reff))


def stored_comparison(path: xr.DataTree) -> xr.Dataset:
    """`compare` by what the sweep found while it ran: no Monte Carlo error, draws taken as independent."""
    if "loo" not in path.children:
        return _streamed(path)
    num_draws = path["posterior"].sizes["chain"] * path["posterior"].sizes["draw"]
    point = path["loo"].to_dataset().assign_attrs(source="sweep", good_k=good_k(num_draws))
    return summarise(point)


def pointwise(path: xr.DataTree, reff: float | None = None) -> xr.Dataset:
    """PSIS-LOO of every observation and strength: elpd_i, mcse_i, p_loo_i, pareto_k (*swept, observation)."""
    names = swept_names(path)
    rows = _pointwise_draws(path, names)
    lead = [len(path["sweep"].coords[name]) for name in names]
    num_draws = rows[0].shape[-2] * rows[0].shape[-1]
    num_obs = sum(x.shape[len(lead)] for x in rows)
    fields = {key: np.empty((*lead, num_obs)) for key in ("elpd_i", "mcse_i", "p_loo_i", "pareto_k")}
    efficiencies = np.full(lead, reff) if reff is not None else _efficiencies(path, names, lead)
    for index in np.ndindex(*lead):
        start = 0
        for values in rows:
            one = values[index]
            stop = start + len(one)
            found = _leave_one_out(one.reshape(len(one), -1), float(efficiencies[index]))
            for key, column in zip(fields, found, strict=True):
                fields[key][index][start:stop] = column
            start = stop
    data = {key: ((*names, "observation"), x) for key, x in fields.items()}
    coords = {name: path["sweep"].coords[name].values for name in names}
    return xr.Dataset(data, coords=coords, attrs={"source": "log_likelihood", "good_k": good_k(num_draws)})


def summarise(point: xr.Dataset) -> xr.Dataset:
    """What `compare` returns, of what `pointwise` does; observations marked ``refitted`` have no bad k."""
    names = [str(name) for name in point["elpd_i"].dims[:-1]]
    elpd = point["elpd_i"].sum("observation")
    best = point["elpd_i"][elpd.argmax(...)] if names else point["elpd_i"]
    gap = point["elpd_i"] - best
    bad = point["pareto_k"] > point.attrs["good_k"]
    if "refitted" in point:
        bad = bad & ~point["refitted"]
    weights = _stack(point["elpd_i"].values.reshape(-1, point.sizes["observation"]))
    data = {
        "elpd": elpd,
        "elpd_se": _standard_error(point["elpd_i"]),
        "p_loo": point["p_loo_i"].sum("observation"),
        "max_pareto_k": point["pareto_k"].max("observation"),
        "num_bad_k": bad.sum("observation"),
        "elpd_difference": gap.sum("observation"),
        "elpd_difference_se": _standard_error(gap),
        "weight": (names, weights.reshape(elpd.shape)),
        "elpd_i": point["elpd_i"],
        "pareto_k": point["pareto_k"],
    }
    if "mcse_i" in point:
        data["elpd_mcse"] = np.sqrt((point["mcse_i"] ** 2).sum("observation"))
    return xr.Dataset(data, coords=point.coords, attrs=point.attrs)


def _standard_error(pointwise: xr.DataArray) -> xr.DataArray:
    """Of a sum over observations; 0 for a single one, whose spread nothing shows."""
    num = pointwise.sizes["observation"]
    return (num * pointwise.var("observation", ddof=1 if num > 1 else 0)) ** 0.5


def _pointwise_draws(path: xr.DataTree, names: list[str]) -> list[NDArray]:
    """Log likelihood of each observed site, (*swept, observation, chain, draw)."""
    out = []
    for array in path["log_likelihood"].data_vars.values():
        ordered = array.transpose(*names, *SAMPLE, ...).values
        flat = ordered.reshape(*ordered.shape[: len(names) + 2], -1)
        out.append(np.moveaxis(flat, -1, len(names)))
    return out


def _efficiencies(path: xr.DataTree, names: list[str], lead: list[int]) -> NDArray:
    """Mean effective size of the posterior's columns over the number of draws, per strength."""
    columns = []
    for array in path["posterior"].data_vars.values():
        if array.dtype.kind != "f":
            continue
        ordered = array.transpose(*names, *SAMPLE, ...).values
        flat = ordered.reshape(*ordered.shape[: len(names) + 2], -1)
        columns.append(flat[..., :: max(1, flat.shape[-1] // _COLUMNS)])
    weights = sweep_value(path, "ess_weights")
    out = np.ones(lead)
    for index in np.ndindex(*lead):
        draws = np.concatenate([x[index] for x in columns], -1) if columns else np.zeros((1, 4, 1))
        num = draws.shape[0] * draws.shape[1]
        size = effective_size(draws).mean()
        out[index] = min(size, np.inf if weights is None else float(weights.values[index])) / num
    return out


def _leave_one_out(log_likelihood: NDArray, reff: float) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """(observations, draws) -> elpd_i, its Monte Carlo error, p_loo_i and Pareto k, each (observations,)."""
    num_obs, num_draws = log_likelihood.shape
    parts = []
    for start in range(0, num_obs, max(1, _BUDGET // num_draws)):
        rows = torch.as_tensor(
            np.ascontiguousarray(log_likelihood[start : start + max(1, _BUDGET // num_draws)])
        )
        rows = rows.to(torch.float64)
        log_weights, khat = psis(-rows, reff)
        elpd = torch.logsumexp(log_weights + rows, -1)
        lppd = torch.logsumexp(rows, -1) - math.log(num_draws)
        # sum_s w_s^2 (p_s / p - 1)^2: variance of a self-normalised mean, relative to it.
        relative = torch.expm1(rows - elpd[:, None])
        mcse = ((log_weights.exp() * relative).square().sum(-1) / reff).sqrt()
        parts.append(torch.stack([elpd, mcse, lppd - elpd, khat]))
    return tuple(torch.cat(parts, -1).numpy())


def _stack(elpd_i: NDArray) -> NDArray:
    """Weights (models,) on the simplex that maximise sum_i log sum_k w_k exp(elpd_ik)."""
    num_models = len(elpd_i)
    if num_models == 1:
        return np.ones(1)
    density = np.exp(elpd_i - elpd_i.max(0))

    def loss(weights: NDArray) -> tuple[float, NDArray]:
        mixed = np.maximum(weights @ density, 1e-300)
        return -float(np.log(mixed).mean()), -(density / mixed).mean(1)

    found = minimize(
        loss,
        np.full(num_models, 1 / num_models),
        jac=True,
        method="SLSQP",
        bounds=[(0.0, 1.0)] * num_models,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        options={"maxiter": _STACKING_STEPS, "ftol": 1e-12},
    )
    weights = np.clip(found.x, 0.0, None)
    return weights / weights.sum()


def _streamed(path: xr.DataTree) -> xr.Dataset:
    kept = {key: sweep_value(path, key) for key in ("elpd", "elpd_se", "p_loo", "max_pareto_k")}
    data = {key: value.astype(float) for key, value in kept.items() if value is not None}
    if "elpd" not in data:
        raise NameLookupError(
            "log_likelihood",
            found="a tree that holds neither log_likelihood nor elpd",
            expected="one of them",
            fix="Fit or sweep again without leaving both out by keep=, on a model with an observed site.",
        )
    data["elpd_difference"] = data["elpd"] - data["elpd"].max()
    data["elpd_difference_se"] = xr.full_like(data["elpd"], math.nan)
    return xr.Dataset(data, attrs={"source": "sweep"})


def difference(compared: xr.Dataset, first: dict[str, int], second: dict[str, int]) -> tuple[float, float]:
    """elpd of one swept point less that of another, with its paired standard error (NaN if unknown)."""
    if "elpd_i" not in compared:
        return float(compared["elpd"][first] - compared["elpd"][second]), math.nan
    gap = compared["elpd_i"].isel(first) - compared["elpd_i"].isel(second)
    return float(gap.sum()), float(_standard_error(gap))
