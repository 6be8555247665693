"""Simulation-based calibration: uniform for every engine and tie kind, and broken when something is."""

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import binom
from tie_kinds import TIES

import bayestie as bt
from bayestie import _calibration, _tied_normal
from bayestie._calibration import _ranks, _tests, simultaneous_band
from bayestie._engines import _nuts
from bayestie._errors import ModelError, OptionError
from bayestie._tie_priors import TiePrior

# Calibrations that must pass, in all tests of this file together: laplace, svi and nuts for each form (nuts
# in pieces), a grid, and what stands unbroken beside what is broken. Of all their p-values together one set
# in a thousand is refused (Bonferroni).
CALIBRATIONS = 2 * 3 + 11 + 1 + 2 + 1
LEVEL = 0.001
FORMS = {
    "level": list(TIES),
    "copies": [name for name, tie in TIES.items() if not any(p.hub or p.anchored for p in tie.components)],
    "matched": [name for name, tie in TIES.items() if not any(p.anchored for p in tie.components)],
}


def _together(names, form):
    """One model with a tied site of each kind, each with data of its own: one batch calibrates all."""

    def model(y, *, sigma):
        thetas = [
            bt.tied(f"theta_{i}", TIES[name], sigma * (0.5 + 0.1 * i), dist.Normal(0.3, 1.1), form=form)
            for i, name in enumerate(names)
        ]
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(torch.cat(thetas), 0.6), obs=y)

    return model, torch.zeros(sum(TIES[name].num_copies for name in names))


def _smallest(found):
    """The smallest p-value as a share of what Bonferroni allows: below 1 is a failure."""
    return float(found.p_value.min()) * found.p_value.size * CALIBRATIONS / LEVEL


@pytest.mark.parametrize("engine", ["laplace", "svi"])
@pytest.mark.parametrize("form", FORMS)
def test_exact_engines_are_calibrated_for_every_tie(form, engine):
    model, y = _together(FORMS[form], form)
    found = bt.calibrate(
        model,
        y,
        sigma=0.8,
        num_data=200,
        num_chains=1,
        num_draws=99,
        target_ess=99,
        engine=engine,
    )
    assert found.certified.all() and _smallest(found) > 1
    assert {"log_likelihood", "theta_0[0]", "theta_0_z[0]"} <= set(found.quantity.values)
    # Bands hold all of a curve with probability 0.95; many quantities are correlated.
    assert float(found.outside.mean()) < 0.15


def _without_rounds(monkeypatch):
    # One round of draws, certified or not: it is the draws that are tested here.
    monkeypatch.setattr(_nuts, "MAX_TOTAL", 1)
    monkeypatch.setattr(_nuts, "EFFICIENCY", float("inf"))  # and it is as long as what is stored
    monkeypatch.setattr(_nuts, "METRIC_DRAWS", 80)  # any metric will do, and warmup is most of the time


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_nuts_is_calibrated_for_every_tie(form, monkeypatch):
    _without_rounds(monkeypatch)
    for start in range(0, len(FORMS[form]), 5):
        model, y = _together(FORMS[form][start : start + 5], form)
        found = bt.calibrate(
            model, y, sigma=0.8, num_data=120, num_chains=2, num_draws=80, target_ess=50, engine="nuts"
        )
        assert _smallest(found) > 1


def test_a_grid_with_both_ends_is_calibrated():
    def model(y, *, sigma):
        theta = bt.tied("theta", bt.Tie.complete(3), sigma, dist.Normal(0.0, 1.0), form="matched")
        with pyro.plate("row", 3):
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    found = bt.calibrate(
        model,
        torch.zeros(3),
        over={"sigma": [0.0, 0.7, math.inf]},
        num_data=200,
        num_draws=30,
        target_ess=100,
    )
    assert found.ranks.dims == ("sigma", "data", "quantity") and found.ranks.shape == (3, 200, 7)
    assert found.quantity.values.tolist() == [
        "theta_z[0]", "theta_z[1]", "theta_level", "theta[0]", "theta[1]", "theta[2]", "log_likelihood"
    ]  # fmt: skip
    assert _smallest(found) > 1
    at_zero = found.ranks.sel(sigma=0.0, quantity=["theta[0]", "theta[2]"]).values
    np.testing.assert_array_equal(at_zero[:, 0], at_zero[:, 1])


# -- broken on purpose ---------------------------------------------------------------------------------------


