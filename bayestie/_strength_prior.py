"""Priors on sigma."""

import math
from dataclasses import dataclass

import numpy as np
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from torch.distributions import Distribution

from bayestie._errors import OptionError


@dataclass(frozen=True)
class StrengthPrior:
    """A prior on sigma: a continuous distribution, and a point mass at sigma = 0.

    distribution: a Pyro or PyTorch distribution of one number >= 0. point_mass: prior probability of
    sigma = 0, in [0, 1).
    """

    distribution: Distribution
    point_mass: float = 0.0

    def __post_init__(self) -> None:
        fn = self.distribution
        if not isinstance(fn, Distribution) or fn.batch_shape or fn.event_shape:
            raise OptionError(
                "prior",
                found=f"{fn!r}",
                expected="a pyro.distributions distribution of a single number",
                fix="Take pyro.distributions.HalfNormal(1.0), for example.",
            )
        support = fn.support
        low = float(getattr(support, "lower_bound", -math.inf))
        if low < 0 or getattr(support, "is_discrete", False):
            raise OptionError(
                "prior",
                found=f"{fn!r}, whose support is {support}",
                expected="a continuous distribution of a number >= 0, as sigma is",
                fix="Take a half-normal, half-Cauchy, exponential, uniform or log-normal.",
            )
        if not 0 <= self.point_mass < 1:
            raise OptionError(
                "point_mass",
                found=f"{self.point_mass}",
                expected="a probability >= 0 and < 1",
                fix="Give the prior probability of hard sharing, such as 0.5.",
            )

    @property
    def support(self) -> tuple[float, float]:
        """Bounds of the continuous part."""
        low = float(getattr(self.distribution.support, "lower_bound", 0.0))
        return low, float(getattr(self.distribution.support, "upper_bound", math.inf))

    def log_density(self, sigma: NDArray) -> NDArray:
        """Log density of the continuous part, normalised to one."""
        low, high = self.support
        inside = (sigma > low) & (sigma < high)
        given = torch.as_tensor(np.where(inside, sigma, self._inside), dtype=torch.float64)
        with torch.no_grad():
            return np.where(inside, self.distribution.log_prob(given).numpy(), -np.inf)

    @property
    def _inside(self) -> float:
        low, high = self.support
        return low + 1.0 if math.isinf(high) else (low + high) / 2


PRIOR_KINDS = {
    # Each with the median given: the quantile of the standard form at 1/2 sets the scale.
    "half_normal": lambda median: dist.HalfNormal(median / 0.6744897501960817),
    "half_cauchy": dist.HalfCauchy,
    "exponential": lambda median: dist.Exponential(math.log(2) / median),
    "uniform": lambda median: dist.Uniform(0.0, 2 * median),
}


def describe(fn: Distribution) -> str:
    """A distribution as a reader writes it: its name and its parameters."""
    given = {key: getattr(fn, key) for key in fn.arg_constraints if key in fn.__dict__}
    if "low" in fn.__dict__ and "high" in fn.__dict__:
        given = {"low": fn.__dict__["low"], "high": fn.__dict__["high"]}
    if not given and "scale" in fn.arg_constraints:
        given = {"scale": fn.scale}  # pyright: ignore[reportAttributeAccessIssue]
    values = ", ".join(f"{float(x):.4g}" for x in given.values() if torch.as_tensor(x).numel() == 1)
    return f"{type(fn).__name__}({values})"
