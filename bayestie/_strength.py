"""One sweep, any hyperprior afterwards: posterior of sigma, averaged draws, hard against soft."""

import math
from collections.abc import Mapping

import numpy as np
import torch
import xarray as xr
from torch.distributions import Distribution

from bayestie._curve import Averaged, Averager, Curve, coverage
from bayestie._errors import CoverageError, NameLookupError, OptionError
from bayestie._marginal import curve_along
from bayestie._path import sites_along
from bayestie._results import swept_names
from bayestie._reweight import averaged_draws
from bayestie._strength_prior import PRIOR_KINDS, StrengthPrior, describe

QUANTILES = (0.025, 0.05, 0.25, 0.5, 0.75, 0.95, 0.975)
# Factors on the prior's median for which the Bayes factor is given too.
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)

Priors = Distribution | Mapping[str, Distribution]


def strength_posterior(
    path: xr.DataTree, prior: Priors, *, name: str | None = None, point_mass: float = 0.0
) -> xr.Dataset:
    r"""Posterior of a strength under any prior, from one sweep and without a refit.

    .. math:: p(\sigma \mid y) \propto p(\sigma)\, p(y \mid \sigma)

    with the log evidence of `evidence` interpolated along log sigma (the thermodynamic identity gives
    its slopes), a quadratic in sigma^2 below the smallest strength.

    Args:
        path: what ``sweep`` returned.
        prior: a Pyro distribution of sigma >= 0, such as ``HalfNormal(1.)``, ``HalfCauchy(5.)``,
            ``Exponential(rate)`` (the penalised-complexity prior), ``Uniform(0., 20.)``, ``LogNormal``.
            With several swept names, a mapping from each strength to its prior; swept keywords that are
            no tie's sigma need none, their values are weighted equally.
        name: the swept keyword to give the posterior of; needed where several were swept. The others
            are averaged over under their priors.
        point_mass: prior probability that sigma is exactly 0, in [0, 1); the rest goes to `prior`.

    Returns:
        Dataset over a fine ``sigma`` grid: ``density`` of the continuous part (it integrates to
        1 - ``mass_at_zero``), ``prior_density``, ``log_evidence``. Scalars ``mean``, ``sd``,
        ``mass_at_zero``, ``log_marginal`` (log of the evidence averaged under the whole prior) and
        ``quantiles`` over ``quantile``, each with ``_error``: Monte Carlo and interpolation together.
        ``covered`` is false where the sweep does not reach the posterior mass: attribute ``reason``
        then says which end is short, and the numbers must not be used. ``mass_below`` and
        ``mass_above`` are the shares of the posterior outside the strengths swept.

    Raises:
        OptionError: a prior that is not one of a number >= 0.
        NameLookupError: `name` or a key of `prior` was not swept.
        CoverageError: fewer than two strengths between 0 and inf.
    """
    name, priors = _named(path, prior, name)
    curve = curve_along(path, name, priors)
    own = StrengthPrior(priors[name], point_mass)
    averager = Averager.build(curve.values, own)
    averaged = averager(curve)

    def summary(c: Curve) -> np.ndarray:
        a = averager(c)
        mean = a.moment(1)
        sd = math.sqrt(max(a.moment(2) - mean**2, 0.0))
        return np.array(
            [mean, sd, a.mass_at_zero, _log_marginal(a, c, point_mass), *a.quantile(np.array(QUANTILES))]
        )

    value, error = curve.uncertain(summary)
    reason = coverage(curve, averaged)
    nodes = averaged.nodes
    keep = (nodes.sigma > curve.values[0] / 2**6) & (nodes.sigma < curve.values[-1] * 2**3)
    density = (1 - averaged.mass_at_zero) * averaged.mass / nodes.weight
    grid = {
        "density": density[keep],
        "prior_density": (1 - point_mass) * np.exp(averager.log_weight - np.log(nodes.weight))[keep],
        "log_evidence": curve(nodes.sigma)[keep],
    }
    data: dict[str, tuple] = {key: ((name,), values) for key, values in grid.items()}
    for i, key in enumerate(("mean", "sd", "mass_at_zero", "log_marginal")):
        data[key], data[f"{key}_error"] = ((), value[i]), ((), error[i])
    data["quantiles"], data["quantiles_error"] = (("quantile",), value[4:]), (("quantile",), error[4:])
    data["covered"] = ((), not reason)
    data["mass_below"], data["mass_above"] = ((), averaged.outside(-1)), ((), averaged.outside(1))
    return xr.Dataset(
        data,
        coords={name: nodes.sigma[keep], "quantile": list(QUANTILES)},
        attrs={"prior": describe(priors[name]), "point_mass": point_mass, "reason": reason},
    )


