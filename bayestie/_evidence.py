"""Log evidence along the sweep, by estimators that share as little as possible, and joined."""

import math

import numpy as np
import torch
import xarray as xr
from scipy.special import logsumexp

from bayestie._draws import effective_size
from bayestie._mbar import mbar_evidence
from bayestie._path import sweep_value, swept_values
from bayestie._psis import psis
from bayestie._results import swept_names
from bayestie._thermodynamic import rule, slope

# Above this Pareto khat an importance sampling estimate, and its standard error, mean nothing.
KHAT_LIMIT = 0.7
# Estimates further apart than this many joint errors are reported as a disagreement.
DISAGREE = 3.0
# Rounding of sums of log densities, relative to their size.
_ROUNDING = 1e-9
_BRIDGE_STEPS = 200


def evidence(path: xr.DataTree) -> xr.Dataset:
    r"""Log evidence log p(y | sigma) of every strength, estimated in several ways that must agree.

    - ``laplace``: importance sampling from the Laplace Gaussian g, by the engine. Not used in what follows
      where its weights have khat above 0.7, or ``auto`` refused them and ran chains.
    - ``bridge``: bridge sampling between the posterior draws and g: the fixed point of

      .. math:: Z = \frac{E_g[p / (n_1 p + n_2 Z g)]}{E_{post}[g / (n_1 p + n_2 Z g)]},

      or, where draws of g were not kept, 1 / Z = E_post[g / p]. Missing where the posterior draws are
      themselves resampled from g, or come from a guide, so that it would be no second opinion.
    - ``mbar``: multistate Bennett acceptance ratio over a few draws of all strengths together, carried from
      one to another in each strength's Laplace-whitened coordinates z, where a Gaussian posterior is the
      standard normal at every strength, and over draws of that normal, whose evidence is 1:

      .. math:: Z_j = \sum_n \frac{q_j(z_n)}{\sum_k N_k q_k(z_n) / Z_k}, \qquad
                q_j(z) = p_j(m_j + F_j z) \det F_j.

    - ``thermodynamic``: the integral over log sigma of the posterior mean of
      d log p(theta, level | sigma) / d log sigma, which in form `level` is E[q] / sigma^2 - r per event
      element, from the smallest strength upward, where it starts from the estimates above. On a grid of
      several ties it goes along the first at the smallest values of the others, then along the next.
    - ``combined``: their mean, weighted by inverse variance. Its error supposes that they err together,
      and grows by the Birge ratio where they disagree; an exact value is taken as it is.

    Args:
        path: what ``sweep`` returned, or a fit. Groups left out by ``keep=`` leave their estimate NaN.

    Returns:
        Dataset over the swept dims: ``laplace``, ``bridge``, ``mbar``, ``thermodynamic``, ``combined`` in
        nats, each with its standard error ``<name>_error`` (NaN: not available); ``disagreement``, true where
        two of them differ by more than three joint errors: trust neither there; ``khat`` of the Laplace
        weights, to be read against 0.7. With no estimate at the smallest strength the thermodynamic
        values are relative to it (attribute ``anchor`` says ``relative``).

    Reference: Meng and Wong (1996), Statistica Sinica 6; error of the bridge, Fruehwirth-Schnatter
        (2004), Econometrics Journal 7, eq. (10); Shirts and Chodera (2008), Journal of Chemical Physics
        129, for MBAR; Gelman and Meng (1998), Statistical Science 13, for
        the thermodynamic identity; Birge (1932), Physical Review 40.
    """
    laplace, laplace_error = _laplace(path)
    khat = sweep_value(path, "khat")
    khat = xr.full_like(laplace, -math.inf) if khat is None else khat.astype(float)
    trusted = (khat <= KHAT_LIMIT) & np.isfinite(laplace) & ~_refused(path, laplace)
    bridge, bridge_error = _bridge(path, laplace)
    mbar, mbar_error = _mbar(path, laplace)
    # An error of a nat says that the strengths' draws hardly reach one another: it is no error any more.
    reached = mbar_error < 1.0
    direct = [
        (laplace.where(trusted), laplace_error.where(trusted)),
        (bridge, bridge_error),
        (mbar.where(reached), mbar_error.where(reached)),
    ]
    start, start_error = _join(direct)
    # Better a doubtful anchor than none: the combined value then carries its error.
    start, start_error = start.fillna(laplace), start_error.fillna(laplace_error)
    thermodynamic, thermodynamic_error, anchored = _thermodynamic(path, start, start_error)
    combined, combined_error = _join([*direct, (thermodynamic, thermodynamic_error)])
    combined, combined_error = combined.fillna(laplace), combined_error.fillna(laplace_error)
    data = {
        "laplace": laplace,
        "laplace_error": laplace_error,
        "bridge": bridge,
        "bridge_error": bridge_error,
        "mbar": mbar,
        "mbar_error": mbar_error,
        "thermodynamic": thermodynamic,
        "thermodynamic_error": thermodynamic_error,
        "combined": combined,
        "combined_error": combined_error,
        "disagreement": _disagree([*direct, (thermodynamic, thermodynamic_error)]),
        "khat": khat,
    }
    anchor = "absolute" if anchored else "relative"
    return xr.Dataset({name: x.drop_vars(_scalars(x)) for name, x in data.items()}, attrs={"anchor": anchor})