def _steps(y, *, sigma):
    theta = bt.tied("theta", bt.Tie.chain(4), sigma, dist.Normal(0.0, 1.0))
    with pyro.plate("row", 4):
        pyro.sample("y", dist.Normal(theta, 0.4), obs=y)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_broken_filter_is_seen(factor, monkeypatch):
    honest = bt.calibrate(_steps, torch.zeros(4), sigma=1.0, num_data=200, num_draws=50, target_ess=100)
    assert _smallest(honest) > 1
    simulate, scale = _calibration.simulate_data, TiePrior.coefficient_scale

    def simulate_then_break(*args, **kwargs):
        out = simulate(*args, **kwargs)
        monkeypatch.setattr(TiePrior, "coefficient_scale", lambda self: factor * scale(self))
        return out

    monkeypatch.setattr(_calibration, "simulate_data", simulate_then_break)
    broken = bt.calibrate(_steps, torch.zeros(4), sigma=1.0, num_data=200, num_draws=50, target_ess=100)
    assert _smallest(broken) < 1 and broken.outside.any()
    # Too soft a filter leaves posteriors too wide: ranks pile up in the middle; too hard, at the ends.
    ranks = broken.ranks.sel(quantity=["theta_z[0]", "theta_z[1]", "theta_z[2]"]).values
    middle = ((ranks >= 25) & (ranks < 75)).mean()
    assert middle > 0.55 if factor < 1 else middle < 0.5


def _learned(y):
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.6))
    law = bt.TiedNormal(bt.Tie.chain(5), sigma, dist.Normal(0.0, 0.5))
    theta = pyro.sample("theta", law)
    with pyro.plate("row", 5), pyro.plate("repeat", 2):
        pyro.sample("y", dist.Normal(theta, 0.5), obs=y)


@pytest.mark.slow
def test_a_broken_normalising_constant_is_seen_in_a_learned_strength(monkeypatch):
    # The centred form needs -r log sigma; without it a learned sigma is biased upward.
    _without_rounds(monkeypatch)
    options: dict[str, Any] = {
        "num_data": 150,
        "num_chains": 2,
        "num_draws": 80,
        "target_ess": 50,
        "engine": "nuts",
    }
    honest = bt.calibrate(_learned, torch.zeros(2, 5), **options)
    assert _smallest(honest) > 1
    exact = _tied_normal.log_prob

    def without_constant(prior, value):
        return exact(prior, value) + prior.tie.rank * prior.args.sigma.log()

    monkeypatch.setattr(_tied_normal, "log_prob", without_constant)
    broken = bt.calibrate(_learned, torch.zeros(2, 5), **options)
    assert float(broken.p_value.sel(quantity="sigma")) < 1e-6
    # Ranks at the lower end: the posterior of sigma lies too high.
    assert float(broken.ranks.sel(quantity="sigma").mean()) < 40


# -- ranks, tests, bands -------------------------------------------------------------------------------------


def test_ranks_count_draws_below_and_break_ties_at_random():
    generator = np.random.default_rng(0)
    drawn = np.array([[[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]]).repeat(2000, 0)
    truth = np.array([[2.5, 0.0]]).repeat(2000, 0)
    ranks = _ranks(truth, drawn, generator)
    assert (ranks[:, 0] == 2).all()
    counts = np.bincount(ranks[:, 1], minlength=4)
    assert len(counts) == 4 and np.abs(counts - 500).max() < 4.5 * math.sqrt(500)


@pytest.mark.parametrize(("num_data", "num_ranks"), [(300, 99), (40, 99), (25, 3), (200, 100)])
def test_p_values_of_uniform_ranks_are_uniform(num_data, num_ranks):
    generator = np.random.default_rng(1)
    ranks = generator.integers(0, num_ranks + 1, size=(num_data, 3000))
    found = _tests(ranks, num_ranks, ())
    for level in (0.05, 0.2, 0.5) if num_ranks > 10 else (0.05,):
        share = float((found.p_value < level).mean())
        assert abs(share - level) < 4 * math.sqrt(level / 3000) + 0.02  # counts are discrete
    if num_ranks > 10:
        assert float(found.outside.mean()) == pytest.approx(0.05, abs=4 * math.sqrt(0.05 / 3000) + 0.01)


def test_band_holds_the_pointwise_interval_and_more():
    lower, upper = simultaneous_band(300, 99)
    at = np.arange(1, 100) / 100
    assert (lower <= binom.ppf(0.025, 300, at) / 300).all() and (
        upper >= binom.ppf(0.975, 300, at) / 300
    ).all()
    # Symmetric, and hardly wider than the Dvoretzky-Kiefer-Wolfowitz band where that is narrowest.
    np.testing.assert_allclose(lower, 1 - upper[::-1], atol=1e-12)
    assert (upper - at).max() < 1.1 * math.sqrt(math.log(2 / 0.05) / 600)


def test_what_cannot_be_calibrated_is_named():
    with pytest.raises(OptionError, match="num_data, num_ranks"):
        bt.calibrate(_steps, torch.zeros(4), sigma=1.0, num_data=5)
    with pytest.raises(OptionError, match="99 of 40 draws"):
        bt.calibrate(_steps, torch.zeros(4), sigma=1.0, num_chains=2, num_draws=20)

    def inside(y, *, sigma):
        _steps(y - 1.0, sigma=sigma)

    with pytest.raises(ModelError, match="observed site 'y': found no argument"):
        bt.calibrate(inside, torch.zeros(4), sigma=1.0, num_draws=30)