def hard_vs_soft(
    path: xr.DataTree, prior: Priors, *, name: str | None = None, prior_probability: float = 0.5
) -> xr.Dataset:
    r"""Bayes factor of hard sharing (sigma = 0) against soft sharing averaged over a prior on sigma.

    .. math:: B = p(y \mid \sigma = 0) \Big/ \int p(y \mid \sigma)\, p(\sigma)\, d\sigma

    Args:
        path: what ``sweep`` returned, best with sigma = 0 among the strengths.
        prior: as in `strength_posterior`.
        name: as in `strength_posterior`.
        prior_probability: prior probability of hard sharing, in (0, 1).

    Returns:
        Dataset: ``log_bayes_factor`` (natural log; positive favours hard sharing, 1.1 is 3 to 1 and 3.0
        is 20 to 1) and ``probability_hard``, each with ``_error``. ``sensitivity`` gives the same log
        Bayes factor for half-normal, half-Cauchy, exponential and uniform priors (dim ``kind``) whose median
        is that of `prior` times 1/4 .. 4 (dim ``scale``, with ``sensitivity_error`` and the coordinate
        ``prior_median``). ``max_log_soft`` is the largest log Bayes factor for soft sharing that any
        prior on sigma at all can give: the peak of the log evidence less its value at 0; at 0 or below, no
        prior favours soft sharing. ``covered`` and attribute ``reason`` as in `strength_posterior`.

    Raises:
        OptionError, NameLookupError, CoverageError: as in `strength_posterior`; CoverageError also where
            the evidence at sigma = 0 was not swept and cannot be told from the smallest strength.

    Reference: Kass and Raftery (1995), JASA 90, for the scale; Simpson et al. (2017), Statistical
        Science 32, for the exponential as penalised-complexity prior.
    """
    if not 0 < prior_probability < 1:
        raise OptionError(
            "prior_probability",
            found=f"{prior_probability}",
            expected="a probability between 0 and 1",
            fix="Take 0.5 where neither is favoured beforehand.",
        )
    name, priors = _named(path, prior, name)
    curve = curve_along(path, name, priors)
    averager = Averager.build(curve.values, StrengthPrior(priors[name]))
    averaged = averager(curve)
    if curve.hard is None and curve.at_zero_error > 0.5:
        raise CoverageError(
            f"smallest strength, {name} = {curve.values[0]:.3g}",
            found=f"a log evidence that is unknown at {name} = 0 to {curve.at_zero_error:.2g}",
            expected="hard sharing among the strengths",
            fix="Sweep with strengths(..., hard=True).",
        )

    def log_factor(c: Curve) -> np.ndarray:
        return np.array([c.at_zero - averager(c).log_soft, _peak(c) - c.at_zero])

    (factor, peak), (factor_error, peak_error) = curve.uncertain(log_factor)
    odds = factor + math.log(prior_probability / (1 - prior_probability))
    probability = 1 / (1 + math.exp(-max(odds, -700.0)))
    median = averager.prior_median
    kinds = list(PRIOR_KINDS)
    table = np.array([[_factor_under(curve, kind, scale * median) for scale in SCALES] for kind in kinds])
    reason = coverage(curve, averaged)
    return xr.Dataset(
        {
            "log_bayes_factor": ((), factor),
            "log_bayes_factor_error": ((), factor_error),
            "probability_hard": ((), probability),
            "probability_hard_error": ((), probability * (1 - probability) * factor_error),
            "sensitivity": (("kind", "scale"), table[..., 0]),
            "sensitivity_error": (("kind", "scale"), table[..., 1]),
            "max_log_soft": ((), peak),
            "max_log_soft_error": ((), peak_error),
            "log_evidence_hard": ((), curve.at_zero),
            "log_evidence_soft": ((), averaged.log_soft),
            "covered": ((), not reason),
        },
        coords={
            "kind": kinds,
            "scale": list(SCALES),
            "prior_median": ("scale", median * np.array(SCALES)),
        },
        attrs={"prior": describe(priors[name]), "reason": reason, "prior_probability": prior_probability},
    )


