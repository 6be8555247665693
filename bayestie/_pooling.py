"""How much each strength shares, copy by copy."""

import numpy as np
import xarray as xr

from bayestie._copies import copies, levels, own_level, prior_variance, unflatten
from bayestie._draws import mean_error, variance_error
from bayestie._path import SAMPLE, TiedSite, require, swept_values, tied_sites
from bayestie._results import swept_names
from bayestie._tension import tension

__all__ = ["pooling", "tension"]


def pooling(path: xr.DataTree) -> xr.DataTree:
    r"""Effective number of parameters of every tied site, and how far each copy is pooled.

    With standard normal coefficients z_j of the deviations and a level l_c per component,

    .. math:: p_{eff} = \sum_c \Big(1 - \frac{Var(l_c \mid y)}{Var(l_c)}\Big)
                      + \sum_j \big(1 - Var(z_j \mid y)\big),

    the trace of I - (prior precision)(posterior covariance): exactly Spiegelhalter's p_D for a Gaussian
    model. It runs from 0 (the data say nothing beyond the prior) to c + r per event element (each
    parameter is measured); at sigma = 0 only the levels are left. A level whose prior variance is not
    known (a base that is not Gaussian) counts as 1; a known level as 0.

    Args:
        path: what ``sweep`` returned, or a fit.

    Returns:
        A DataTree with a node per tied site, over the swept dims:

        - ``p_eff`` with ``p_level`` and ``p_deviation``, its parts, and ``_error`` of each;
          ``p_eff_max``, the most it can be.
        - ``pooling_factor``: 1 - Var_k(E[delta_k]) / E[Var_k(delta_k)] over the copies' deviations
          delta_k; 1 is complete pooling, 0 none (Gelman and Pardoe's lambda).
        - per copy ``pooling``: posterior over prior variance of its deviation; 1 where the data add
          nothing to what the tie says, near 0 where they decide; NaN where the prior variance is 0.
        - per copy ``moved_from_hard`` and ``moved_from_free``: posterior mean less that at the smallest
          and at the largest strength, in the parameter's own units, each with its Monte Carlo ``_error``.

    Raises:
        NameLookupError: the draws of a tied site were not kept.

    Reference: Spiegelhalter, Best, Carlin, van der Linde (2002), JRSS B 64, section 2.4; Gelman and
        Pardoe (2006), Technometrics 48, eq. (4).
    """
    nodes = {name: _pooling_of(path, site) for name, site in tied_sites(path).items()}
    return xr.DataTree.from_dict({f"/{name}": ds for name, ds in nodes.items()})


def _pooling_of(path: xr.DataTree, site: TiedSite) -> xr.Dataset:
    names = swept_names(path)
    deviation, deviation_error = _information(path, site)
    level, level_error, most = _level_information(path, site)
    data: dict[str, xr.DataArray] = {
        "p_eff": deviation + level,
        "p_eff_error": np.hypot(deviation_error, level_error),
        "p_deviation": deviation,
        "p_deviation_error": deviation_error,
        "p_level": level,
        "p_level_error": level_error,
        "p_eff_max": xr.DataArray(float(most + site.rank * site.num_event)),
    }
    theta = copies(path, site)
    deltas = theta - own_level(path, site, theta)
    mean = deltas.mean(SAMPLE)
    within = deltas.var("copy", ddof=1 if theta.sizes["copy"] > 1 else 0).mean(SAMPLE)
    between = mean.var("copy", ddof=1 if theta.sizes["copy"] > 1 else 0)
    # Nothing varies at sigma = 0: the copies are pooled completely.
    data["pooling_factor"] = xr.where(within > 0, 1 - between / within.where(within > 0, 1.0), 1.0)
    prior = prior_variance(path, site, deltas)
    if prior is not None:
        variance, error = variance_error(path, deltas)
        known = prior.where(prior > 0)
        data["pooling"], data["pooling_error"] = variance / known, error / known
    centre, centre_error = mean_error(path, theta)
    axes = [name for name in names if name == site.axis] or names
    for key, pick in (("hard", np.argmin), ("free", np.argmax)):
        if not names:
            continue
        end = {name: int(pick(swept_values(path, name))) for name in axes}
        data[f"moved_from_{key}"] = centre - centre.isel(end, drop=True)
        other = centre_error.isel(end, drop=True)
        here = xr.ones_like(centre_error)
        here[dict(end)] = 0.0
        data[f"moved_from_{key}_error"] = here * np.hypot(centre_error, other)
    return xr.Dataset({key: unflatten(value, path, site) for key, value in data.items()})


def _information(path: xr.DataTree, site: TiedSite) -> tuple[xr.DataArray, xr.DataArray]:
    """sum_j (1 - Var(z_j | y)) with its error; 0 where sigma = 0, as the data never see z there."""
    z = require(path, "posterior", f"{site.name}_z")
    inner = [dim for dim in z.dims if dim not in (*swept_names(path), *SAMPLE)]
    count = z.sizes["chain"] * z.sizes["draw"]
    squares = ((z - z.mean(SAMPLE)) ** 2).sum(inner) * (count / (count - 1))
    total, error = mean_error(path, squares)
    size = float(np.prod([z.sizes[dim] for dim in inner]))
    idle = _idle(path, site, total)
    return xr.where(idle, 0.0, size - total), xr.where(idle, 0.0, error)


def _idle(path: xr.DataTree, site: TiedSite, like: xr.DataArray) -> xr.DataArray:
    if site.axis is None or site.axis not in like.dims:
        return xr.zeros_like(like, dtype=bool)
    return (like[site.axis] == 0) & xr.ones_like(like, dtype=bool)


def _level_information(path: xr.DataTree, site: TiedSite) -> tuple[xr.DataArray, xr.DataArray, int]:
    """sum_c (1 - Var(l_c | y) / Var(l_c)), its error, and how many levels there are."""
    name = f"{site.name}_level"
    zero = xr.DataArray(0.0)
    if name not in path["posterior"].data_vars or name not in path.get("log_prior", xr.DataTree()).data_vars:
        return zero, zero, 0
    level = levels(path, site)
    num = level.sizes["component"] * level.sizes["event"]
    if site.base is None:
        return zero + float(num), zero, num
    variance, error = variance_error(path, level)
    prior = _along(path, site, variance, lambda s: site.level_variances(s).T)
    ratio = (variance / prior.where(prior > 0)).fillna(1.0)
    spread = (error / prior.where(prior > 0)).fillna(0.0)
    inner = ["component", "event"]
    return (1 - ratio).sum(inner), np.sqrt((spread**2).sum(inner)), num


def _along(path: xr.DataTree, site: TiedSite, like: xr.DataArray, formula) -> xr.DataArray:
    """A function of the site's strength, laid out like an array with the inner dims last."""
    inner = [dim for dim in like.dims if dim not in swept_names(path)]
    if site.axis is None or site.axis not in like.dims:
        # A level's prior does not move with sigma in form `level`; the other forms need the strength.
        values = formula(1.0) if site.form == "level" else np.full([like.sizes[d] for d in inner], np.nan)
        return xr.DataArray(values, dims=inner)
    rows = np.stack([formula(float(s)) for s in swept_values(path, site.axis)])
    return xr.DataArray(rows, dims=(site.axis, *inner), coords={site.axis: like[site.axis]})
