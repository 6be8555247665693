"""Multistate Bennett acceptance ratio: the evidence of all strengths at once, from all their draws."""

import contextlib
import json
from collections.abc import Iterator

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.special import logsumexp

from bayestie._results import swept_names

_STEPS = 200
# How far a state's share of all draws may be from its own number of draws, relative to that: when Newton's
# method stops, and where rounding stops it (far below any Monte Carlo error).
_TOLERANCE, _ACCEPTED = 1e-11, 1e-6


def mbar_evidence(path: xr.DataTree) -> tuple[NDArray, NDArray] | None:
    """Log evidence of every swept point and its standard error by MBAR over the group ``overlap``.

    Draws of strengths that the tree does not hold (after `select`) are left out. NaN where the strengths'
    draws do not reach one another at all; None without the group.
    """
    if "overlap" not in path.children:
        return None
    group = path["overlap"].to_dataset()
    names = swept_names(path)
    log_density = group["log_density"].transpose(*names, ...)
    shape = log_density.shape[:-1]
    rows = log_density.values.reshape(-1, log_density.sizes["overlap_draw"])
    worth = group["effective_draws"].transpose(*names).values.reshape(-1)
    source = _sources(path, group, names)
    keep = source >= -1
    kept, source = np.vstack([group["log_normal"].values, rows])[:, keep], source[keep] + 1
    drawn = np.bincount(source, minlength=len(kept))
    size = np.where(drawn > 0, np.append(drawn[0], worth), 0.0)
    value, error = mbar(kept, source, size)
    return value[1:].reshape(shape), error[1:].reshape(shape)


def _sources(path: xr.DataTree, group: xr.Dataset, names: list[str]) -> NDArray[np.intp]:
    """Number of the swept point that each draw is of; -1 the standard normal, -2 a point not held."""
    at: NDArray[np.intp] = np.zeros(group.sizes["overlap_draw"], dtype=np.intp)
    held = np.ones(len(at), dtype=bool)
    for name in names:  # row-major in the order of the dims
        values = group.coords[name].values
        same = group[f"from_{name}"].values[:, None] == values
        held &= same.any(1)
        at = at * len(values) + same.argmax(1)
    for name, value in json.loads(path.attrs.get("selected", "{}")).items():
        held &= group[f"from_{name}"].values == value
    return np.where(group["standard_normal"].values, -1, np.where(held, at, -2))


def mbar(log_density: NDArray, source: NDArray, size: NDArray) -> tuple[NDArray, NDArray]:
    r"""Log normalising constants of K states from draws of some of them, relative to the first state.

    With draws n of all sampled states together, the fixed point of

    .. math:: Z_j = \sum_n \frac{q_j(x_n)}{\sum_k N_k q_k(x_n) / Z_k}

    found by Newton's method on the convex function whose gradient it is. The error is the asymptotic one,
    Theta = W^T (I - W N W^T)^+ W, written as W^T W + W^T W N H^- N W^T W with H the curvature, so that where
    states hardly reach one another it grows without bound.

    Args:
        log_density: log q_j(x_n), (K, draws); -inf where there is no density, which the first has everywhere.
        source: the state that each draw is of, (draws,).
        size: N, effective number of draws of each state, (K,); 0: not sampled. The first must be.

    Returns:
        log Z and its standard error, (K,) each, 0 at the first state; NaN where there is no answer.

    Reference: Shirts and Chodera (2008), Journal of Chemical Physics 129, 124105, eqs. (11) and (D2).
    """
    sampled = np.flatnonzero(size > 0)
    assert sampled[0] == 0
    # Correlated draws weigh less: those of a state count as many as they are worth.
    weight = (size / np.maximum(np.bincount(source, minlength=len(size)), 1))[source]
    # Large numbers that cancel would cost digits: densities are over the first state's, constants near 1.
    gap = log_density - log_density[0]
    start = np.array([_middle(row) for row in gap])
    gap = gap - start[:, None]
    states, count = gap[sampled].T, size[sampled]
    log_z = _solve(states, weight, count)
    if log_z is None:
        return np.full(len(size), np.nan), np.full(len(size), np.nan)
    terms = np.log(count) - log_z + states
    mixture = np.asarray(logsumexp(terms, axis=1))
    share = np.exp(terms - mixture[:, None])
    value = np.asarray(logsumexp(gap - mixture, axis=1, b=weight))
    value -= value[0]
    # Each state's density over the mixture's, less the first state's: a variance without cancellation.
    ratio = np.exp(gap - value[:, None] - mixture).T
    apart = ratio - ratio[:, :1]
    pull = apart.T @ (weight[:, None] * share[:, 1:])
    curvature = _curvature(share, weight)
    try:
        spread = (pull * np.linalg.solve(curvature, pull.T).T).sum(1)
    except np.linalg.LinAlgError:
        return np.full(len(size), np.nan), np.full(len(size), np.nan)
    variance = weight @ apart**2 + spread
    value = value + start
    good = np.isfinite(value) & (variance >= 0)
    return np.where(good, value, np.nan), np.where(good, np.sqrt(np.abs(variance)), np.nan)


def _middle(row: NDArray) -> float:
    finite = row[np.isfinite(row)]
    return float(np.median(finite)) if finite.size else 0.0


def _curvature(share: NDArray, weight: NDArray) -> NDArray:
    """Of the objective in -log Z, without the first state: diag(sums) - share^T weight share."""
    weighted = weight[:, None] * share
    full = np.diag(weighted.sum(0)) - weighted.T @ share
    return full[1:, 1:]


def _solve(states: NDArray, weight: NDArray, count: NDArray) -> NDArray | None:
    """log Z (K,) of sampled states, the first 0, from log densities (draws, K); None: not found."""
    if np.isnan(states).any():
        return None
    f = np.zeros(len(count))
    objective, log_share = _objective(f, states, weight, count)
    for _ in range(_STEPS):
        gradient = weight @ np.exp(log_share) - count
        if np.abs(gradient / count).max() < _TOLERANCE:
            break
        for step in _steps(log_share, weight, count, gradient):
            trial, trial_share = _objective(f - step, states, weight, count)
            closer = np.abs(weight @ np.exp(trial_share) - count).max() < np.abs(gradient).max()
            if trial < objective or closer:
                break
        else:
            break  # rounding: nothing leads further down
        f, objective, log_share = f - step, trial, trial_share
    return -f if np.abs((weight @ np.exp(log_share)) / count - 1.0).max() < _ACCEPTED else None


def _objective(f: NDArray, states: NDArray, weight: NDArray, count: NDArray) -> tuple[float, NDArray]:
    """The convex function of f = -log Z, and the log of each state's share in every draw."""
    terms = np.log(count) + f + states
    mixture = logsumexp(terms, axis=1)
    return float(weight @ mixture - count @ f), terms - mixture[:, None]


def _steps(log_share: NDArray, weight: NDArray, count: NDArray, gradient: NDArray) -> Iterator[NDArray]:
    """Newton's step, halved ever more, then the fixed point's own, which leads down from anywhere."""
    with contextlib.suppress(np.linalg.LinAlgError):
        newton = np.append(0.0, np.linalg.solve(_curvature(np.exp(log_share), weight), gradient[1:]))
        if np.isfinite(newton).all():
            for power in range(12):
                yield newton * 0.5**power
    # In logs: far from the solution a share may be too small for a float.
    own = np.asarray(logsumexp(log_share, axis=0, b=weight[:, None])) - np.log(count)
    yield own - own[0]
