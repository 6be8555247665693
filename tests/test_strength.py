"""Posterior of sigma, averaged draws and Bayes factors against dense quadrature over closed forms."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from gaussian_sweeps import Tied, gaussian_tree
from gaussian_sweeps import log_evidence as dense_log_evidence
from scipy import stats
from synthetic import (
    EFFECT,
    STDERR,
    eight_schools_tree,
    exact_moments,
    fit_tree,
    log_evidence,
    normal_means_tree,
)

from bayestie._errors import CoverageError, NameLookupError, OptionError
from bayestie._strength import QUANTILES, average, hard_vs_soft, strength_posterior
from bayestie._ties import Tie

PRIORS = {
    "half-Cauchy": (dist.HalfCauchy(5.0), stats.halfcauchy(scale=5)),
    "half-normal": (dist.HalfNormal(3.0), stats.halfnorm(scale=3)),
    "exponential": (dist.Exponential(0.2), stats.expon(scale=5)),
    "uniform": (dist.Uniform(0.0, 18.0), stats.uniform(0, 18)),
    "log-normal": (dist.LogNormal(1.0, 0.7), stats.lognorm(0.7, scale=math.e)),
}


@pytest.fixture(scope="module")
def path():
    return eight_schools_tree(num_draws=1000)


def _quadrature(prior, log_evidence_at, high=3000.0, num=40_000):
    """sigma, posterior mass and log of the averaged evidence, by the midpoint rule in log sigma."""
    edges = np.concatenate([[0.0], np.geomspace(1e-5, high, num)])
    sigma = np.concatenate([[edges[1] / 2], np.sqrt(edges[1:-1] * edges[2:])])
    log_mass = np.log(np.maximum(np.diff(prior.cdf(edges)), 1e-300))
    log_mass = log_mass + np.interp(np.log(sigma), *log_evidence_at)
    total = np.logaddexp.reduce(log_mass)
    return sigma, np.exp(log_mass - total), total


@pytest.fixture(scope="module")
def exact_curve():
    grid = np.geomspace(1e-6, 3000, 4000)
    return np.log(grid), np.array([log_evidence(s, EFFECT, STDERR) for s in grid])


@pytest.mark.parametrize("name", list(PRIORS))
def test_posterior_of_sigma_is_that_of_dense_quadrature(name, path, exact_curve):
    ours, theirs = PRIORS[name]
    found = strength_posterior(path, ours)
    sigma, mass, total = _quadrature(theirs, exact_curve)
    mean = float(mass @ sigma)
    assert bool(found.covered) and found.attrs["reason"] == ""
    assert float(found["mean"]) == pytest.approx(mean, rel=2e-3)
    assert float(found.sd) == pytest.approx(math.sqrt(mass @ sigma**2 - mean**2), rel=4e-3)
    assert float(found.log_marginal) == pytest.approx(total, abs=1e-3)
    exact = np.interp(QUANTILES, np.cumsum(mass), sigma)
    np.testing.assert_allclose(found.quantiles, exact, rtol=5e-3)
    assert abs(float(found["mean"]) - mean) < 4 * float(found.mean_error) + 1e-4
    density = np.interp(found.sigma, sigma, mass / np.gradient(sigma))
    inside = (found.sigma > 0.5) & (found.sigma < 15)
    np.testing.assert_allclose(found.density[inside], density[inside], rtol=0.02)


def test_published_posterior_of_tau(path):
    # Posterior mean of tau under posteriordb's priors, mu ~ N(0, 5), tau ~ half-Cauchy(0, 5), by quadrature
    # outside bayestie (its own grid is good to 1e-3); the reference draws of posteriordb agree with it.
    assert float(strength_posterior(path, dist.HalfCauchy(5.0))["mean"]) == pytest.approx(3.5977, abs=2e-3)


def test_point_mass_shifts_probability_to_zero(path):
    prior = dist.HalfCauchy(5.0)
    found = strength_posterior(path, prior, point_mass=0.5)
    factor = hard_vs_soft(path, prior)
    assert float(found.mass_at_zero) == pytest.approx(float(factor.probability_hard), abs=1e-9)
    assert (found.quantiles[:3] == 0).all()
    soft = strength_posterior(path, prior)
    assert float(found["mean"]) == pytest.approx((1 - float(found.mass_at_zero)) * float(soft["mean"]))
    mixed = np.logaddexp(
        math.log(0.5) + float(soft.log_marginal), math.log(0.5) + log_evidence(0.0, EFFECT, STDERR)
    )
    assert float(found.log_marginal) == pytest.approx(mixed, abs=1e-6)


def test_grid_that_ends_too_soon_says_so():
    short = normal_means_tree(EFFECT, STDERR, strengths=(0.0, 0.1, 0.3, 0.6, 1.0, 2.0), num_draws=100)
    found = strength_posterior(short, dist.HalfCauchy(5.0))
    assert not bool(found.covered) and "sweep further" in found.attrs["reason"]
    assert float(found.mass_above) > 0.3
    with pytest.raises(CoverageError, match="Sweep further"):
        average(short, dist.HalfCauchy(5.0))


def test_grid_that_starts_too_late_says_so():
    late = normal_means_tree(EFFECT, STDERR, strengths=(8.0, 10.0, 14.0, 20.0, 30.0, 60.0), num_draws=100)
    found = strength_posterior(late, dist.HalfCauchy(5.0))
    assert not bool(found.covered) and "hard=True" in found.attrs["reason"]
    with pytest.raises(CoverageError, match="hard=True"):
        hard_vs_soft(late, dist.HalfCauchy(5.0))


def test_without_zero_a_small_strength_is_enough():
    path = normal_means_tree(EFFECT, STDERR, strengths=tuple(np.geomspace(0.05, 40, 16)), num_draws=500)
    found = hard_vs_soft(path, dist.HalfCauchy(5.0))
    with_zero = hard_vs_soft(eight_schools_tree(), dist.HalfCauchy(5.0))
    assert float(found.log_bayes_factor) == pytest.approx(float(with_zero.log_bayes_factor), abs=0.01)


@pytest.mark.parametrize("num", [6, 10, 16])
def test_interpolation_error_is_reported_honestly(num, exact_curve):
    path = normal_means_tree(EFFECT, STDERR, strengths=(0.0, *np.geomspace(0.1, 40, num)), num_draws=500)
    found = strength_posterior(path, dist.HalfCauchy(5.0))
    sigma, mass, total = _quadrature(PRIORS["half-Cauchy"][1], exact_curve)
    assert abs(float(found.log_marginal) - total) < 4 * float(found.log_marginal_error) + 1e-4
    assert abs(float(found["mean"]) - mass @ sigma) < 4 * float(found.mean_error) + 1e-3


@pytest.mark.parametrize("name", list(PRIORS))
def test_bayes_factor_is_that_of_dense_quadrature(name, path, exact_curve):
    ours, theirs = PRIORS[name]
    found = hard_vs_soft(path, ours)
    _, _, total = _quadrature(theirs, exact_curve)
    exact = log_evidence(0.0, EFFECT, STDERR) - total
    assert float(found.log_bayes_factor) == pytest.approx(exact, abs=1e-3)
    assert float(found.probability_hard) == pytest.approx(1 / (1 + math.exp(-exact)), abs=1e-3)


def test_sensitivity_has_the_median_of_the_prior_in_its_middle(path, exact_curve):
    found = hard_vs_soft(path, dist.HalfCauchy(5.0))
    assert float(found.prior_median.sel(scale=1.0)) == pytest.approx(5.0, rel=1e-4)
    assert float(found.sensitivity.sel(kind="half_cauchy", scale=1.0)) == pytest.approx(
        float(found.log_bayes_factor), abs=1e-4
    )
    kinds = {
        "half_normal": lambda m: stats.halfnorm(scale=m / stats.halfnorm.median()),
        "half_cauchy": lambda m: stats.halfcauchy(scale=m),
        "exponential": lambda m: stats.expon(scale=m / math.log(2)),
        "uniform": lambda m: stats.uniform(0, 2 * m),
    }
    hard = log_evidence(0.0, EFFECT, STDERR)
    for kind, make in kinds.items():
        for scale in (0.25, 4.0):
            exact = hard - _quadrature(make(5.0 * scale), exact_curve)[2]
            assert float(found.sensitivity.sel(kind=kind, scale=scale)) == pytest.approx(exact, abs=2e-3)


def test_where_the_evidence_peaks_at_zero_no_prior_prefers_soft(path):
    found = hard_vs_soft(path, dist.HalfNormal(1.0))
    assert float(found.max_log_soft) <= 1e-6
    assert (found.sensitivity > 0).all()


def test_where_copies_differ_soft_wins_by_at_most_the_peak():
    y = np.array([-6.0, 4.0, 1.0, 7.0, -3.0, 2.0])
    path = normal_means_tree(y, np.full(6, 0.5), strengths=(0.0, *np.geomspace(0.1, 60, 20)), base_sd=10.0)
    found = hard_vs_soft(path, dist.HalfCauchy(3.0))
    exact = max(log_evidence(s, y, np.full(6, 0.5), 10.0) for s in np.geomspace(1, 20, 2000))
    exact -= log_evidence(0.0, y, np.full(6, 0.5), 10.0)
    assert float(found.max_log_soft) == pytest.approx(exact, abs=0.01)
    assert float(found.log_bayes_factor) < -20
    assert (-found.sensitivity <= float(found.max_log_soft)).all()


# averaged draws


def _exact_average(prior, log_evidence_at, base_sd, **options):
    sigma, mass, _ = _quadrature(prior, log_evidence_at, num=4000, **options)
    keep = mass > 1e-9
    moments = [exact_moments(s, EFFECT, STDERR, base_sd) for s in sigma[keep]]
    centre, spread = (np.stack(column) for column in zip(*moments, strict=True))
    mean = mass[keep] @ centre
    square = mass[keep] @ (centre**2 + spread**2)
    return mean, np.sqrt(square - mean**2), mass @ sigma


def _z_scores(tree, mean, sd):
    theta = tree["posterior"].to_dataset()["theta"].values.reshape(-1, 8)
    size = 1 / (1 / len(theta) + 1 / float(tree["average"].ess))
    centred = theta - theta.mean(0)
    sd_error = np.sqrt((np.mean(centred**4, 0) / theta.var(0) ** 2 - 1) / 4 / size) * theta.std(0)
    return (theta.mean(0) - mean) / (theta.std(0) / math.sqrt(size)), (theta.std(0) - sd) / sd_error


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_averaged_draws_are_the_posterior_under_posteriordb_priors(seed, exact_curve):
    path = eight_schools_tree(num_draws=1000, seed=seed)
    found = average(path, dist.HalfCauchy(5.0), num_draws=4000, seed=seed)
    mean, sd, tau = _exact_average(PRIORS["half-Cauchy"][1], exact_curve, 5.0)
    # The published quadrature (outside bayestie), mean of theta_1 and theta_6.
    np.testing.assert_allclose(mean[[0, 5]], [6.2119, 4.0426], atol=5e-3)
    for z in _z_scores(found, mean, sd):
        assert abs(z).max() < 4
    sigma = found["posterior"].to_dataset()["sigma"].values.ravel()
    assert abs(sigma.mean() - tau) < 4 * sigma.std() / math.sqrt(float(found["average"].ess) / 4)
    assert float(found["average"].khat) < 0.7
    assert float(found["average"].ess) > 10_000


def test_averaged_draws_with_a_flat_level_are_those_of_bda3():
    # BDA3's priors, uniform tau and flat mu: means and sds of theta by quadrature outside bayestie.
    mean = [11.40026, 7.89455, 6.13075, 7.64468, 5.12642, 6.13854, 10.66698, 8.45682]
    sd = [8.34142, 6.27484, 7.76517, 6.54626, 6.35742, 6.71029, 6.78559, 7.88820]
    strengths = (0.0, *np.geomspace(0.1, 400, 28))
    path = normal_means_tree(EFFECT, STDERR, strengths=strengths, base_sd=1000.0, num_draws=1000, seed=4)
    found = average(path, dist.Uniform(0.0, 400.0), num_draws=4000)
    for z in _z_scores(found, np.array(mean), np.array(sd)):
        assert abs(z).max() < 4
    tau = strength_posterior(path, dist.Uniform(0.0, 400.0))
    assert float(tau["mean"]) == pytest.approx(6.5755, rel=5e-3)


def test_averaged_sigma_has_the_posterior_of_sigma(path):
    found = average(path, dist.HalfCauchy(5.0), num_draws=2000, seed=2)
    sigma = found["posterior"].to_dataset()["sigma"].values.ravel()
    exact = strength_posterior(path, dist.HalfCauchy(5.0))
    levels = np.array(QUANTILES)
    below = (sigma[:, None] <= exact.quantiles.values).mean(0)
    assert (abs(below - levels) < 4 * np.sqrt(levels * (1 - levels) / len(sigma)) * 1.3).all()


def test_point_mass_gives_draws_at_zero(path):
    found = average(path, dist.HalfCauchy(5.0), point_mass=0.5, num_draws=1000)
    sigma = found["posterior"].to_dataset()["sigma"].values
    share = float(found["average"].mass_at_zero)
    assert abs((sigma == 0).mean() - share) < 4 * math.sqrt(share * (1 - share) / sigma.size)
    theta, level = (found["posterior"].to_dataset()[name].values for name in ("theta", "theta_level"))
    assert np.array_equal(
        theta[sigma == 0], np.broadcast_to(level[sigma == 0][:, None], theta[sigma == 0].shape)
    )


@pytest.mark.parametrize("form", ["copies", "matched"])
def test_averaged_draws_in_the_other_forms(form):
    tied = Tied("theta", Tie.chain(5), np.eye(5), form=form, base=(1.0, 2.0))
    y = np.array([3.0, 1.0, 0.5, -1.0, 2.5])
    strengths = (0.0, *np.geomspace(0.1, 30, 18), math.inf)
    path = gaussian_tree([tied], y, 0.8, {"sigma": strengths}, num_draws=500)
    found = average(path, dist.HalfCauchy(1.0), num_draws=1000)
    grid = np.geomspace(1e-4, 1e4, 600)
    curve = np.log(grid), np.array([dense_log_evidence([tied], [s], y, 0.8) for s in grid])
    sigma, mass, _ = _quadrature(stats.halfcauchy(scale=1.0), curve, high=1e4, num=600)
    mean = np.zeros(5)
    for s, m in zip(sigma, mass, strict=True):
        prior = tied.maps(s) @ tied.maps(s).T
        mean += m * (1.0 + prior @ np.linalg.solve(prior + 0.64 * np.eye(5), y - 1.0))
    theta = found["posterior"].to_dataset()["theta"].values.reshape(-1, 5)
    size = 1 / (1 / len(theta) + 1 / float(found["average"].ess))
    assert (abs(theta.mean(0) - mean) < 4 * theta.std(0) / math.sqrt(size)).all()


def test_average_keeps_the_tree_whole(path):
    found = average(path, dist.HalfCauchy(5.0), num_draws=50)
    assert found["posterior"]["theta"].dims == ("chain", "draw", "school")
    assert found["log_likelihood"]["y"].sizes == {"chain": 4, "draw": 50, "school": 8}
    # The rows of the groups belong together.
    theta, level = found["posterior"]["theta"], found["posterior"]["theta_level"]
    np.testing.assert_allclose(found["tie_energy"]["theta"], ((theta - level) ** 2).sum("school"), atol=1e-9)
    assert float(found["average"].weight.sum()) == pytest.approx(1)
    assert set(found["observed_data"].data_vars) == {"y"}
    same = average(path, dist.HalfCauchy(5.0), num_draws=50)
    xr.testing.assert_identical(found["posterior"].to_dataset(), same["posterior"].to_dataset())


# two strengths


@pytest.fixture(scope="module")
def grid_of_two():
    generator = np.random.default_rng(8)
    rows = np.array([(g, t) for g in range(4) for t in range(3)])
    ties = [
        Tied("a", Tie.exchangeable(4), np.eye(4)[rows[:, 0]], keyword="sigma"),
        Tied("b", Tie.chain(3), np.eye(3)[rows[:, 1]], keyword="tau"),
    ]
    y = 0.5 * generator.normal(size=len(rows)) + 1.5 * generator.normal(size=4)[rows[:, 0]]
    values = (0.0, *np.geomspace(0.05, 40, 12).tolist())
    return ties, y, gaussian_tree(ties, y, 0.8, {"sigma": values, "tau": values}, num_draws=250)


def test_the_other_strength_is_averaged_over_under_its_prior(grid_of_two):
    ties, y, path = grid_of_two
    priors = {"sigma": dist.HalfCauchy(1.0), "tau": dist.HalfNormal(2.0)}
    found = strength_posterior(path, priors, name="sigma")
    points = np.concatenate([[1e-3], np.geomspace(0.02, 200, 70)])
    other = np.concatenate([[1e-3], np.geomspace(0.02, 60, 70)])
    log_joint = np.array([[dense_log_evidence(ties, [s, t], y, 0.8) for t in other] for s in points])
    weights = [stats.halfcauchy.pdf(points, scale=1), stats.halfnorm.pdf(other, scale=2)]
    inner = np.trapezoid(np.exp(log_joint - log_joint.max()) * weights[1], other, axis=1) * weights[0]
    mean = np.trapezoid(inner * points, points) / np.trapezoid(inner, points)
    assert float(found["mean"]) == pytest.approx(mean, rel=0.03)
    factor = hard_vs_soft(path, priors, name="sigma")
    assert float(factor.log_bayes_factor) == pytest.approx(
        np.log(
            np.trapezoid(
                np.exp([dense_log_evidence(ties, [0.0, t], y, 0.8) - log_joint.max() for t in other])
                * weights[1],
                other,
            )
        )
        - math.log(np.trapezoid(inner, points)),
        abs=0.05,
    )


def test_two_strengths_need_two_priors_and_a_name(grid_of_two):
    *_, path = grid_of_two
    with pytest.raises(NameLookupError, match="one for each tie's strength"):
        strength_posterior(path, dist.HalfCauchy(1.0), name="sigma")
    with pytest.raises(NameLookupError, match="one of the swept names"):
        strength_posterior(path, {"sigma": dist.HalfCauchy(1.0), "tau": dist.HalfCauchy(1.0)})
    with pytest.raises(OptionError, match="exactly one"):
        average(path, dist.HalfCauchy(1.0))


# what is refused


@pytest.mark.parametrize(
    "prior",
    [dist.Normal(0.0, 1.0), dist.HalfNormal(torch.ones(2)), dist.Poisson(2.0), dist.Uniform(-1.0, 1.0)],
    ids=str,
)
def test_a_prior_must_be_one_of_a_number_that_is_not_negative(path, prior):
    with pytest.raises(OptionError, match="prior"):
        strength_posterior(path, prior)


def test_other_refusals(path):
    with pytest.raises(OptionError, match="point_mass"):
        strength_posterior(path, dist.HalfCauchy(1.0), point_mass=1.0)
    with pytest.raises(OptionError, match="prior_probability"):
        hard_vs_soft(path, dist.HalfCauchy(1.0), prior_probability=0.0)
    with pytest.raises(NameLookupError, match="tau"):
        strength_posterior(path, dist.HalfCauchy(1.0), name="tau")
    with pytest.raises(OptionError, match="nothing was swept"):
        strength_posterior(fit_tree(), dist.HalfCauchy(1.0))
    few = normal_means_tree(EFFECT, STDERR, strengths=(0.0, 1.0), num_draws=50)
    with pytest.raises(CoverageError, match="at least 2"):
        strength_posterior(few, dist.HalfCauchy(1.0))
    other = path.copy()
    other.attrs["ties"] = other.attrs["ties"].replace('"sigma_from": "sigma"', '"sigma_from": null')
    with pytest.raises(OptionError, match="no tie's sigma"):
        average(other, dist.HalfCauchy(5.0))
