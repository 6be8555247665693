"""ArviZ's power scaling of the deviations' prior moves along the strengths: alpha = (sigma_0 / sigma)^2."""

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from arviz_stats import psense
from moments import limit
from scipy.stats import norm, t

import bayestie as bt
from bayestie._path import tied_sites
from models import eight_schools

SIGMAS = [4.0, 5.0, 6.0]
ALPHAS = ((5.0 / 6.0) ** 2, (5.0 / 4.0) ** 2)


def schools_with_slopes(y, *, sigma):
    theta = bt.tied("theta", bt.Tie.chain(6), sigma, dist.Normal(0.0, 2.0), event_shape=(2,))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("row", 6):
        pyro.sample("y", dist.Poisson((0.3 * theta.sum(-1) + 0.1 * slope).exp()), obs=y)


@pytest.fixture(scope="module", params=["eight schools", "counts"])
def path(request):
    options: dict[str, Any] = {"over": {"sigma": SIGMAS}, "num_draws": 1000, "target_ess": 2000, "seed": 11}
    if request.param == "eight schools":
        given = {k: v for k, v in eight_schools.data().items() if k in ("effect", "stderr")}
        return bt.sweep(eight_schools.eight_schools, **given, **options)
    return bt.sweep(schools_with_slopes, torch.tensor([0.0, 1.0, 3.0, 1.0, 6.0, 4.0]), **options)


def scaled_weights(one, alpha):
    """ArviZ's weights (chain, draw) for the deviations' log prior to the power alpha."""
    log_weights = one["log_prior"]["theta"].azstats.power_scale_lw(alpha=alpha, dim=["chain", "draw"])
    weights = np.exp(log_weights - log_weights.max())
    return (weights / weights.sum()).values


@pytest.mark.parametrize("sigma", [4.0, 6.0])
def test_powers_of_the_deviations_prior_are_strengths(path, sigma):
    one = bt.select(path, sigma=5.0)
    weights = scaled_weights(one, (5.0 / sigma) ** 2)
    # Draw by draw it is what the change of sigma does to the density of the copies.
    site = tied_sites(path)["theta"]
    energy, level = site.statistics(one)
    flat = energy.values.reshape(-1, energy.shape[-1])
    to, of = site.log_density(np.array([sigma, 5.0]), flat, level)
    ratio = np.exp(to - of).reshape(weights.shape)
    # The tails are Pareto-smoothed by ArviZ: compared where they are not.
    middle = (weights > np.quantile(weights, 0.1)) & (weights < np.quantile(weights, 0.9))
    np.testing.assert_allclose(
        weights[middle] / weights[middle].sum(), ratio[middle] / ratio[middle].sum(), rtol=1e-6
    )
    # And so the scaled posterior is that of the sweep at the other strength.
    there = bt.select(path, sigma=sigma)
    # Resampled draws repeat themselves: they are worth no more than the importance weights.
    sizes = [min(4000.0, float(tree["sweep"].ess_weights)) for tree in (one, there)]
    scores = []
    for name in ("theta", "theta_level"):
        old, new = (tree["posterior"].to_dataset()[name].values.reshape(4000, -1) for tree in (one, there))
        w, centre = weights.reshape(-1, 1), old.mean(0)
        for power in (1, 2):
            a, b = (old - centre) ** power, (new - centre) ** power
            mean = (w * a).sum(0)
            variance = (w**2 * (a - mean) ** 2).sum(0) * 4000 / sizes[0] + b.var(0) / sizes[1]
            scores.append((mean - b.mean(0)) / np.sqrt(variance))
    scores = np.concatenate(scores)
    assert np.abs(scores).max() < limit(scores.size)


def schools_marginals(sigma):
    """Posterior mean and sd of each school's effect, levels N(0, 5)."""
    data = eight_schools.data()
    y, noise = data["effect"].numpy(), np.diag(data["stderr"].numpy() ** 2)
    prior = 25.0 * np.ones((8, 8)) + sigma**2 * np.eye(8)
    gain = np.linalg.solve(prior + noise, prior).T
    return gain @ y, np.sqrt(np.diag(prior - gain @ prior))


def sensitivity(tree):
    found = psense(tree, var_names=["theta"], group="prior", group_var_names=["theta"], alphas=ALPHAS)
    return found["theta"].values


def test_psense_of_a_selected_strength_is_what_the_strengths_do():
    given = {k: v for k, v in eight_schools.data().items() if k in ("effect", "stderr")}
    path = bt.sweep(
        eight_schools.eight_schools, **given, over={"sigma": SIGMAS}, num_chains=16, num_draws=1000, seed=2
    )
    one = bt.select(path, sigma=5.0)
    found = sensitivity(one)
    # ArviZ's formula on the quantiles of the exact posterior, weighted by the exact ones at the neighbours.
    mean, sd = schools_marginals(5.0)
    quantiles = norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    exact = []
    for k in range(8):
        x = mean[k] + sd[k] * quantiles
        scaled: dict[str, Any] = {"lower_alpha": ALPHAS[0], "upper_alpha": ALPHAS[1]}
        for side, sigma in (("lower_w", 6.0), ("upper_w", 4.0)):
            m, s = (values[k] for values in schools_marginals(sigma))
            ratio = norm.pdf(x, m, s) / norm.pdf(x, mean[k], sd[k])
            scaled[side] = xr.DataArray((ratio / ratio.sum())[None], dims=["chain", "draw"])
        grid = xr.DataArray(x[None], dims=["chain", "draw"])
        exact.append(float(grid.azstats.power_scale_sense(**scaled)))
    parts = np.array([sensitivity(one.isel(chain=slice(i, i + 2))) for i in range(0, 16, 2)])
    error = parts.std(0, ddof=1) / math.sqrt(8)
    # One in a thousand tests of right code fails: Student's t, the error being of 8 parts, and 8 schools.
    furthest = t.isf(1e-3 / (2 * 8), 7)
    assert (np.abs(found - exact) < furthest * error).all() and (error < 0.1 * np.array(exact)).all()
