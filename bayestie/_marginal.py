"""The evidence of a sweep as a curve along one of its strengths."""

from collections.abc import Mapping
from dataclasses import dataclass
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
    """The log evidence along one swept name, the others averaged over.

    Each other strength is averaged under its prior; a swept keyword without one, over its values with
    equal weights.
    """
    found = evidence(path)
    field = _Field(
        found["combined"], found["combined_error"], {axis: slope(path, axis) for axis in swept_names(path)}
    )
    for other in swept_names(path):
        if other != name:
            prior = priors.get(other)
            field = field.mixed(other) if prior is None else field.averaged(other, StrengthPrior(prior))
    own, own_error = field.steepness(name)
    arrays = (field.log_evidence, field.error, own, own_error)
    return Curve.build(swept_values(path, name), *(x.values for x in arrays))


@dataclass(frozen=True)
class _Field:
    """Log evidence over several swept names, its error, and its slopes along log sigma where known."""

    log_evidence: xr.DataArray
    error: xr.DataArray
    slopes: dict[str, tuple[xr.DataArray, xr.DataArray] | None]

    def steepness(self, axis: str) -> tuple[xr.DataArray, xr.DataArray]:
        """Slope along one axis and its error; NaN where not known."""
        given = self.slopes[axis]
        nothing = xr.full_like(self.log_evidence, np.nan)
        return (nothing, nothing) if given is None else given

    def averaged(self, other: str, prior: StrengthPrior) -> "_Field":
        """Without one axis, averaged over it under a prior on sigma."""
        values = self.log_evidence[other].values
        across, across_error = self.steepness(other)
        averagers: dict[int, Averager] = {}

        def average(*row: np.ndarray) -> tuple[float, float, np.ndarray]:
            curve = Curve.build(values, *row)
            averager = averagers.setdefault(len(curve.values), Averager.build(curve.values, prior))
            mean, spread = curve.uncertain(partial(_log_soft, averager))
            share = np.zeros(len(values))
            share[np.searchsorted(values, curve.values)] = _share(averager(curve), curve.values)
            return float(mean[0]), float(spread[0]), share

        order = np.argsort(values)
        values = values[order]
        fields = [x.isel({other: order}) for x in (self.log_evidence, self.error, across, across_error)]
        value, error, share = xr.apply_ufunc(
            average,
            *fields,
            input_core_dims=[[other]] * 4,
            output_core_dims=[[], [], [other]],
            vectorize=True,
        )
        return _Field(value, error, self._slopes_under(share.assign_coords({other: values}), other))

    def mixed(self, other: str) -> "_Field":
        """Without one axis, its values weighted equally."""
        top = self.log_evidence.max(other)
        weight = self.log_evidence.copy(data=np.exp((self.log_evidence - top).values))
        mean = weight.mean(other)
        share = weight / weight.sum(other)
        error = (share**2 * self.error**2).sum(other) ** 0.5
        return _Field(top + mean.copy(data=np.log(mean.values)), error, self._slopes_under(share, other))

    def _slopes_under(
        self, share: xr.DataArray, other: str
    ) -> dict[str, tuple[xr.DataArray, xr.DataArray] | None]:
        # d log of an average is the average of d log under the posterior of what is averaged over.
        out: dict[str, tuple[xr.DataArray, xr.DataArray] | None] = {}
        for axis, given in self.slopes.items():
            if axis != other:
                out[axis] = given and (
                    (share * given[0]).sum(other),
                    (share**2 * given[1] ** 2).sum(other) ** 0.5,
                )
        return out


def _log_soft(averager: Averager, curve: Curve) -> np.ndarray:
    return np.array([averager(curve).log_soft])


def _share(averaged: Averaged, values: np.ndarray) -> np.ndarray:
    """Posterior mass of nodes handed to the strengths beside them, linearly in log sigma."""
    position = np.interp(np.log(averaged.nodes.sigma), np.log(values), np.arange(len(values)))
    low = np.minimum(position.astype(int), len(values) - 2)
    up = position - low
    share = np.bincount(low, averaged.mass * (1 - up), minlength=len(values))
    return share + np.bincount(low + 1, averaged.mass * up, minlength=len(values))