def _scalars(x: xr.DataArray) -> list[str]:
    return [str(name) for name in x.coords if name not in x.dims]


def _empty(path: xr.DataTree) -> xr.DataArray:
    names = swept_names(path)
    coords = {name: swept_values(path, name) for name in names}
    return xr.DataArray(np.full([len(coords[n]) for n in names], np.nan), coords=coords, dims=names)


def _laplace(path: xr.DataTree) -> tuple[xr.DataArray, xr.DataArray]:
    value, error = sweep_value(path, "log_evidence"), sweep_value(path, "log_evidence_error")
    if value is None or error is None:
        return _empty(path), _empty(path)
    return value.astype(float), error.astype(float)


def _refused(path: xr.DataTree, like: xr.DataArray) -> np.ndarray:
    """True where chains took over from the Laplace weights.

    Where the weights missed a tail their khat looks best, and their evidence is too small: among strengths
    whose weights were refused, khat alone picks out the worst.
    """
    engine = sweep_value(path, "engine")
    if engine is None or path.attrs.get("engine") != "auto":
        return np.zeros(like.shape, dtype=bool)
    return engine.transpose(*like.dims).values.astype(str) == "nuts"


def _bridge(path: xr.DataTree, like: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    value, error = xr.full_like(like, np.nan), xr.full_like(like, np.nan)
    stats = path["sample_stats"].to_dataset() if "sample_stats" in path.children else xr.Dataset()
    if "lp" not in stats or "laplace_log_density" not in stats:
        return value, error
    names = swept_names(path)
    ratios = (stats["lp"] - stats["laplace_log_density"]).transpose(*names, "chain", "draw").values
    second = None
    if "laplace_draws" in path.children:
        drawn = path["laplace_draws"].to_dataset()
        second = (drawn["lp"] - drawn["laplace_log_density"]).transpose(*names, ...).values
    independent = _independent(path, like)
    for index in np.ndindex(like.shape):
        if independent[index]:
            value[index], error[index] = _bridge_one(ratios[index], None if second is None else second[index])
    return value, error


def _independent(path: xr.DataTree, like: xr.DataArray) -> np.ndarray:
    """True where the posterior draws are a chain's or exact: not the Laplace draws again, nor a guide's."""
    engine, exact = sweep_value(path, "engine"), sweep_value(path, "exact")
    if engine is None:
        return np.ones(like.shape, dtype=bool)
    chain = np.isin(engine.values.astype(str), ["nuts", "pyro_nuts"])
    return chain if exact is None else chain | exact.values.astype(bool)


def _bridge_one(ratios: np.ndarray, second: np.ndarray | None) -> tuple[float, float]:
    """log p - log g at posterior draws (chain, draw) and at draws of g (n,) -> log Z and its error."""
    middle = float(np.median(ratios))
    if np.ptp(ratios) <= _ROUNDING * max(1.0, abs(middle)):
        return middle, 0.0
    if second is None:
        return _reciprocal(ratios)
    first = ratios - middle
    # A Laplace draw where the density breaks down has no mass there.
    other = np.nan_to_num(second.reshape(-1) - middle, nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    size = float(np.min(effective_size(np.exp(-np.logaddexp(0.0, first)))))
    log_1, log_2 = math.log(size / (size + other.size)), math.log(other.size / (size + other.size))
    log_z = 0.0
    for _ in range(_BRIDGE_STEPS):
        top = logsumexp(other - np.logaddexp(log_1 + other, log_2 + log_z)) - math.log(other.size)
        bottom = logsumexp(-np.logaddexp(log_1 + first, log_2 + log_z)) - math.log(first.size)
        before, log_z = log_z, float(top - bottom)
        if abs(log_z - before) < 1e-10:
            break
    top = np.exp(other - log_z - np.logaddexp(log_1 + other - log_z, log_2))
    bottom = np.exp(-np.logaddexp(log_1 + first - log_z, log_2))
    variance = top.var(ddof=1) / top.size / top.mean() ** 2
    variance += bottom.var(ddof=1) / float(effective_size(bottom)) / bottom.mean() ** 2
    return middle + log_z, math.sqrt(variance)


def _reciprocal(ratios: np.ndarray) -> tuple[float, float]:
    weights, khat = psis(torch.as_tensor(-ratios.reshape(-1)))
    if not khat <= KHAT_LIMIT:
        return math.nan, math.nan
    inverse = -ratios.reshape(-1)
    log_mean = float(logsumexp(np.minimum(inverse, inverse.max()))) - math.log(inverse.size)
    relative = np.exp(weights.numpy()).reshape(ratios.shape) * inverse.size
    return -log_mean, float(relative.std(ddof=1) / math.sqrt(effective_size(relative)))


def _mbar(path: xr.DataTree, like: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    found = mbar_evidence(path)
    if found is None:
        return xr.full_like(like, np.nan), xr.full_like(like, np.nan)
    return like.copy(data=found[0]), like.copy(data=found[1])


def _thermodynamic(
    path: xr.DataTree, start: xr.DataArray, start_error: xr.DataArray
) -> tuple[xr.DataArray, xr.DataArray, bool]:
    names = swept_names(path)
    slopes = {name: found for name in names if (found := slope(path, name)) is not None}
    if not slopes:
        return xr.full_like(start, np.nan), xr.full_like(start, np.nan), True
    # Keywords that are no tie's sigma cannot be integrated along: each of their values has its own start.
    corner = {name: int(np.argmin(swept_values(path, name))) for name in slopes}
    value, variance = start.isel(corner, drop=True), start_error.isel(corner, drop=True) ** 2
    anchored = bool(np.isfinite(value).all())
    if not anchored:
        value, variance = xr.zeros_like(value), xr.zeros_like(variance)
    along: list[str] = []
    for name in slopes:
        along.append(name)
        rest = {other: corner[other] for other in slopes if other not in along}
        mean, error = (x.isel(rest, drop=True).transpose(name, ...) for x in slopes[name])
        rise, rise_error = rule(swept_values(path, name)).integrate(mean.values, error.values)
        value = value + mean.copy(data=rise)
        variance = variance + mean.copy(data=rise_error**2)
    return value.transpose(*names), (variance**0.5).transpose(*names), anchored


Estimate = tuple[xr.DataArray, xr.DataArray]


def _stack(estimates: list[Estimate]) -> tuple[np.ndarray, np.ndarray]:
    values = np.stack([value.values for value, _ in estimates])
    errors = np.stack([error.values for _, error in estimates])
    return values, np.where(np.isfinite(values), errors, np.inf)


def _join(estimates: list[Estimate]) -> Estimate:
    values, errors = _stack(estimates)
    floor = _ROUNDING * np.maximum(1.0, np.abs(np.where(np.isfinite(values), values, 0.0)))
    held = np.isfinite(values)
    weights = np.where(held, np.maximum(errors, floor) ** -2.0, 0.0)
    total = weights.sum(0)
    share = weights / np.where(total > 0, total, 1.0)
    known = np.where(held, values, 0.0)
    mean = (share * known).sum(0)
    # The estimators share draws: suppose they err together, so the errors add and do not average out.
    error = (share * np.where(held, errors, 0.0)).sum(0)
    exact = (held & (errors == 0)).any(0)
    count = held.sum(0)
    scatter = (weights * (known - mean) ** 2).sum(0) / np.maximum(count - 1, 1)
    error = np.where(exact, 0.0, error * np.sqrt(np.maximum(scatter, 1.0)))
    like = estimates[0][0]
    missing = total == 0
    return like.copy(data=np.where(missing, np.nan, mean)), like.copy(data=np.where(missing, np.nan, error))


def _disagree(estimates: list[Estimate]) -> xr.DataArray:
    values, errors = _stack(estimates)
    apart = np.zeros(values.shape[1:], dtype=bool)
    for i in range(len(values)):
        for j in range(i):
            joint = np.hypot(errors[i], errors[j])
            slack = DISAGREE * joint + 1e-6 * np.maximum(1.0, np.abs(np.nan_to_num(values[i])))
            with np.errstate(invalid="ignore"):
                apart |= np.abs(values[i] - values[j]) > slack
    return estimates[0][0].copy(data=apart)
