"""The evidence of a sweep as a curve along one of its strengths."""

import math
from collections.abc import Mapping
from functools import partial

import numpy as np
import xarray as xr
from torch.distributions import Distribution

from bayestie._curve import Averaged, Averager, Curve
from bayestie._evidence import evidence
from bayestie._path import swept_values
from bayestie._results import swept_names
from bayestie._strength_prior import StrengthPrior
from bayestie._thermodynamic import slope


def curve_along(path: xr.DataTree, name: str, priors: Mapping[str, Distribution]) -> Curve:
    """The log evidence along one swept name, the others averaged over under their priors."""
    found = evidence(path)
    log_evidence, error = found["combined"], found["combined_error"]
    slopes = {axis: slope(path, axis) for axis in swept_names(path)}

    def steepness(axis: str, like: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
        given = slopes[axis]
        return given if given is not None else (xr.full_like(like, np.nan), xr.full_like(like, np.nan))

    own, own_error = steepness(name, log_evidence)
    for other in [axis for axis in swept_names(path) if axis != name]:
        values = swept_values(path, other)
        averager: Averager | None = None
        across, across_error = (
            x if other in x.dims else x.broadcast_like(log_evidence) for x in steepness(other, log_evidence)
        )
        rest = [dim for dim in log_evidence.dims if dim != other]
        arrays = [
            x.transpose(*rest, other) for x in (log_evidence, error, across, across_error, own, own_error)
        ]
        shape = arrays[0].shape[:-1]
        out = [np.empty(shape) for _ in range(4)]
        for index in np.ndindex(shape):
            row = [x.values[index] for x in arrays]
            curve = Curve.build(values, *row[:4])
            averager = averager or Averager.build(curve.values, StrengthPrior(priors[other]))
            mean, spread = curve.uncertain(partial(_log_soft, averager))
            # d log of the average is the average of d log under the posterior of the other strength.
            share = _share(averager(curve), curve.values)
            held = np.isin(values, curve.values)
            out[0][index], out[1][index] = mean[0], spread[0]
            out[2][index] = share @ row[4][held]
            out[3][index] = math.sqrt(share**2 @ row[5][held] ** 2)
        like = arrays[0].isel({other: 0}, drop=True)
        log_evidence, error, own, own_error = (like.copy(data=x) for x in out)
        slopes = {a: None if s is None or a != name else s for a, s in slopes.items()}
    return Curve.build(
        swept_values(path, name), log_evidence.values, error.values, own.values, own_error.values
    )


def _log_soft(averager: Averager, curve: Curve) -> np.ndarray:
    return np.array([averager(curve).log_soft])


def _share(averaged: Averaged, values: np.ndarray) -> np.ndarray:
    """Posterior mass of nodes handed to the strengths beside them, linearly in log sigma."""
    position = np.interp(np.log(averaged.nodes.sigma), np.log(values), np.arange(len(values)))
    low = np.minimum(position.astype(int), len(values) - 2)
    up = position - low
    share = np.bincount(low, averaged.mass * (1 - up), minlength=len(values))
    return share + np.bincount(low + 1, averaged.mass * up, minlength=len(values))
