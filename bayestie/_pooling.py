"""How much each strength shares, copy by copy."""

import numpy as np
import xarray as xr

from bayestie._copies import copies, levels, own_level, prior_variance, unflatten
from bayestie._draws import mean_error, variance_error
from bayestie._path import SAMPLE, TiedSite, along_strength, require, swept_values, tied_sites
from bayestie._results import swept_names


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
    data = {
        "p_eff": deviation + level,
        "p_eff_error": (deviation_error**2 + level_error**2) ** 0.5,
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
    prior = prior_variance(path, site, theta.sizes["copy"])
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
        data[f"moved_from_{key}_error"] = here * (centre_error**2 + other**2) ** 0.5
    return xr.Dataset({key: unflatten(value, path, site) for key, value in data.items()})


def _information(path: xr.DataTree, site: TiedSite) -> tuple[xr.DataArray, xr.DataArray]:
    """sum_j (1 - Var(z_j | y)) with its error; 0 where sigma = 0, as the data never see z there."""
    if site.rank == 0:
        return xr.DataArray(0.0), xr.DataArray(0.0)
    z = require(path, "posterior", f"{site.name}_z")
    inner = [dim for dim in z.dims if dim not in (*swept_names(path), *SAMPLE)]
    count = z.sizes["chain"] * z.sizes["draw"]
    squares = ((z - z.mean(SAMPLE)) ** 2).sum(inner) * (count / (count - 1))
    total, error = mean_error(path, squares)
    size = float(np.prod([z.sizes[dim] for dim in inner]))
    seen = along_strength(path, site, lambda sigma: np.array(sigma > 0), ())
    seen = xr.DataArray(True) if seen is None else seen
    return xr.where(seen, size - total, 0.0), xr.where(seen, error, 0.0)


def _level_information(path: xr.DataTree, site: TiedSite) -> tuple[xr.DataArray, xr.DataArray, int]:
    """sum_c (1 - Var(l_c | y) / Var(l_c)), its error, and how many levels there are."""
    zero = xr.DataArray(0.0)
    if site.known_level is not None:
        return zero, zero, 0
    level = levels(path, site)
    num = level.sizes["component"] * level.sizes["event"]
    if site.base is None:
        return zero + float(num), zero, num
    variance, error = variance_error(path, level)
    inner = ("component", "event")
    prior = along_strength(path, site, lambda sigma: site.level_variances(sigma).T, inner)
    if prior is None and site.form == "level":
        # There the level's prior is the base, whatever the strength.
        prior = xr.DataArray(site.level_variances(1.0).T, dims=inner)
    if prior is None:
        return zero * np.nan, zero * np.nan, num
    # A level of variance 0 is known: form `matched` at sigma = inf.
    ratio = xr.where(prior > 0, variance / prior.where(prior > 0, 1.0), 1.0)
    spread = xr.where(prior > 0, error / prior.where(prior > 0, 1.0), 0.0)
    return (1 - ratio).sum(inner), (spread**2).sum(inner) ** 0.5, num