def average(
    path: xr.DataTree,
    prior: Distribution,
    *,
    point_mass: float = 0.0,
    num_draws: int | None = None,
    seed: int = 0,
) -> xr.DataTree:
    r"""Model-averaged draws: the posterior with sigma integrated out under any prior, without a refit.

    The draws of all strengths sigma_i are pooled and weighted to the average over the continuous prior,

    .. math:: w(\theta) \propto \frac{\int p(\theta \mid \sigma)\, p(\sigma)\, d\sigma}
                                     {\sum_i p(\theta \mid \sigma_i) / p(y \mid \sigma_i)},

    (the likelihood cancels), so strengths between the grid points are represented too; each draw then
    gets a sigma from its conditional. Below the smallest strength, where these weights have no finite
    variance, draws at 0 and at the smallest strength sigma_1 are mixed with shares 1 - (sigma /
    sigma_1)^2 and (sigma / sigma_1)^2, which is right to order sigma_1^4 in means and variances.

    Args:
        path: what ``sweep`` returned; one swept name.
        prior, point_mass: as in `strength_posterior`.
        num_draws: draws per chain in the result; as many as the path has per strength where left out.
        seed: of the resampling.

    Returns:
        A tree without swept dims: ``posterior`` with equal-weight draws (chain, draw) of every site and of
        the strength itself under its swept name, the other groups of draws resampled alike, data
        unchanged, and ``average``: ``weight`` (how much each strength gives), ``khat`` of the reweighting
        (above 0.7: do not trust; sweep a denser grid), ``ess`` of the weights, which bounds the Monte
        Carlo size whatever the number of rows, and ``mass_at_zero``. Repeated rows may occur.

    Raises:
        CoverageError: the strengths swept do not carry the posterior of sigma; nothing is averaged.
        OptionError: several swept names, or a swept keyword that is no tie's sigma (or not it alone).

    Reference: Veach and Guibas (1995), SIGGRAPH, for the balance heuristic; Shirts and Chodera (2008),
        Journal of Chemical Physics 129, for the same pooling of draws.
    """
    names = swept_names(path)
    if len(names) != 1:
        raise OptionError(
            "average(path)",
            found=f"swept names {names}",
            expected="exactly one",
            fix="Take bayestie.select(path, other=value) first." if names else "Sweep the strength first.",
        )
    name, priors = _named(path, prior, None)
    curve = curve_along(path, name, priors)
    averaged = Averager.build(curve.values, StrengthPrior(priors[name], point_mass))(curve)
    reason = coverage(curve, averaged)
    if reason:
        raise CoverageError(
            f"average over {name}",
            found=reason.split(":")[0],
            expected=f"at most 1% of the posterior of {name} outside the strengths swept",
            fix=reason.split(":")[-1].strip().capitalize(),
        )
    return averaged_draws(path, name, curve, averaged, num_draws, seed)


def _log_marginal(averaged: Averaged, curve: Curve, point_mass: float) -> float:
    if point_mass == 0:
        return averaged.log_soft
    return float(
        np.logaddexp(math.log1p(-point_mass) + averaged.log_soft, math.log(point_mass) + curve.at_zero)
    )


def _peak(curve: Curve) -> float:
    # Strengths below the smallest one count too: there the curve is quadratic.
    low, high = curve.values[0], curve.values[-1]
    fine = np.concatenate([low * np.linspace(0.02, 1, 50), np.geomspace(low, high, 30 * len(curve.values))])
    return float(max(curve(fine).max(), curve.free[0] if curve.free else -math.inf))


def _factor_under(curve: Curve, kind: str, median: float) -> tuple[float, float]:
    averager = Averager.build(
        curve.values, StrengthPrior(PRIOR_KINDS[kind](torch.tensor(median, dtype=torch.float64)))
    )
    value, error = curve.uncertain(lambda c: np.array([c.at_zero - averager(c).log_soft]))
    return float(value[0]), float(error[0])


def _named(path: xr.DataTree, prior: Priors, name: str | None) -> tuple[str, dict[str, Distribution]]:
    names = swept_names(path)
    if not names:
        raise OptionError(
            "path",
            found="one strength: nothing was swept",
            expected="what bayestie.sweep returned",
            fix="Sweep the strength first: bayestie.sweep(model, ..., over={'sigma': strengths(...)}).",
        )
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        raise NameLookupError(
            "name",
            found=f"{name!r}",
            expected=f"one of the swept names {names}",
            fix=f"Pass name={names[0]!r}, for example.",
        )
    priors = dict(prior) if isinstance(prior, Mapping) else {name: prior}
    missing = [
        other for other in names if other not in priors and (other == name or sites_along(path, other))
    ]
    if missing or not set(priors) <= set(names):
        raise NameLookupError(
            "prior",
            found=f"priors for {sorted(priors)}",
            expected=f"one for each tie's strength among {names}",
            fix="Pass prior={name: distribution, ...}, or bayestie.select the other strengths first.",
        )
    return name, priors
